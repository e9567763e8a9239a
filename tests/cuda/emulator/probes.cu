// Kernels for tests/cuda/test_emulator.py: small programs that are right, and the same with a bug planted.
#include "cuda/device.cuh"

using namespace pyroute::cuda;

struct ProbeArgs {
    uint32_t *out;
    const uint32_t *in;
    uint32_t n;
    uint32_t wrong; // which bug
};

// Each thread reads what its neighbour wrote to shared memory.
PYROUTE_KERNEL(probe_barrier, 256, 1, ProbeArgs) {
    using Row = uint32_t[256];
    PYROUTE_SHARED(Row, row);
    row[threadIdx.x] = args.in[blockIdx.x * blockDim.x + threadIdx.x];
    if (args.wrong == 0)
        sync_block();
    else if (args.wrong == 1)
        sync_warp();
    else if (args.wrong == 2 && threadIdx.x != 7)
        sync_block();
    else if (args.wrong == 3) {
        if (threadIdx.x == 0)
            ballot(true, 3);
        sync_block();
    }
    args.out[blockIdx.x * blockDim.x + threadIdx.x] = row[(threadIdx.x + 1) % blockDim.x];
}

// Every lane's sum of its warp, by the contract's tree.
PYROUTE_KERNEL(probe_warp, 256, 1, ProbeArgs) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t sum = args.in[i];
    if (args.wrong == 1 && lane_id() == 5)
        return;
    if (args.wrong == 2 && lane_id() == 5)
        ballot(true);
    if (args.wrong == 3)
        shuffle(sum, 0, 0xffffffffu ^ 1u << lane_id());
    for (uint32_t distance = 16; distance; distance /= 2)
        sum += shuffle_xor(sum, distance);
    args.out[i] = sum;
}

// The other words, one result each.
PYROUTE_KERNEL(probe_words, 32, 1, ProbeArgs) {
    const uint32_t value = args.in[lane_id()];
    uint32_t *out = args.out + lane_id();
    out[0] = ballot(value & 1);
    out[32] = match_any(value);
    out[64] = reduce_max(value);
    out[96] = reduce_min(value);
    out[128] = reduce_add(value);
    out[160] = shuffle_up(value, 3);
    out[192] = shuffle(value, 35);
    out[224] = lane_id() < 8 ? reduce_add(value, 0xffu) : reduce_max(value, 0xffffff00u);
    out[256] = bits_of(shuffle_xor(float_of(value), 1));
    out[288] = static_cast<uint32_t>(shuffle(static_cast<uint64_t>(value) << 40, 9) >> 40);
    out[320] = count_bits(value) + 100 * leading_zeros(value) + 10000 * (first_bit(value) + 1);
    sync_warp();
}

// The block that comes last adds up what all blocks counted.
PYROUTE_KERNEL(probe_last_block, 64, 1, ProbeArgs) {
    PYROUTE_SHARED(uint32_t, ticket);
    atomic_add(args.out + 1 + blockIdx.x, threadIdx.x);
    sync_block();
    if (threadIdx.x == 0) {
        fence_device();
        ticket = atomic_add(args.out, 1u);
    }
    sync_block();
    if (ticket != gridDim.x - 1 || threadIdx.x != 0)
        return;
    uint32_t sum = 0;
    for (uint32_t b = 0; b < gridDim.x; ++b)
        sum += args.out[1 + b];
    args.out[0] = sum;
}

// Out of bounds, in each kind of memory.
PYROUTE_KERNEL(probe_bounds, 32, 1, ProbeArgs) {
    PYROUTE_SHARED(uint32_t, one);
    PYROUTE_DYNAMIC_SHARED(dynamic);
    if (threadIdx.x)
        return;
    one = 1;
    if (args.wrong == 1)
        args.out[args.n] = 1;
    if (args.wrong == 2)
        args.out[0] = args.in[args.n];
    if (args.wrong == 3)
        (&one)[args.n] = 2;
    if (args.wrong == 4)
        dynamic[args.n] = 2;
    if (args.wrong == 5)
        load_words(reinterpret_cast<const char *>(args.in) + 4);
    const uint32_t few[4] = {args.in[0], 2, 3, 4};
    const int32_t large = static_cast<int32_t>(args.n);
    switch (args.wrong) {
    case 6:
        args.out[0] = args.in[0] / (args.n - 99);
        break;
    case 7:
        args.out[0] = static_cast<uint32_t>(*reinterpret_cast<const uint64_t *>(args.in + 1));
        break;
    case 8:
        args.out[0] = few[args.n];
        break;
    case 9:
        args.out[0] = 1u << args.n;
        break;
    case 10:
        args.out[0] = static_cast<uint32_t>(large * 100000000);
        break;
    case 11:
        args.out[0] = static_cast<uint32_t>(-float_of(args.n << 23));
        break;
    }
    args.out[0] = reinterpret_cast<uintptr_t>(dynamic) % 1024 + static_cast<uint32_t>(dynamic[0]);
}

// Orders of accesses, right, and with one that is missing.
PYROUTE_KERNEL(probe_races, 64, 1, ProbeArgs) {
    using Row = uint32_t[64];
    using Bytes = uint8_t[64];
    PYROUTE_SHARED(Row, row);
    PYROUTE_SHARED(Bytes, bytes);
    PYROUTE_SHARED(uint32_t, count);
    const uint32_t t = threadIdx.x;
    if (t == 0)
        count = 0;
    row[t] = t;
    bytes[t] = static_cast<uint8_t>(t); // neighbours share words
    if (args.wrong == 1)
        shuffle(t, 0); // orders nothing
    else
        sync_warp();
    uint32_t sum = row[t ^ 1] + bytes[t ^ 2];
    if (args.wrong != 2)
        sync_warp();
    row[t] = sum;
    if (args.wrong != 3)
        sync_block();
    atomic_add(&count, 1u);
    if (args.wrong != 4)
        sync_block();
    sum += count;
    // from each block to the next one, by way of a flag that the last thread to come finds
    uint32_t *flags = args.out + gridDim.x * 64;
    args.out[blockIdx.x * 64 + t] = sum;
    sync_block();
    if (t == 0) {
        if (args.wrong != 5)
            fence_device();
        const uint32_t number = atomic_add(flags, 1u);
        if (number == gridDim.x - 1)
            for (uint32_t i = 0; i < gridDim.x * 64; ++i)
                args.out[i] += 1;
    }
}
