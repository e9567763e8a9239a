// Kernels for tests/cuda/test_emulator_mma.py: one product of a warp, through every word on the way.
#include "cuda/mma.cuh"

using namespace pyroute::cuda;

struct MmaProbeArgs {
    const char *a, *b; // A [16, 32 bytes]; B [8, 32 bytes], or as 2-byte items [16, 8] transposed
    float *out;        // [16, 8]
    uint32_t wrong;
};

// wrong 1: the copies are not waited for; 2: B's addresses are not multiples of 16; 3: half of the warp
template <class Multiply>
PYROUTE_DEVICE void probe_mma(const MmaProbeArgs &args, bool transposed_b, Multiply &&multiply) {
    PYROUTE_DYNAMIC_SHARED(shared);
    char *a = shared, *b = shared + 512;
    const uint32_t lane = lane_id(), row = lane % 16, chunk = lane / 16;
    copy_async_16(a + 16 * lane, args.a + 16 * lane, true);
    copy_async_16(b + 16 * lane, args.b + 16 * lane, lane < 16);
    end_copies();
    if (args.wrong == 1)
        wait_copies<1>();
    else
        wait_copies<0>();
    sync_warp();
    uint32_t fa[4], fb[4];
    load_matrices(fa, a + 32 * row + 16 * chunk);
    if (transposed_b) // 16 rows of 8 items: the two matrices of B, then zeros
        load_matrices_transposed(fb, b + 16 * lane);
    else // 8 rows of two chunks
        load_matrices(fb, b + (lane % 8 * 32 + lane / 8 % 2 * 16) + (args.wrong == 2 ? 4 : 0));
    const uint32_t pair[2] = {fb[0], fb[1]};
    float d[4] = {0, 0, 0, 1000};
    if (args.wrong != 3 || lane < 16)
        multiply(d, fa, pair);
    for (uint32_t i = 0; i < 4; ++i)
        args.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

PYROUTE_KERNEL(probe_mma_bf16, 32, 1, MmaProbeArgs) {
    probe_mma(args, false, [](auto &d, auto &a, auto &b) { mma_bf16(d, a, b); });
}
PYROUTE_KERNEL(probe_mma_bf16_transposed, 32, 1, MmaProbeArgs) {
    probe_mma(args, true, [](auto &d, auto &a, auto &b) { mma_bf16(d, a, b); });
}
PYROUTE_KERNEL(probe_mma_f16, 32, 1, MmaProbeArgs) {
    probe_mma(args, false, [](auto &d, auto &a, auto &b) { mma_f16(d, a, b); });
}
PYROUTE_KERNEL(probe_mma_e4m3, 32, 1, MmaProbeArgs) {
    probe_mma(args, false, [](auto &d, auto &a, auto &b) { mma_fp8<false, false>(d, a, b); });
}
PYROUTE_KERNEL(probe_mma_e5m2, 32, 1, MmaProbeArgs) {
    probe_mma(args, false, [](auto &d, auto &a, auto &b) { mma_fp8<true, false>(d, a, b); });
}
PYROUTE_KERNEL(probe_mma_e4m3_e5m2, 32, 1, MmaProbeArgs) {
    probe_mma(args, false, [](auto &d, auto &a, auto &b) { mma_fp8<false, true>(d, a, b); });
}
PYROUTE_KERNEL(probe_mma_e5m2_e5m2, 32, 1, MmaProbeArgs) {
    probe_mma(args, false, [](auto &d, auto &a, auto &b) { mma_fp8<true, true>(d, a, b); });
}
