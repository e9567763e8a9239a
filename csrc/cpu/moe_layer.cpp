// The MoE layer as one call: the other rooms' ops through runs of experts whose rows fill a bounded workspace.
//
// What lives for the whole call is one row of `hidden` per slot, since a token's slots are added in slot order and so
// only when all of its experts are done, two floats per row, and with quantised activations one byte per element of x.
// The rest is three buffers of a part, taken from recycled memory. Rows are independent going forward, so a crowded
// expert is cut there; going backward its weight gradients are sums over all of its rows.
#include "cpu/moe_layer.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/grouped_gemm.h"
#include "cpu/memory.h"
#include "cpu/moe.h"
#include "cpu/permutation.h"
#include "cpu/quantization.h"
#include "cpu/threads.h"

namespace pyroute::cpu {

namespace {

constexpr int64_t bytes_per_share = 128 << 10; // about 20 us of moving for one thread
constexpr int64_t scale_block = 128;           // of quantised activations

using Bytes = Workspace<uint8_t>;

ElementType element_type(FloatType type) {
    return type == FloatType::float32 ? ElementType::float32 : ElementType::bfloat16;
}
template <class T> T *offset(T *base, int64_t count) { return base ? base + count : nullptr; }
ExpertBias offset(const ExpertBias &bias, int64_t count) { return {offset(bias.f32, count), offset(bias.bf16, count)}; }
const uint8_t *at(const void *base, int64_t bytes) { return static_cast<const uint8_t *>(base) + bytes; }
uint8_t *at(void *base, int64_t bytes) { return static_cast<uint8_t *>(base) + bytes; }

// Matrices from `expert` on, each [rows, cols].
GemmOperand from_expert(GemmOperand w, int64_t expert, int64_t rows, int64_t cols) {
    w.data = at(w.data, expert * rows * cols * item_size(w.type));
    w.scales = offset(w.scales, expert * w.scale_rows * divide_up(cols, w.block_cols));
    return w;
}

// Rows quantised along their columns, in one buffer: codes, then scales.
struct Quantized {
    Quantized(int64_t num_rows, int64_t num_cols)
        : rows(num_rows), cols(num_cols), blocks(divide_up(num_cols, scale_block)),
          scale_bytes_at(divide_up(rows * cols, 64) * 64), memory(scale_bytes_at + rows * blocks * 4) {}
    uint8_t *codes() const { return memory.get(); }
    float *scales() const { return reinterpret_cast<float *>(memory.get() + scale_bytes_at); }
    GemmOperand operand(int64_t num_rows) const {
        return {codes(), ElementType::e4m3, scales(), num_rows, 1, scale_block, nullptr};
    }
    void fill(const MoeLayer &layer, const void *from, int64_t num_rows) const {
        QuantizeFp8Args args{};
        args.blocks = {1,       num_rows, cols,           1, std::clamp<int64_t>(cols, 1, scale_block), nullptr,
                       nullptr, 1,        Fp8Format::e4m3};
        args.x_type = layer.row_type;
        args.x = from;
        args.power_of_two = layer.power_of_two;
        args.codes = codes();
        args.scales = scales();
        quantize_fp8(args);
    }

    int64_t rows, cols, blocks, scale_bytes_at;
    Bytes memory;
};

// Some rows and the experts that they belong to.
struct Part {
    int64_t first_expert, end_expert, first_row, num_rows;
};

// Runs of whole experts whose rows fill at most part_bytes; an expert that alone fills more is cut too, or is a part.
std::vector<Part> cut(const MoeLayer &layer, bool inside_experts) {
    const int64_t row_bytes = std::max(layer.hidden, layer.pre_activations) * item_size(layer.row_type);
    const int64_t most = layer.part_bytes / std::max<int64_t>(1, row_bytes);
    const int64_t *starts = layer.expert_offsets;
    std::vector<Part> parts;
    for (int64_t expert = 0, row = 0; expert < layer.num_experts;) {
        int64_t next = std::upper_bound(starts + expert + 1, starts + layer.num_experts + 1, row + most) - starts - 1;
        int64_t end = starts[std::max(next, expert + 1)];
        if (next == expert && inside_experts)
            end = row + std::max<int64_t>(1, most);
        const int64_t end_expert = std::max(next, expert + 1);
        parts.push_back({expert, end_expert, row, end - row});
        expert = end == starts[end_expert] ? end_expert : expert;
        row = end;
    }
    return parts;
}

int64_t most_rows(const std::vector<Part> &parts) {
    int64_t most = 0;
    for (const Part &part : parts)
        most = std::max(most, part.num_rows);
    return most;
}

// One part as a layer of its own.
class PartOf {
  public:
    PartOf(const MoeLayer &layer, const Part &part) : layer_(layer), part_(part) {
        for (int64_t expert = part.first_expert; expert <= part.end_expert; ++expert)
            offsets_.push_back(std::clamp<int64_t>(layer.expert_offsets[expert] - part.first_row, 0, part.num_rows));
    }

    int64_t num_experts() const { return part_.end_expert - part_.first_expert; }
    ExpertRows experts() const { return {offsets_.data(), tokens(), part_.num_rows, num_experts()}; }
    GemmOperand rows(const void *data) const {
        return {data, element_type(layer_.row_type), nullptr, 0, 1, 1, nullptr};
    }

    // to[row] = from[its token], zero (or `padding`) on padding rows.
    void gather(const void *from, int64_t row_bytes, void *to) const {
        parallel_ranges(part_.num_rows, bytes_per_share / std::max<int64_t>(1, row_bytes),
                        [&](int64_t begin, int64_t end) {
                            for (int64_t row = begin; row < end; ++row) {
                                const int64_t token = tokens()[row];
                                uint8_t *const out = at(to, row * row_bytes);
                                if (token < 0)
                                    std::memset(out, 0, static_cast<size_t>(row_bytes));
                                else
                                    std::memcpy(out, at(from, token * row_bytes), static_cast<size_t>(row_bytes));
                            }
                        });
    }
    void gather(const Quantized &from, const Quantized &to) const {
        gather(from.codes(), from.cols, to.codes());
        gather(from.scales(), from.blocks * 4, to.scales());
        for (int64_t row = 0; row < part_.num_rows; ++row)
            if (tokens()[row] < 0)
                std::fill_n(to.scales() + row * to.blocks, to.blocks, 1.0f);
    }

    // weighted[row] = weight of its slot * x[its token], and for each slot of the part <x[token], rows[row]>.
    void weigh(const void *rows, void *weighted, float *slot_dots) const {
        const RouteMaps &all = layer_.maps;
        const int64_t slots = all.num_tokens * all.top_k;
        const Workspace<int32_t> token_to_row(slots);
        for (int64_t slot = 0; slot < slots; ++slot) {
            const int64_t row = all.token_to_row[slot] - part_.first_row;
            token_to_row[slot] = row >= 0 && row < part_.num_rows ? static_cast<int32_t>(row) : -1;
        }
        const Workspace<float> dots(slots);
        UnpermuteBackwardArgs args{};
        args.maps = {all.num_tokens, all.top_k, part_.num_rows, tokens(), token_to_row.get()};
        args.hidden = layer_.hidden;
        args.type = layer_.row_type;
        args.grad_y = layer_.x;
        args.rows = rows;
        args.topk_weights = layer_.topk_weights;
        args.grad_rows = weighted;
        args.grad_topk_weights = dots.get();
        unpermute_backward(args);
        for (int64_t slot = 0; slot_dots && slot < slots; ++slot)
            if (token_to_row[slot] >= 0)
                slot_dots[slot] = dots[slot];
    }

    void multiply(const GemmOperand &a, const GemmOperand &b, int64_t n, int64_t k, bool transposed, void *out) const {
        GroupedGemmArgs args{};
        args.a = a;
        args.b = from_expert(b, part_.first_expert, n, k);
        args.expert_offsets = offsets_.data();
        args.out = out;
        args.out_type = element_type(layer_.row_type);
        args.num_rows = part_.num_rows;
        args.num_experts = num_experts();
        args.n = n;
        args.k = k;
        transposed ? grouped_gemm_dgrad(args) : grouped_gemm(args);
    }
    void weight_gradient(const void *grad_out, const void *a, int64_t n, int64_t k, bool accumulate, float *out) const {
        GroupedGemmWgradArgs args{};
        args.grad_out = rows(grad_out);
        args.a = rows(a);
        args.expert_offsets = offsets_.data();
        args.out = out + part_.first_expert * n * k;
        args.accumulate = accumulate;
        args.num_rows = part_.num_rows;
        args.num_experts = num_experts();
        args.n = n;
        args.k = k;
        grouped_gemm_wgrad(args);
    }

  private:
    const int32_t *tokens() const { return layer_.maps.row_to_token + part_.first_row; }

    const MoeLayer &layer_;
    const Part &part_;
    std::vector<int64_t> offsets_;
};

// The weight of each row's slot; 0 on padding rows.
Workspace<float> row_weights(const MoeLayer &layer) {
    const RouteMaps &maps = layer.maps;
    Workspace<float> weights(maps.num_rows);
    std::fill_n(weights.get(), maps.num_rows, 0.0f);
    for (int64_t slot = 0; slot < maps.num_tokens * maps.top_k; ++slot)
        if (maps.token_to_row[slot] >= 0)
            weights[maps.token_to_row[slot]] = layer.topk_weights[slot];
    return weights;
}

void sum_slots(const MoeLayer &layer, const void *rows, bool weighted, void *out) {
    UnpermuteArgs args{};
    args.maps = layer.maps;
    args.hidden = layer.hidden;
    args.type = layer.row_type;
    args.rows = rows;
    args.topk_weights = weighted ? layer.topk_weights : nullptr;
    args.out = out;
    unpermute(args);
}

template <class Row> void forward(const MoeForwardArgs &args) {
    const MoeLayer &layer = args.layer;
    const int64_t hidden = layer.hidden, inner = layer.intermediate, pre = layer.pre_activations;
    constexpr int64_t size = sizeof(Row);
    const std::vector<Part> parts = cut(layer, true);
    const int64_t most = most_rows(parts);
    const bool weigh = layer.weight_on == WeightOn::input, quantize = layer.quantize;

    const Bytes results(layer.maps.num_rows * hidden * size);
    const Bytes gate_up(args.gate_up ? 0 : most * pre * size);
    const Bytes rows((quantize && !weigh ? inner : std::max(hidden, inner)) * most * size); // of x, then hidden
    const Bytes unweighted(weigh ? most * hidden * size : 0);
    const Quantized x(quantize && !weigh ? layer.x_rows : 0, hidden);
    const Quantized quantized_rows(quantize ? most : 0, hidden), quantized_hidden(quantize ? most : 0, inner);
    const Workspace<float> weights = layer.weight_on == WeightOn::pre_down ? row_weights(layer) : Workspace<float>();
    if (quantize && !weigh)
        x.fill(layer, layer.x, layer.x_rows);

    for (const Part &part : parts) {
        if (part.num_rows == 0)
            continue;
        const PartOf of(layer, part);
        GemmOperand a = of.rows(rows.get());
        if (weigh) {
            of.gather(layer.x, hidden * size, unweighted.get());
            of.weigh(unweighted.get(), rows.get(), nullptr);
        } else if (!quantize)
            of.gather(layer.x, hidden * size, rows.get());
        if (quantize) {
            weigh ? quantized_rows.fill(layer, rows.get(), part.num_rows) : of.gather(x, quantized_rows);
            a = quantized_rows.operand(part.num_rows);
        }
        void *const z = args.gate_up ? at(args.gate_up, part.first_row * pre * size) : gate_up.get();
        of.multiply(a, layer.w_gate_up, pre, hidden, false, z);

        ActivationArgs<Row> activation{};
        activation.gate_up = static_cast<const Row *>(z);
        activation.bias = offset(layer.b_gate_up, part.first_expert * pre);
        activation.row_weights = offset(weights.get(), part.first_row);
        activation.hidden = reinterpret_cast<Row *>(rows.get());
        activation.intermediate = inner;
        activation.program = layer.program;
        activate(of.experts(), activation);
        a = of.rows(rows.get());
        if (quantize) {
            quantized_hidden.fill(layer, rows.get(), part.num_rows);
            a = quantized_hidden.operand(part.num_rows);
        }
        auto *const out = reinterpret_cast<Row *>(results.get()) + part.first_row * hidden;
        of.multiply(a, layer.w_down, hidden, inner, false, out);
        if (layer.b_down.f32 || layer.b_down.bf16)
            add_bias<Row>(of.experts(),
                          {out, offset(layer.b_down, part.first_expert * hidden), activation.row_weights, hidden});
    }
    sum_slots(layer, results.get(), layer.weight_on == WeightOn::output, args.y);
}

// All gradients of a call, part by part.
template <class Row> class Backward {
  public:
    explicit Backward(const MoeBackwardArgs &args)
        : args_(args), layer_(args.layer), parts_(cut(layer_, false)), by_row_(layer_.weight_on != WeightOn::input),
          wants_rows_(args.x || (!by_row_ && (args.topk_weights || args.w_gate_up))),
          outer_(most_rows(parts_) * hidden() * size), inner_(most_rows(parts_) * layer_.intermediate * size),
          grad_pre_(most_rows(parts_) * layer_.pre_activations * size),
          grad_rows_(wants_rows_ ? layer_.maps.num_rows * hidden() * size : 0),
          weights_(by_row_ ? row_weights(layer_) : Workspace<float>()),
          dots_(by_row_ && args.topk_weights ? layer_.maps.num_rows : 0) {}

    void run() {
        const RouteMaps &maps = layer_.maps;
        const int64_t slots = maps.num_tokens * maps.top_k;
        if (args_.topk_weights)
            std::fill_n(args_.topk_weights, slots, 0.0f);
        for (const Part &part : parts_)
            work(part);
        for (int64_t slot = 0; by_row_ && args_.topk_weights && slot < slots; ++slot)
            if (maps.token_to_row[slot] >= 0)
                args_.topk_weights[slot] = dots_[maps.token_to_row[slot]];
        if (args_.x)
            sum_slots(layer_, grad_rows_.get(), !by_row_, args_.x);
    }

  private:
    static constexpr int64_t size = sizeof(Row);

    int64_t hidden() const { return layer_.hidden; }

    void work(const Part &part) {
        const int64_t inner = layer_.intermediate, pre = layer_.pre_activations;
        const PartOf of(layer_, part);
        of.gather(args_.grad_y, hidden() * size, outer_.get()); // the gradient of the experts' results
        of.multiply(of.rows(outer_.get()), layer_.w_down, hidden(), inner, true, inner_.get());
        activation(of, part);
        if (args_.w_down)
            of.weight_gradient(outer_.get(), inner_.get(), hidden(), inner, args_.accumulate, args_.w_down);
        biases(of, part);
        uint8_t *const grad_rows = wants_rows_ ? at(grad_rows_.get(), part.first_row * hidden() * size) : nullptr;
        if (wants_rows_)
            of.multiply(of.rows(grad_pre_.get()), layer_.w_gate_up, pre, hidden(), true, grad_rows);
        if (by_row_ && args_.w_gate_up)
            of.gather(layer_.x, hidden() * size, outer_.get());
        else if (!by_row_ && (args_.w_gate_up || args_.topk_weights))
            of.weigh(grad_rows, outer_.get(), args_.topk_weights);
        if (args_.w_gate_up)
            of.weight_gradient(grad_pre_.get(), outer_.get(), pre, hidden(), args_.accumulate, args_.w_gate_up);
    }

    // grad_pre_, and the hidden rows in the place of their gradient.
    void activation(const PartOf &of, const Part &part) {
        ActivationBackwardArgs<Row> args{};
        args.forward.gate_up = static_cast<const Row *>(args_.gate_up) + part.first_row * layer_.pre_activations;
        args.forward.bias = offset(layer_.b_gate_up, part.first_expert * layer_.pre_activations);
        args.forward.row_weights = weights_at(part);
        args.forward.hidden = rows_in(inner_);
        args.forward.intermediate = layer_.intermediate;
        args.forward.program = layer_.program;
        args.grad_hidden = rows_in(inner_);
        args.grad_gate_up = rows_in(grad_pre_);
        args.grad_row_weights = dots_at(part);
        activate_backward(of.experts(), args);
    }

    void biases(const PartOf &of, const Part &part) {
        const int64_t pre = layer_.pre_activations;
        if (args_.b_down)
            bias_grad<Row>(of.experts(), {rows_in(outer_), weights_at(part),
                                          args_.b_down + part.first_expert * hidden(), hidden(), args_.accumulate});
        if (args_.b_gate_up)
            bias_grad<Row>(of.experts(), {rows_in(grad_pre_), nullptr, args_.b_gate_up + part.first_expert * pre, pre,
                                          args_.accumulate});
        if (dots_at(part) && (layer_.b_down.f32 || layer_.b_down.bf16))
            add_bias_dots<Row>(of.experts(), {rows_in(outer_), offset(layer_.b_down, part.first_expert * hidden()),
                                              dots_at(part), hidden()});
    }

    static Row *rows_in(const Bytes &memory) { return reinterpret_cast<Row *>(memory.get()); }
    const float *weights_at(const Part &part) const { return by_row_ ? weights_.get() + part.first_row : nullptr; }
    float *dots_at(const Part &part) const {
        return by_row_ && args_.topk_weights ? dots_.get() + part.first_row : nullptr;
    }

    const MoeBackwardArgs &args_;
    const MoeLayer &layer_;
    const std::vector<Part> parts_;
    const bool by_row_;                                // a slot's weight multiplies its hidden row; otherwise its x
    const bool wants_rows_;                            // the gradient of each row of x
    const Bytes outer_, inner_, grad_pre_, grad_rows_; // [part, H], [part, I], [part, P], [R, H]
    const Workspace<float> weights_, dots_;            // [R]
};

} // namespace

void moe_forward(const MoeForwardArgs &args) {
    args.layer.row_type == FloatType::float32 ? forward<float>(args) : forward<uint16_t>(args);
}

void moe_backward(const MoeBackwardArgs &args) {
    args.layer.row_type == FloatType::float32 ? Backward<float>(args).run() : Backward<uint16_t>(args).run();
}

} // namespace pyroute::cpu
