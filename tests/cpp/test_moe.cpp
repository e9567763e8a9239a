// The activation and bias kernels: the same bytes on every instruction set and number of threads; exact zeros on
// padding rows; a row alone has the bytes that it has among others.
#include <cmath>

#include "cpu/moe.h"
#include "fuzz.h"
#include "rows.h"

using namespace pyroute;
using namespace pyroute::test;

namespace {

void fill_rows(Random &random, Values values, Buffer<float> &to) { fill(random, values, to.get(), to.size); }
void fill_rows(Random &random, Values values, Buffer<uint16_t> &to) { fill_bf16(random, values, to.get(), to.size); }

// One layer's rows, biases and weights, each in a block of its own.
template <class Row> struct Problem {
    explicit Problem(Random &random)
        : segments(random_segments(random, 24)),
          program{
              random.any_of({ActivationProgram::swish_gate, ActivationProgram::gelu_gate, ActivationProgram::relu2}),
              random.any_of({1.0f, 1.702f}), random.any_of({HUGE_VALF, 7.0f, 0.5f}), random.any_of({0.0f, 1.0f})},
          intermediate(odd_size(random, 140)), width(program.kind == ActivationProgram::relu2 ? 1 : 2),
          values(random.any_of(all_values)), skip(random.integer(0, 3)), offsets(segments.num_experts + 1, skip),
          tokens(segments.num_rows, skip), rows(segments.num_rows * intermediate * width, skip),
          grad(segments.num_rows * intermediate, skip), weights(segments.num_rows, skip),
          bias_f32(segments.num_experts * intermediate * width, skip),
          bias_bf16(segments.num_experts * intermediate * width, skip) {
        std::memcpy(offsets.get(), segments.offsets.data(), offsets.bytes());
        if (segments.num_rows)
            std::memcpy(tokens.get(), segments.row_to_token.data(), tokens.bytes());
        fill_rows(random, values, rows);
        fill_rows(random, values, grad);
        fill_rows(random, random.one_in(4) ? Values::extreme : Values::ordinary, weights);
        fill_rows(random, values, bias_f32);
        fill_rows(random, values, bias_bf16);
        weighted = random.one_in(2);
        switch (random.integer(0, 2)) {
        case 0:
            bias = {bias_f32.get(), nullptr};
            break;
        case 1:
            bias = {nullptr, bias_bf16.get()};
            break;
        }
    }

    ExpertRows experts() const { return {offsets.get(), tokens.get(), segments.num_rows, segments.num_experts}; }
    const float *row_weights() const { return weighted ? weights.get() : nullptr; }
    ActivationArgs<Row> forward(Outputs &out) const {
        return {rows.get(),   bias,   row_weights(), out.poisoned<Row>(segments.num_rows * intermediate),
                intermediate, program};
    }
    ActivationBackwardArgs<Row> backward(Outputs &out) const {
        ActivationBackwardArgs<Row> args{};
        args.forward = forward(out);
        args.grad_hidden = grad.get();
        args.grad_gate_up = out.poisoned<Row>(segments.num_rows * intermediate * width);
        args.grad_row_weights = weighted ? out.poisoned<float>(segments.num_rows) : nullptr;
        return args;
    }

    Segments segments;
    ActivationProgram program;
    int64_t intermediate, width; // of rows, in intermediates
    Values values;
    int64_t skip;
    Buffer<int64_t> offsets;
    Buffer<int32_t> tokens;
    Buffer<Row> rows, grad;
    Buffer<float> weights, bias_f32;
    Buffer<uint16_t> bias_bf16;
    ExpertBias bias{nullptr, nullptr};
    bool weighted;
};

// Row `row` of `whole` as the only row of a problem with one expert.
template <class Row> void check_row_alone(const Problem<Row> &p, int64_t row, const Outputs &whole) {
    const int64_t expert = p.segments.expert_of(row), width = p.intermediate * p.width;
    const int64_t offsets[2] = {0, 1};
    const int32_t token = 0;
    const ExpertRows one{offsets, &token, 1, 1};
    Outputs out(0x11, 0);
    ActivationBackwardArgs<Row> args = p.backward(out);
    args.forward.gate_up += row * width;
    args.forward.bias.f32 += p.bias.f32 ? expert * width : 0;
    args.forward.bias.bf16 += p.bias.bf16 ? expert * width : 0;
    args.forward.row_weights += p.weighted ? row : 0;
    args.grad_hidden += row * p.intermediate;
    cpu::activate_backward(one, args);
    const auto same = [&](size_t output, int64_t row_bytes) {
        return same_bytes(out.get<char>(output), whole.get<char>(output) + row * row_bytes, row_bytes);
    };
    CHECK(same(0, static_cast<int64_t>(sizeof(Row)) * p.intermediate));
    CHECK(same(1, static_cast<int64_t>(sizeof(Row)) * width));
    CHECK(!p.weighted || same(2, 4));
}

template <class Row> void activation(Random &random, const Problem<Row> &p) {
    const Outputs forward = same_everywhere(random, [&](Outputs &out) {
        const auto args = p.forward(out);
        cpu::activate(p.experts(), args);
    });
    const Outputs backward = same_everywhere(random, [&](Outputs &out) {
        const auto args = p.backward(out);
        cpu::activate_backward(p.experts(), args);
    });
    const int64_t inner_bytes = static_cast<int64_t>(sizeof(Row)) * p.intermediate;
    CHECK(forward.block(0) == backward.block(0)); // hidden is recomputed to the bit
    for (int64_t row = 0; row < p.segments.num_rows; ++row)
        if (!p.segments.real(row)) {
            CHECK(all_bytes(backward.get<Row>(0) + row * p.intermediate, inner_bytes, 0));
            CHECK(all_bytes(backward.get<Row>(1) + row * p.intermediate * p.width, inner_bytes * p.width, 0));
            CHECK(!p.weighted || all_bytes(backward.get<float>(2) + row, 4, 0));
        }
    if (p.segments.num_rows) {
        const int64_t row = random.integer(0, p.segments.num_rows - 1);
        if (p.segments.real(row))
            check_row_alone(p, row, backward);
    }
}

template <class Row> void biases(Random &random, const Problem<Row> &p) {
    const int64_t columns = p.intermediate * p.width;
    if (p.bias.f32 || p.bias.bf16) {
        const Outputs added = same_everywhere(random, [&](Outputs &out) {
            cpu::add_bias(p.experts(), AddBiasArgs<Row>{out.copy_of(p.rows), p.bias, p.row_weights(), columns});
        });
        const Outputs dots = same_everywhere(random, [&](Outputs &out) {
            cpu::add_bias_dots(p.experts(), BiasDotArgs<Row>{p.rows.get(), p.bias, out.copy_of(p.weights), columns});
        });
        for (int64_t row = 0; row < p.segments.num_rows; ++row)
            if (!p.segments.real(row)) {
                CHECK(same_bytes(added.get<Row>(0) + row * columns, &p.rows[row * columns],
                                 static_cast<int64_t>(sizeof(Row)) * columns));
                CHECK(same_bytes(dots.get<float>(0) + row, &p.weights[row], 4));
            }
    }
    const Outputs grad = same_everywhere(random, [&](Outputs &out) {
        cpu::bias_grad(p.experts(),
                       BiasGradArgs<Row>{p.rows.get(), p.row_weights(),
                                         out.poisoned<float>(p.segments.num_experts * columns), columns, false});
    });
    for (int64_t e = 0; e < p.segments.num_experts; ++e)
        if (p.segments.begin(e) == p.segments.end(e))
            CHECK(all_bytes(grad.get<float>(0) + e * columns, 4 * columns, 0));
    Outputs added(0x11, 0);
    float *sums = added.copy_of(p.bias_f32);
    cpu::bias_grad(p.experts(), BiasGradArgs<Row>{p.rows.get(), p.row_weights(), sums, columns, true});
    for (int64_t e = 0; e < p.segments.num_experts; ++e)
        for (int64_t i = e * columns; i < (e + 1) * columns; ++i) {
            float sum = p.bias_f32[i];
            if (p.segments.begin(e) < p.segments.end(e)) {
                sum += grad.get<float>(0)[i];
                const uint32_t quiet = 0x7fc00000;
                if (sum != sum)
                    std::memcpy(&sum, &quiet, 4);
            }
            CHECK(same_bytes(sums + i, &sum, 4));
        }
}

template <class Row> void one_case(Random &random) {
    const Problem<Row> problem(random);
    activation(random, problem);
    biases(random, problem);
}

} // namespace

int main() {
    fuzz("test_moe", 2000, 0x130e18736ecbc15a, [](Random &random) {
        if (random.one_in(2))
            one_case<float>(random);
        else
            one_case<uint16_t>(random);
    });
}
