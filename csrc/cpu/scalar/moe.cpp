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
// Cost per 8 elements: one exp and one division, about 10 ns of AVX2, against 64 to 96 bytes of float32 traffic.
#include "cpu/moe.h"
#include "cpu/elementary.h"

namespace pyroute::cpu::PYROUTE_ISA {
namespace {

using Kind = ActivationProgram::Kind;

PYROUTE_INLINE f32x8 canonical_nan(const f32x8 &v) {
    const u32x8 quiet = u32x8{} + 0x7fc00000u;
    return v == v ? v : bit_cast<f32x8>(quiet);
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
    const u16x8 bits = f32_to_bf16(canonical_nan(v));
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

template <Kind kind> PYROUTE_INLINE Point evaluate(const ActivationProgram &program, f32x8 gate, f32x8 up) {
    Point p{};
    if constexpr (kind == ActivationProgram::relu2) {
        const f32x8 positive = gate < 0.0f ? f32x8{} : gate; // NaN stays
        p.hidden = positive * positive;
        p.d_gate = positive + positive;
        return p;
    }
    f32x8 v, gate_slope; // gate_slope: gate * dv/dgate
    if constexpr (kind == ActivationProgram::swish_gate) {
        const f32x8 limit = broadcast<f32x8>(program.limit);
        p.gate_clipped = gate > limit;
        p.up_clipped = (up > limit) | (up < -limit);
        gate = p.gate_clipped ? limit : gate;
        up = up > limit ? limit : up;
        up = up < -limit ? -limit : up;
        v = gate * program.alpha;
        gate_slope = v;
    } else {
        const f32x8 square = gate * gate;
        v = gate * (square * 0.0713548162726f + 1.5957691216057308f);
        gate_slope = gate * (square * (3.0f * 0.0713548162726f) + 1.5957691216057308f);
    }
    const f32x8 one = broadcast<f32x8>(1.0f);
    const f32x8 e = exp_lanes(-(v < 0.0f ? -v : v));
    const f32x8 reciprocal = one / (e + one);
    const f32x8 sigmoid = (v >= 0.0f ? one : e) * reciprocal;
    const f32x8 slope = sigmoid * ((v >= 0.0f ? e : one) * reciprocal); // sigmoid (1 - sigmoid)
    const f32x8 most = broadcast<f32x8>(1e3f); // beyond it the slope is exactly 0, and inf * 0 would be NaN
    gate_slope = gate_slope > most ? most : gate_slope;
    gate_slope = gate_slope < -most ? -most : gate_slope;
    const f32x8 factor = up + program.up_offset;
    const f32x8 activated = gate * sigmoid;
    p.hidden = activated * factor;
    p.d_gate = factor * (gate_slope * slope + sigmoid);
    p.d_up = activated;
    return p;
}

template <class Row, Kind kind> struct PreActivations {
    static constexpr bool gated = kind != ActivationProgram::relu2;
    const Row *gate, *up; // of this row
    const ExpertBias &bias;
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
        return evaluate<kind>(program, a, b);
    }
};

template <Kind kind, class Row>
void activate_rows(const ExpertRows &experts, const ActivationArgs<Row> &args, int64_t row_begin, int64_t row_end) {
    using Pre = PreActivations<Row, kind>;
    const ActivationProgram program = args.program;
    for_rows(experts, row_begin, row_end, [&](int64_t row, int64_t expert) {
        Row *hidden = args.hidden + row * args.intermediate;
        if (expert < 0)
            return zero_row(hidden, args.intermediate);
        const Pre z = Pre::at(args, row, expert);
        const float weight = args.row_weights ? args.row_weights[row] : 1.0f;
        for_lanes(args.intermediate, [&](int64_t i, int count) {
            store_row(hidden + i, Pre::point(z, program, i, count).hidden * weight, count);
        });
    });
}

template <Kind kind, class Row>
void activate_backward_rows(const ExpertRows &experts, const ActivationBackwardArgs<Row> &args, int64_t row_begin,
                            int64_t row_end) {
    using Pre = PreActivations<Row, kind>;
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
        for_lanes(inner, [&](int64_t i, int count) {
            const Point p = Pre::point(z, program, i, count);
            const f32x8 grad = load_row(grad_hidden + i, count), weighted = grad * weight;
            dot = dot + grad * p.hidden;
            store_row(hidden + i, p.hidden * weight, count);
            store_row(grad_gate + i, p.gate_clipped ? f32x8{} : weighted * p.d_gate, count);
            if constexpr (Pre::gated)
                store_row(grad_gate + inner + i, p.up_clipped ? f32x8{} : weighted * p.d_up, count);
        });
        if (args.grad_row_weights)
            args.grad_row_weights[row] = canonical_nan(broadcast<f32x8>(sum_lanes(dot)))[0];
    });
}

template <class Row>
void activate(const ExpertRows &experts, const ActivationArgs<Row> &args, int64_t row_begin, int64_t row_end) {
    switch (args.program.kind) {
    case ActivationProgram::swish_gate:
        return activate_rows<ActivationProgram::swish_gate>(experts, args, row_begin, row_end);
    case ActivationProgram::gelu_gate:
        return activate_rows<ActivationProgram::gelu_gate>(experts, args, row_begin, row_end);
    case ActivationProgram::relu2:
        return activate_rows<ActivationProgram::relu2>(experts, args, row_begin, row_end);
    }
}

template <class Row>
void activate_backward(const ExpertRows &experts, const ActivationBackwardArgs<Row> &args, int64_t row_begin,
                       int64_t row_end) {
    switch (args.forward.program.kind) {
    case ActivationProgram::swish_gate:
        return activate_backward_rows<ActivationProgram::swish_gate>(experts, args, row_begin, row_end);
    case ActivationProgram::gelu_gate:
        return activate_backward_rows<ActivationProgram::gelu_gate>(experts, args, row_begin, row_end);
    case ActivationProgram::relu2:
        return activate_backward_rows<ActivationProgram::relu2>(experts, args, row_begin, row_end);
    }
}

template <class Row>
void add_bias(const ExpertRows &experts, const AddBiasArgs<Row> &args, int64_t row_begin, int64_t row_end) {
    for_rows(experts, row_begin, row_end, [&](int64_t row, int64_t expert) {
        if (expert < 0)
            return;
        Row *to = args.rows + row * args.columns;
        const float weight = args.row_weights ? args.row_weights[row] : 1.0f;
        for_lanes(args.columns, [&](int64_t i, int count) {
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
        for_lanes(args.columns, [&](int64_t i, int count) {
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
            for_lanes(count, [&](int64_t i, int lanes) {
                const f32x8 values = load_row(from + i, lanes);
                for (int lane = 0; lane < 8; ++lane) // i is a multiple of 8 and so is the block
                    sums[i + lane] += weight * static_cast<double>(values[lane]);
            });
        }
        for_lanes(count, [&](int64_t i, int lanes) {
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
