// A few rows times a run of an expert's columns, weights straight from memory to registers.
//
// The contract is that of scalar/grouped_gemm.cpp: blocks of 128, eight lanes, fused multiply-adds from +0 in a block,
// total = fma(partial, scale, total), lanes summed 4, 2, 1 apart.
//
// Plan for several rows: block by block of the contraction they are widened (at most 4 KiB) and every column of the run
// passes by, some columns at a time, each weight widened once for all rows. The totals (at most 16 KiB) wait in L1.
// What the thread will read next is fetched line by line meanwhile.
//
// Plan for one row: it is widened first, up to 4096 elements so that they take half of L1, and each column is read
// alone, 512 bytes of it abreast: four blocks of FP8, two of bfloat16, one of float32, whose sums overlap all the same
// since no block waits for another (one Zen 4 core, GB/s: 28; two columns side by side 11). Of longer rows a column is
// read in several runs with the other columns between them, and runs of 4 KiB that begin anywhere lose the hardware's
// prefetchers: loads alone get 12 GB/s where they get 35 from end to end. So here too what the thread will read next is
// fetched, into L2 and in the order of memory, whatever the order of use. Two threads, FP8, GB/s without and with it:
// 26 and 30 for K = 4096, 13 and 29 for 7168, 13 and 27 for 16384 (AVX2 28 and 31, 12 and 29, 12 and 28); bfloat16 14
// and 31 for 7168. Into L1 instead: 17, past the caches: 16. Lost: one run of up to 8192 or 16384 (14 and 11, with
// prefetches within the column 16 and 15), runs of 2048 (as fast), tasks of half or twice the size (as fast or slower).
// Float32 and bfloat16 in one run are not fetched: 5 to 10 % slower. Four blocks of float32 abreast, 2 KiB: 18 (AVX2
// 15), of bfloat16 26; eight of FP8 17. Two rows in this way: as fast as block by block with AVX2, 10 % slower with
// AVX-512.
#include "cpu/grouped_gemm_decode.h"

#include "cpu/scalar/grouped_gemm_pack.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

constexpr int lanes = 8;
constexpr int run_blocks = 32; // of the contraction: 4096 elements of a row are half of L1
constexpr int bytes_abreast = 512;

// Powers of two that rows are multiplied by; what undoes it in sums, and in rows. See Shifted.
struct Powers {
    float power, undo, restore;
};

// Whole blocks of the contraction for one row, whose columns are read one after another.
struct Run {
    int num_blocks;
    alignas(64) float x[run_blocks * panel_depth];  // AVX-512 FP8: two blocks side by side, step by step
    float x_scales[run_blocks], scales[run_blocks]; // the row's; times the column's
    Powers powers;
};

// One block of the contraction for all columns of a call.
struct Block {
    const void *y; // weights of the first column
    int64_t y_stride;
    int length, num_cols;
    Powers powers;
    const char *next; // null: nothing
    alignas(64) float x[decode_rows][panel_depth];
#if defined(__AVX512VBMI__)
    alignas(64) float x_twice[decode_rows][2 * panel_depth]; // every step beside itself
#endif
    float x_scales[decode_rows];
    float y_scales[decode_totals];
    alignas(64) float totals[decode_totals][lanes];
    Run run;
};

// Two columns lie side by side, so that a register of sixteen lanes holds both.
constexpr int total_index(int col, int row, int rows) { return (col / 2 * rows + row) * 2 + col % 2; }

// The lines of what comes next, one for each line of what is read, in the order of memory.
PYROUTE_INLINE void fetch_next(Block &b, int64_t bytes) {
    if (!b.next)
        return;
    for (int64_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(b.next + line, 0, 2);
    b.next += bytes;
}

template <class Type> struct Exact {
    using Storage = typename Type::Storage;
    PYROUTE_INLINE f32x8 row(const Block &b, int i, int k) { return load<f32x8>(&b.x[i][k]); }
    PYROUTE_INLINE f32x8 widen(const Storage *from) { return load_elements<Type>(from); }
    PYROUTE_INLINE f32x8 widen(const Storage *from, int count) { return load_elements<Type>(from, count); }
    PYROUTE_INLINE f32x8 finish(const Block &, const f32x8 &partial) { return partial; }
    PYROUTE_INLINE f32x8 finish(const Run &, const f32x8 &partial) { return partial; }
};

template <class Weights, int rows, int cols> PYROUTE_INLINE void multiply_columns(Block &b, int col) {
    const auto *y = static_cast<const typename Weights::Storage *>(b.y) + col * b.y_stride;
    f32x8 partial[cols][rows];
#pragma GCC unroll 12
    for (int j = 0; j < cols; ++j)
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i)
            partial[j][i] = f32x8{};
    int k = 0;
    for (; k + lanes <= b.length; k += lanes)
#pragma GCC unroll 12
        for (int j = 0; j < cols; ++j) {
            const f32x8 weights = Weights::widen(y + j * b.y_stride + k);
#pragma GCC unroll 12
            for (int i = 0; i < rows; ++i)
                partial[j][i] = fma(Weights::row(b, i, k), weights, partial[j][i]);
        }
    if (k < b.length)
#pragma GCC unroll 12
        for (int j = 0; j < cols; ++j) {
            const f32x8 weights = Weights::widen(y + j * b.y_stride + k, b.length - k);
#pragma GCC unroll 12
            for (int i = 0; i < rows; ++i)
                partial[j][i] = fma(Weights::row(b, i, k), weights, partial[j][i]);
        }
#pragma GCC unroll 12
    for (int j = 0; j < cols; ++j)
#pragma GCC unroll 12
        for (int i = 0; i < rows; ++i) {
            float *total = b.totals[total_index(col + j, i, rows)];
            const f32x8 scale = broadcast<f32x8>(b.y_scales[col + j] * b.x_scales[i]);
            store(total, fma(Weights::finish(b, partial[j][i]), scale, load<f32x8>(total)));
        }
}

constexpr int columns_at_once(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

template <class Type, int rows> struct ExactBlock {
    static void multiply(Block &b) {
        constexpr int cols = columns_at_once(rows), size = sizeof(typename Type::Storage);
        int col = 0;
        for (; col + cols <= b.num_cols; col += cols) {
            fetch_next(b, cols * b.length * size);
            multiply_columns<Exact<Type>, rows, cols>(b, col);
        }
        for (; col < b.num_cols; ++col)
            multiply_columns<Exact<Type>, rows, 1>(b, col);
    }
};

// Some blocks of a column abreast, since their sums do not depend on each other; they join the total in their order.
template <class Weights, int blocks>
PYROUTE_INLINE void add_blocks(const Run &r, const typename Weights::Storage *y, int first, f32x8 &total) {
    const float *x = r.x + first * panel_depth;
    y += first * panel_depth;
    f32x8 partial[blocks] = {};
#pragma GCC unroll 2
    for (int k = 0; k < panel_depth; k += lanes)
#pragma GCC unroll 4
        for (int j = 0; j < blocks; ++j)
            partial[j] = fma(load<f32x8>(x + j * panel_depth + k), Weights::widen(y + j * panel_depth + k), partial[j]);
#pragma GCC unroll 4
    for (int j = 0; j < blocks; ++j)
        total = fma(Weights::finish(r, partial[j]), broadcast<f32x8>(r.scales[first + j]), total);
}

template <class Type> struct ExactRun {
    using Storage = typename Type::Storage;
    static bool place(Run &) { return true; }
    template <int blocks>
    PYROUTE_INLINE void add(const ExactRun &, const Run &r, const Storage *y, int first, f32x8 &total) {
        add_blocks<Exact<Type>, blocks>(r, y, first, total);
    }
};

} // namespace
} // namespace pyroute::cpu::PYROUTE_ISA

#if defined(__AVX512VBMI__)
#include "cpu/avx512/grouped_gemm_decode_fp8.h"
#elif defined(__AVX2__)
#include "cpu/avx2/grouped_gemm_decode_fp8.h"
#endif

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

using MultiplyBlock = void (*)(Block &);

template <template <class, int> class Kernel, class Type> MultiplyBlock by_rows(int64_t num_rows) {
    constexpr MultiplyBlock all[decode_rows] = {
        Kernel<Type, 1>::multiply, Kernel<Type, 2>::multiply, Kernel<Type, 3>::multiply, Kernel<Type, 4>::multiply,
        Kernel<Type, 5>::multiply, Kernel<Type, 6>::multiply, Kernel<Type, 7>::multiply, Kernel<Type, 8>::multiply};
    return all[num_rows - 1];
}

#if defined(__AVX512VBMI__)
template <class Format> MultiplyBlock fp8_by_rows(int64_t num_rows) { return by_rows<TableBlock, Format>(num_rows); }
#elif defined(__AVX2__)
template <class Format> MultiplyBlock fp8_by_rows(int64_t num_rows) { return by_rows<ShiftedBlock, Format>(num_rows); }
#else
template <class Format> MultiplyBlock fp8_by_rows(int64_t num_rows) {
    return by_rows<ExactBlock, Fp8<Format>>(num_rows);
}
#endif

MultiplyBlock multiply_block_of(ElementType type, int64_t num_rows) {
    switch (type) {
    case ElementType::float32:
        return by_rows<ExactBlock, Float32>(num_rows);
    case ElementType::bfloat16:
        return by_rows<ExactBlock, Bfloat16>(num_rows);
    case ElementType::e4m3:
        return fp8_by_rows<E4m3>(num_rows);
    default:
        return fp8_by_rows<E5m2>(num_rows);
    }
}

struct RunKernel {
    bool (*place)(Run &); // the row, widened, to the kernel's order; false: unchanged and not for this kernel
    void (*multiply)(Block &, const PanelSource &y, int64_t first_col, int64_t depth);
};

PYROUTE_INLINE void column_scales(Run &r, const PanelSource &y, int64_t col, int64_t depth) {
    const float *scales = y.keeps_scales ? row_scales(y, col) : nullptr;
    for (int i = 0; i < r.num_blocks; ++i)
        r.scales[i] = (scales ? scales[(depth + i * panel_depth) / y.block_cols] : 1.0f) * r.x_scales[i];
}

template <class Kernel> void multiply_run(Block &b, const PanelSource &s, int64_t first_col, int64_t depth) {
    Run &r = b.run;
    const Kernel kernel{};
    constexpr int abreast = bytes_abreast / (panel_depth * static_cast<int>(sizeof(typename Kernel::Storage)));
    const auto *y = static_cast<const typename Kernel::Storage *>(b.y);
    int64_t same_scales = 0;
    for (int col = 0; col < b.num_cols; ++col, --same_scales, y += b.y_stride) {
        if (same_scales == 0) {
            column_scales(r, s, first_col + col, depth);
            same_scales =
                s.keeps_scales ? s.block_rows - (s.first_block_row + first_col + col) % s.block_rows : b.num_cols;
        }
        f32x8 total = load<f32x8>(b.totals[col]);
        int i = 0;
        for (; i + abreast <= r.num_blocks; i += abreast) {
            fetch_next(b, bytes_abreast);
            Kernel::template add<abreast>(kernel, r, y, i, total);
        }
        fetch_next(b, (r.num_blocks - i) * (bytes_abreast / abreast));
        switch (r.num_blocks - i) {
        case 3:
            Kernel::template add<3>(kernel, r, y, i, total);
            break;
        case 2:
            Kernel::template add<2>(kernel, r, y, i, total);
            break;
        case 1:
            Kernel::template add<1>(kernel, r, y, i, total);
        }
        store(b.totals[col], total);
    }
}

template <class Kernel> RunKernel run_kernel() { return {Kernel::place, multiply_run<Kernel>}; }

#if defined(__AVX512VBMI__)
template <class Format> using Fp8Run = TableRun<Format>;
#elif defined(__AVX2__)
template <class Format> using Fp8Run = ShiftedRun<Format>;
#else
template <class Format> using Fp8Run = ExactRun<Fp8<Format>>;
#endif

// `exact`: takes every row.
RunKernel run_kernel_of(ElementType type, bool exact) {
    switch (type) {
    case ElementType::float32:
        return run_kernel<ExactRun<Float32>>();
    case ElementType::bfloat16:
        return run_kernel<ExactRun<Bfloat16>>();
    case ElementType::e4m3:
        return exact ? run_kernel<ExactRun<Fp8<E4m3>>>() : run_kernel<Fp8Run<E4m3>>();
    default:
        return exact ? run_kernel<ExactRun<Fp8<E5m2>>>() : run_kernel<Fp8Run<E5m2>>();
    }
}

// Scales of matrix rows [first, first + count) in one block of the contraction.
void row_block_scales(const PanelSource &s, int64_t first, int count, int64_t block, float *to) {
    if (!s.keeps_scales) {
        for (int i = 0; i < count; ++i)
            to[i] = 1.0f;
        return;
    }
    const float *scale = row_scales(s, first) + block * panel_depth / s.block_cols;
    int64_t left = s.block_rows - (s.first_block_row + first) % s.block_rows;
    for (int i = 0; i < count; scale += s.scale_stride, left = s.block_rows)
        for (const int end = left < count - i ? i + static_cast<int>(left) : count; i < end; ++i)
            to[i] = *scale;
}

using WidenRows = void (*)(const PanelSource &s, int num_rows, int64_t depth, int length, float (*to)[panel_depth]);

template <class Type, bool multiply_scales>
void widen_rows(const PanelSource &s, int num_rows, int64_t depth, int length, float (*to)[panel_depth]) {
    for (int i = 0; i < num_rows; ++i)
        pack_row<Type, multiply_scales>(s, i, depth, length, to[i]);
}

WidenRows widen_rows_of(const PanelSource &s) {
    const bool multiply_scales = s.scales && !s.keeps_scales;
    switch (s.type) {
    case ElementType::float32:
        return widen_rows<Float32, false>;
    case ElementType::bfloat16:
        return widen_rows<Bfloat16, false>;
    case ElementType::e4m3:
        return multiply_scales ? widen_rows<Fp8<E4m3>, true> : widen_rows<Fp8<E4m3>, false>;
    default:
        return multiply_scales ? widen_rows<Fp8<E5m2>, true> : widen_rows<Fp8<E5m2>, false>;
    }
}

void write_totals(const Block &b, const DecodeProduct &p, int64_t first_col) {
    const auto rows = static_cast<int>(p.num_rows);
    for (int i = 0; i < rows; ++i)
        for (int col = 0; col < b.num_cols; col += lanes) {
            const int count = smaller(b.num_cols - col, lanes);
            f32x8 value = {};
            for (int j = 0; j < count; ++j)
                value[j] = sum_lanes(load<f32x8>(b.totals[total_index(col + j, i, rows)]));
            const int64_t at = i * p.out_stride + first_col + col;
            if (p.out_type == ElementType::bfloat16)
                store_elements<Bfloat16>(static_cast<uint16_t *>(p.out) + at, value, count);
            else
                store_elements<Float32>(static_cast<float *>(p.out) + at, value, count);
        }
}

void multiply_run(Block &b, const DecodeProduct &p, int64_t first_col, int64_t depth, WidenRows widen_rows) {
    Run &r = b.run;
    r.num_blocks = smaller((p.x.length - depth) / panel_depth, run_blocks);
    widen_rows(p.x, 1, depth, r.num_blocks * panel_depth, reinterpret_cast<float (*)[panel_depth]>(r.x));
    for (int i = 0; i < r.num_blocks; ++i)
        row_block_scales(p.x, 0, 1, depth / panel_depth + i, &r.x_scales[i]);
    RunKernel kernel = run_kernel_of(p.y.type, false);
    if (!kernel.place(r))
        kernel = run_kernel_of(p.y.type, true);
    kernel.multiply(b, p.y, first_col, depth);
}

void multiply_block(Block &b, const DecodeProduct &p, int64_t first_col, int64_t depth, WidenRows widen_rows) {
    const auto rows = static_cast<int>(p.num_rows);
    const int64_t block = depth / panel_depth;
    b.length = smaller(p.x.length - depth, panel_depth);
    widen_rows(p.x, rows, depth, b.length, b.x);
    row_block_scales(p.x, 0, rows, block, b.x_scales);
    row_block_scales(p.y, first_col, b.num_cols, block, b.y_scales);
    multiply_block_of(p.y.type, p.num_rows)(b);
}

void multiply(const DecodeProduct &p, int64_t first_col, int64_t num_cols, const char *next) {
    Block b;
    b.num_cols = static_cast<int>(num_cols);
    b.y_stride = p.y.stride;
    const bool in_order = p.num_rows == 1 && p.x.length <= run_blocks * panel_depth; // the hardware knows what is next
    b.next = in_order && item_size(p.y.type) > 1 ? nullptr : next;
    memset(b.totals, 0, sizeof(b.totals[0]) * static_cast<size_t>((num_cols + num_cols % 2) * p.num_rows));
    const auto widen_rows = widen_rows_of(p.x);
    const char *y = static_cast<const char *>(p.y.data) + first_col * p.y.stride * item_size(p.y.type);
    for (int64_t depth = 0; depth < p.x.length;) {
        b.y = y + depth * item_size(p.y.type);
        if (p.num_rows == 1 && p.x.length - depth >= panel_depth) {
            multiply_run(b, p, first_col, depth, widen_rows);
            depth += b.run.num_blocks * panel_depth;
        } else {
            multiply_block(b, p, first_col, depth, widen_rows);
            depth += panel_depth;
        }
    }
    write_totals(b, p, first_col);
}

} // namespace

const GroupedGemmDecodeKernels grouped_gemm_decode_kernels = {multiply};

} // namespace pyroute::cpu::PYROUTE_ISA
