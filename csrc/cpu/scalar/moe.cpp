// Activation between the two GEMMs, forward and backward, and the experts' biases.
//
//   forward    z = row + bias; h = act(z) * weight: one read of [R, P], one write of [R, I].
//   backward   recomputes z and h from the saved rows (cheaper than keeping [R, I]: one exp per pair), writes the
//              gradient of the rows, the hidden rows that wgrad multiplies, and the gradient of the row weight.
//   biases     gradients are float64 sums over the expert's rows in row order, rounded once.
//
// Gated activations are a * sigmoid(v(a)) * (b + c), v = alpha a (swish) or 2 sqrt(2/pi) (a + 0.044715 a^3): the tanh
// form of GELU, since (1 + tanh y) / 2 = sigmoid(2 y). pyroute/_array/moe.py is the same program in NumPy, operation by
// operation, so the bytes agree. sigmoid and its slope come from e = exp(-|v|), which neither overflows nor cancels.
// Cost per 8 elements on one Zen 4 core, AVX2 and AVX-512 alike: forward 6.3 ns, backward 10 (bfloat16 rows 8.6 and
// 15), under 1 % of a layer. It is one chain of 30 dependent operations, so the schedulers' size is what limits it.
#include "cpu/moe.h"
#include "cpu/elementary.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

// What is compiled: a clamp that is infinite clamps nothing and is left out.
enum class Form { swish, clamped_swish, gelu, relu2 };
template <Form form> struct Constant {
    static constexpr Form value = form;
};

// GCC leaves large lambdas out of line, and the count of a whole vector is then a variable: 37 ns for 11.
#define PYROUTE_LAMBDA __attribute__((always_inline))

PYROUTE_INLINE f32x8 canonical_nan(const f32x8 &v) {
    const u32x8 quiet = u32x8{} + 0x7fc00000u;
#if defined(__AVX2__)
    const __m256 lanes = bit_cast<__m256>(v);
    return bit_cast<f32x8>(_mm256_blendv_ps(lanes, bit_cast<__m256>(quiet), _mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q)));
#else
    return select(less(i32x8{} + 0x7f800000, bit_cast<i32x8>(v) & 0x7fffffff), bit_cast<f32x8>(quiet), v);
#endif
}
// By the sign bit of each lane.
PYROUTE_INLINE f32x8 by_sign(const f32x8 &sign, const f32x8 &negative, const f32x8 &positive) {
#if defined(__AVX2__)
    return bit_cast<f32x8>(
        _mm256_blendv_ps(bit_cast<__m256>(positive), bit_cast<__m256>(negative), bit_cast<__m256>(sign)));
#else
    return select(bit_cast<i32x8>(sign) >> 31, negative, positive);
#endif
}
// To bfloat16, NaN canonical.
PYROUTE_INLINE u16x8 rounded_to_bf16(const f32x8 &v) {
    const u32x8 bits = bit_cast<u32x8>(canonical_nan(v));
    const u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#if defined(__AVX512VL__)
    return bit_cast<u16x8>(_mm256_cvtepi32_epi16(bit_cast<__m256i>(rounded)));
#elif defined(__AVX2__) // two instructions where GCC 12 makes nine of the conversion
    const __m256i lanes = bit_cast<__m256i>(rounded);
    return bit_cast<u16x8>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08)));
#else
    return __builtin_convertvector(rounded, u16x8);
#endif
}

// The first `count` <= 8 items, the other lanes +0; never touches memory past the count.
PYROUTE_INLINE f32x8 load_row(const float *from, int count) {
    return count == 8 ? load<f32x8>(from) : load_partial(from, count, 0.0f);
}
PYROUTE_INLINE f32x8 load_row(const uint16_t *from, int count) {
    u16x8 bits{};
    memcpy(&bits, from, sizeof(uint16_t) * static_cast<size_t>(count));
    return bf16_to_f32(bits);
}
PYROUTE_INLINE void store_row(float *to, const f32x8 &v, int count) { store_partial(to, canonical_nan(v), count); }
PYROUTE_INLINE void store_row(uint16_t *to, const f32x8 &v, int count) {
    const u16x8 bits = rounded_to_bf16(v);
    memcpy(to, &bits, sizeof(uint16_t) * static_cast<size_t>(count));
}
template <class Row> PYROUTE_INLINE void zero_row(Row *to, int64_t count) {
    memset(to, 0, sizeof(Row) * static_cast<size_t>(count));
}

PYROUTE_INLINE bool has_bias(const ExpertBias &bias) { return bias.f32 || bias.bf16; }
PYROUTE_INLINE f32x8 load_bias(const ExpertBias &bias, int64_t at, int count) {
    return bias.f32 ? load_row(bias.f32 + at, count) : load_row(bias.bf16 + at, count);
}

// Calls step(i, 8) over whole vectors, then step(i, rest).
template <class Step> PYROUTE_INLINE void for_lanes(int64_t count, Step &&step) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        step(i, 8);
    if (i < count)
        step(i, static_cast<int>(count - i));
}

// Calls body(row, expert) in row order; the expert is -1 on padding rows and past the last segment.
template <class Body>
PYROUTE_INLINE void for_rows(const ExpertRows &experts, int64_t row_begin, int64_t row_end, Body &&body) {
    int64_t low = 0, high = experts.num_experts; // the first expert whose segment ends after row_begin
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (experts.expert_offsets[middle + 1] > row_begin)
            high = middle;
        else
            low = middle + 1;
    }
    for (int64_t row = row_begin; row < row_end; ++row) {
        while (low < experts.num_experts && experts.expert_offsets[low + 1] <= row)
            ++low;
        body(row, low < experts.num_experts && experts.row_to_token[row] >= 0 ? low : int64_t{-1});
    }
}

// The activation at one point: its value, both partial derivatives, and where the clip makes them zero.
struct Point {
    f32x8 hidden, d_gate, d_up;
    i32x8 gate_clipped, up_clipped;
};

// exp_lanes of x <= 0 or NaN.
PYROUTE_INLINE f32x8 exp_of_negative(const f32x8 &x) {
#if defined(__AVX512VL__)
    return scale_by_power(exp_parts(larger(broadcast<f32x8>(Elementary<float>::exp_min), x)));
#elif defined(__AVX2__)
    const f32x8 normal = broadcast<f32x8>(Elementary<float>::exp_normal);
    if (_mm256_movemask_ps(_mm256_cmp_ps(bit_cast<__m256>(x), bit_cast<__m256>(normal), _CMP_NGE_UQ)) == 0)
        return exp_normal_lanes(x);
    return exp_lanes(x);
#else
    return exp_lanes(x);
#endif
}

template <Form form> PYROUTE_INLINE Point evaluate(const ActivationProgram &program, f32x8 gate, f32x8 up) {
    Point p{};
    if constexpr (form == Form::relu2) {
        const f32x8 positive = larger(f32x8{}, gate); // NaN stays, and so does -0
        p.hidden = positive * positive;
        p.d_gate = positive + positive;
        return p;
    }
    f32x8 v, gate_slope; // gate_slope: gate * dv/dgate
    if constexpr (form == Form::gelu) {
        const f32x8 square = gate * gate;
        v = gate * (square * 0.0713548162726f + 1.5957691216057308f);
        gate_slope = gate * (square * (3.0f * 0.0713548162726f) + 1.5957691216057308f);
    } else {
        if constexpr (form == Form::clamped_swish) {
            const f32x8 limit = broadcast<f32x8>(program.limit);
            p.gate_clipped = less(limit, gate);
            p.up_clipped = less(limit, up) | less(up, -limit);
            gate = smaller(limit, gate);
            up = larger(-limit, smaller(limit, up));
        }
        v = gate * program.alpha;
        gate_slope = v;
    }
    const f32x8 one = broadcast<f32x8>(1.0f);
    const f32x8 e = exp_of_negative(bit_cast<f32x8>(bit_cast<u32x8>(v) | 0x80000000u)); // of -0 and +0 it is 1
    const f32x8 reciprocal = one / (e + one);
    const f32x8 sigmoid = by_sign(v, e, one) * reciprocal;
    const f32x8 slope = sigmoid * (by_sign(v, one, e) * reciprocal); // sigmoid (1 - sigmoid)
    const f32x8 most = broadcast<f32x8>(1e3f); // beyond it the slope is exactly 0, and inf * 0 would be NaN
    gate_slope = larger(-most, smaller(most, gate_slope));
    const f32x8 factor = up + program.up_offset;
    const f32x8 activated = gate * sigmoid;
    p.hidden = activated * factor;
    p.d_gate = factor * (gate_slope * slope + sigmoid);
    p.d_up = activated;
    return p;
}

template <class Row, Form form> struct PreActivations {
    static constexpr bool gated = form != Form::relu2;
    const Row *gate, *up; // of this row
    const ExpertBias bias;
    int64_t bias_gate, bias_up; // where this expert's biases begin

    PYROUTE_INLINE PreActivations at(const ActivationArgs<Row> &args, int64_t row, int64_t expert) {
        const int64_t inner = args.intermediate, width = gated ? 2 * inner : inner;
        const Row *begin = args.gate_up + row * width;
        return {begin, begin + inner, args.bias, expert * width, expert * width + inner};
    }
    PYROUTE_INLINE Point point(const PreActivations &z, const ActivationProgram &program, int64_t i, int count) {
        f32x8 a = load_row(z.gate + i, count), b{};
        if constexpr (gated)
            b = load_row(z.up + i, count);
        if (has_bias(z.bias)) {
            a = a + load_bias(z.bias, z.bias_gate + i, count);
            if constexpr (gated)
                b = b + load_bias(z.bias, z.bias_up + i, count);
        }
        return evaluate<form>(program, a, b);
    }
};

template <Form form, class Row>
void activate_rows(const ExpertRows &experts, const ActivationArgs<Row> &args, int64_t row_begin, int64_t row_end) {
    using Pre = PreActivations<Row, form>;
    const ActivationProgram program = args.program;
    for_rows(experts, row_begin, row_end, [&](int64_t row, int64_t expert) {
        Row *hidden = args.hidden + row * args.intermediate;
        if (expert < 0)
            return zero_row(hidden, args.intermediate);
        const Pre z = Pre::at(args, row, expert);
        const float weight = args.row_weights ? args.row_weights[row] : 1.0f;
        for_lanes(args.intermediate, [&](int64_t i, int count) PYROUTE_LAMBDA {
            store_row(hidden + i, Pre::point(z, program, i, count).hidden * weight, count);
        });
    });
}

template <Form form, class Row>
void activate_backward_rows(const ExpertRows &experts, const ActivationBackwardArgs<Row> &args, int64_t row_begin,
                            int64_t row_end) {
    using Pre = PreActivations<Row, form>;
    const ActivationArgs<Row> &forward = args.forward;
    const ActivationProgram program = forward.program;
    const int64_t inner = forward.intermediate, width = Pre::gated ? 2 * inner : inner;
    for_rows(experts, row_begin, row_end, [&](int64_t row, int64_t expert) {
        Row *hidden = forward.hidden + row * inner, *grad_gate = args.grad_gate_up + row * width;
        if (expert < 0) {
            zero_row(hidden, inner);
            zero_row(grad_gate, width);
            if (args.grad_row_weights)
                args.grad_row_weights[row] = 0.0f;
            return;
        }
        const Pre z = Pre::at(forward, row, expert);
        const Row *grad_hidden = args.grad_hidden + row * inner;
        const float weight = forward.row_weights ? forward.row_weights[row] : 1.0f;
        f32x8 dot{};
        for_lanes(inner, [&](int64_t i, int count) PYROUTE_LAMBDA {
            const Point p = Pre::point(z, program, i, count);
            const f32x8 grad = load_row(grad_hidden + i, count), weighted = grad * weight;
            dot = dot + grad * p.hidden;
            store_row(hidden + i, p.hidden * weight, count);
            f32x8 by_gate = weighted * p.d_gate, by_up = weighted * p.d_up;
            if constexpr (form == Form::clamped_swish) {
                by_gate = select(p.gate_clipped, f32x8{}, by_gate);
                by_up = select(p.up_clipped, f32x8{}, by_up);
            }
            store_row(grad_gate + i, by_gate, count);
            if constexpr (Pre::gated)
                store_row(grad_gate + inner + i, by_up, count);
        });
        if (args.grad_row_weights)
            args.grad_row_weights[row] = canonical_nan(broadcast<f32x8>(sum_lanes(dot)))[0];
    });
}

// The program's compiled form as a constant.
template <class Body> PYROUTE_INLINE void with_form(const ActivationProgram &program, Body &&body) {
    switch (program.kind) {
    case ActivationProgram::swish_gate:
        if (program.limit == __builtin_huge_valf())
            return body(Constant<Form::swish>{});
        return body(Constant<Form::clamped_swish>{});
    case ActivationProgram::gelu_gate:
        return body(Constant<Form::gelu>{});
    case ActivationProgram::relu2:
        return body(Constant<Form::relu2>{});
    }
}

template <class Row>
void activate(const ExpertRows &experts, const ActivationArgs<Row> &args, int64_t row_begin, int64_t row_end) {
    with_form(args.program, [&](auto form) { activate_rows<form.value>(experts, args, row_begin, row_end); });
}

template <class Row>
void activate_backward(const ExpertRows &experts, const ActivationBackwardArgs<Row> &args, int64_t row_begin,
                       int64_t row_end) {
    with_form(args.forward.program,
              [&](auto form) { activate_backward_rows<form.value>(experts, args, row_begin, row_end); });
}

template <class Row>
void add_bias(const ExpertRows &experts, const AddBiasArgs<Row> &args, int64_t row_begin, int64_t row_end) {
    for_rows(experts, row_begin, row_end, [&](int64_t row, int64_t expert) {
        if (expert < 0)
            return;
        Row *to = args.rows + row * args.columns;
        const float weight = args.row_weights ? args.row_weights[row] : 1.0f;
        for_lanes(args.columns, [&](int64_t i, int count) PYROUTE_LAMBDA {
            const f32x8 bias = load_bias(args.bias, expert * args.columns + i, count);
            store_row(to + i, load_row(to + i, count) + bias * weight, count);
        });
    });
}

template <class Row>
void add_bias_dots(const ExpertRows &experts, const BiasDotArgs<Row> &args, int64_t row_begin, int64_t row_end) {
    for_rows(experts, row_begin, row_end, [&](int64_t row, int64_t expert) {
        if (expert < 0)
            return;
        const Row *from = args.rows + row * args.columns;
        f32x8 dot{};
        for_lanes(args.columns, [&](int64_t i, int count) PYROUTE_LAMBDA {
            dot = dot + load_row(from + i, count) * load_bias(args.bias, expert * args.columns + i, count);
        });
        args.dots[row] = canonical_nan(broadcast<f32x8>(args.dots[row] + sum_lanes(dot)))[0];
    });
}

template <class Row>
void bias_grad(const ExpertRows &experts, const BiasGradArgs<Row> &args, int64_t block_begin, int64_t block_end) {
    const int64_t blocks = bias_blocks(args.columns);
    for (int64_t block = block_begin; block < block_end; ++block) {
        const int64_t expert = block / blocks, column = block % blocks * bias_block;
        const int64_t rest = args.columns - column;
        const int64_t count = rest < bias_block ? rest : bias_block;
        if (args.accumulate && experts.expert_offsets[expert] == experts.expert_offsets[expert + 1])
            continue;
        double sums[bias_block] = {};
        for (int64_t row = experts.expert_offsets[expert]; row < experts.expert_offsets[expert + 1]; ++row) {
            const Row *from = args.rows + row * args.columns + column;
            const double weight = args.row_weights ? static_cast<double>(args.row_weights[row]) : 1.0;
            for_lanes(count, [&](int64_t i, int lanes) PYROUTE_LAMBDA {
                const f32x8 values = load_row(from + i, lanes);
                for (int lane = 0; lane < 8; ++lane) // i is a multiple of 8 and so is the block
                    sums[i + lane] += weight * static_cast<double>(values[lane]);
            });
        }
        for_lanes(count, [&](int64_t i, int lanes) PYROUTE_LAMBDA {
            f32x8 rounded;
            for (int lane = 0; lane < 8; ++lane)
                rounded[lane] = static_cast<float>(sums[i + lane]);
            float *to = args.grad_bias + expert * args.columns + column + i;
            store_row(to, args.accumulate ? load_row(to, lanes) + rounded : rounded, lanes);
        });
    }
}

template <class Row> constexpr MoeRowKernels<Row> row_kernels() {
    return {activate<Row>, activate_backward<Row>, add_bias<Row>, add_bias_dots<Row>, bias_grad<Row>};
}

} // namespace

const MoeKernels moe_kernels = {row_kernels<float>(), row_kernels<uint16_t>()};

} // namespace pyroute::cpu::PYROUTE_ISA
