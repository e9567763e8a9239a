// Kernels for tests/cuda/test_emulator_sm90.py: the steps of a Hopper kernel one by one, and the same with bugs
// planted.
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/wgmma.cuh"

using namespace pyroute::cuda;

struct TileProbeArgs {
    TensorMap from, to; // boxes of 128 bytes x 64 rows
    uint32_t *out;
    int32_t x, y;
    uint32_t wrong; // which bug
};

constexpr uint32_t tile_bytes = 64 * 128;

// A tile to shared memory, as it lies there to `out`, and back through the other map.
PYROUTE_KERNEL(probe_tile, 64, 1, TileProbeArgs) {
    PYROUTE_DYNAMIC_SHARED(shared);
    const SharedAddress tile = shared_address(shared), barrier = tile + tile_bytes;
    if (threadIdx.x == 0 && args.wrong != 1) {
        barrier_init(barrier, args.wrong == 2 ? 2 : 1);
        if (args.wrong != 3)
            barrier_init_fence();
    }
    sync_block();
    if (threadIdx.x == 0) {
        barrier_arrive_expecting(barrier, tile_bytes + (args.wrong == 4) * 16 - (args.wrong == 5) * 16);
        load_tile(tile + (args.wrong == 6) * 64, &args.from, args.x, args.y, barrier);
        if (args.wrong == 7)
            barrier_arrive(barrier);
    }
    if (args.wrong != 8)
        while (!barrier_try_wait(barrier, args.wrong == 9)) {
        }
    for (uint32_t i = threadIdx.x; i < tile_bytes / 4; i += blockDim.x)
        args.out[i] = reinterpret_cast<const uint32_t *>(shared)[i];
    for (uint32_t i = threadIdx.x; i < tile_bytes / 4; i += blockDim.x)
        set_shared_u32(tile + 4 * i, args.out[i] + 1);
    if (args.wrong != 10)
        fence_shared_for_copies();
    sync_threads(1, 64);
    if (threadIdx.x == 0) {
        store_tile(&args.to, args.x, args.y, tile);
        commit_stores();
        if (args.wrong != 11)
            wait_stores_read();
    }
}

struct ProductProbeArgs {
    TensorMap a, b; // boxes of 128 bytes x 64 rows
    float *out;     // [64, 128]
    uint32_t wrong;
};

// Four products, 128 bytes deep: A [64, 128 bytes], B [128, 128 bytes], or both bfloat16 [64 deep, 64 or 128].
template <bool Fp8, bool Transposed> PYROUTE_DEVICE void probe_product(const ProductProbeArgs &args) {
    PYROUTE_DYNAMIC_SHARED(shared);
    const SharedAddress a = shared_address(shared), b = a + tile_bytes, barrier = b + 2 * tile_bytes;
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_init_fence();
    }
    sync_block();
    if (threadIdx.x == 0) {
        barrier_arrive_expecting(barrier, 3 * tile_bytes);
        load_tile(a, &args.a, 0, 0, barrier);
        load_tile(b, &args.b, 0, 0, barrier);
        load_tile(b + tile_bytes, &args.b, Transposed ? 64 : 0, Transposed ? 0 : 64, barrier);
    }
    while (!barrier_try_wait(barrier, 0)) {
    }
    if (args.wrong == 6)
        set_shared_u32(a, 0);
    float d[64];
    const auto descriptor = [&](SharedAddress start) {
        return uint64_t{(start & 0x3ffff) >> 4} | uint64_t{tile_bytes >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
               uint64_t{1} << (args.wrong == 1 ? 63 : 62);
    };
    if (args.wrong != 2)
        matrix_fence();
    for (uint32_t step = 0; step < 4; ++step) {
        const uint32_t offset = Transposed ? 16 * 128 * step : 32 * step;
        const bool other = (args.wrong == 3 && lane_id() == 7) || (args.wrong == 5 && warp_id() == 3);
        const uint64_t start_b = descriptor(b + (Transposed ? 16 * 128 : 32) * (step ^ other));
        if constexpr (Fp8)
            multiply_fp8<false, false>(d, descriptor(a + offset), start_b, step != 0);
        else
            multiply_bf16<Transposed, Transposed>(d, descriptor(a + offset), start_b, step != 0);
    }
    matrix_commit();
    if (args.wrong != 4)
        matrix_wait<0>();
    const uint32_t row = warp_id() * 16 + lane_id() / 4, col = lane_id() % 4 * 2;
    for (uint32_t i = 0; i < 64; ++i)
        args.out[(row + (i & 2) * 4) * 128 + i / 4 * 8 + col + (i & 1)] = d[i];
}

PYROUTE_KERNEL(probe_product_e4m3, 128, 1, ProductProbeArgs) { probe_product<true, false>(args); }
PYROUTE_KERNEL(probe_product_bf16, 128, 1, ProductProbeArgs) { probe_product<false, false>(args); }
PYROUTE_KERNEL(probe_product_bf16_transposed, 128, 1, ProductProbeArgs) { probe_product<false, true>(args); }

// Blocks of a cluster: each loads a part of the tile for all, and says when it is done with it.
PYROUTE_KERNEL(probe_cluster, 64, 1, TileProbeArgs) {
    PYROUTE_DYNAMIC_SHARED(shared);
    const SharedAddress tile = shared_address(shared), full = tile + 2 * tile_bytes, empty = full + 8;
    const uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(empty, 2);
        barrier_init_fence();
    }
    if (args.wrong == 1)
        sync_block();
    else
        sync_cluster();
    for (uint32_t round = 0; round < 3; ++round) {
        if (threadIdx.x == 0) {
            while (!barrier_try_wait(empty, (round & 1) ^ 1)) {
            }
            barrier_arrive_expecting(full, 2 * tile_bytes);
            load_tile_to(tile + rank * tile_bytes, &args.from, args.x, static_cast<int32_t>(64 * rank), full, 3);
        }
        while (!barrier_try_wait(full, round & 1)) {
        }
        sync_block();
        for (uint32_t i = threadIdx.x; i < 2 * tile_bytes / 4; i += blockDim.x)
            args.out[blockIdx.x * 2 * tile_bytes / 4 + i] = reinterpret_cast<const uint32_t *>(shared)[i];
        sync_threads(2, 64);
        if (threadIdx.x < 2)
            barrier_arrive_at(empty, threadIdx.x);
    }
    if (args.wrong != 3)
        sync_cluster(); // no block exits before its peer has signalled it
}

struct RegistersProbeArgs {
    uint32_t *out;
    uint32_t wrong;
};

PYROUTE_KERNEL(probe_registers, 384, 1, RegistersProbeArgs) {
    if (warp_id() >= 8) {
        if (args.wrong == 1)
            give_registers<48>();
        else
            give_registers<40>();
    } else if (args.wrong == 2)
        take_registers<160>();
    else if (args.wrong == 3 && warp_id() == 6)
        take_registers<224>();
    else
        take_registers<232>();
    if (elect_lane())
        atomic_add(args.out, 1u);
}
