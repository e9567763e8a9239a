// Gating, forward: tokens eight at a time, step by step (gating_block.h), those that are left over or out of the
// ordinary one at a time (gating_token.h), softmax over at most eight experts in columns (gating_small.h). All three
// give the same bytes.
//
// Reads E logits and writes 8 k bytes a token; a row of scratch (E values, at most four times) stays in the L1 cache.
#include "cpu/gating.h"

#include "cpu/scalar/gating_block.h"
#include "cpu/scalar/gating_small.h"
#include "cpu/scalar/gating_token.h"

namespace pyroute::cpu::PYROUTE_ISA {

namespace {

// --- eight tokens ---------------------------------------------------------------------------------------------------

// Scratch memory of a block: per token a row of logits and one of what it chooses from, and a shortlist.
struct BlockRows {
    int64_t stride;
    float *logits, *values, *listed;
    int32_t *places;

    explicit BlockRows(void *workspace, int64_t num_experts) : stride(padded(num_experts) + row_block) {
        Scratch scratch{static_cast<char *>(workspace)};
        logits = take<float>(scratch, block_tokens * stride);
        values = take<float>(scratch, block_tokens * stride);
        listed = take<float>(scratch, stride);
        places = take<int32_t>(scratch, stride);
    }
};

// Whether a call's tokens can go in blocks: numbers of slots, or 0.
template <class Scalar> PYROUTE_INLINE int64_t block_slots(const GatingArgs &args, const ForwardRows<Scalar> &rows) {
    const Router &r = args.router;
    const bool plain = sizeof(Scalar) == 4 && !args.given_idx && (!args.bias || rows.bias_is_finite) &&
                       r.num_experts <= block_experts_most && r.top_k <= block_slots_most;
    const bool grouped = r.num_groups == 1 || (r.num_groups <= groups_most && r.group_topn <= 2);
    return !plain || !grouped ? 0 : r.top_k <= 8 ? 8 : 16;
}

// Scores and ranks a token's experts and leaves what it chooses from in block.values.
PYROUTE_INLINE void rank_token(const GatingArgs &args, const ForwardRows<float> &rows, float *values, int t,
                               Block &block, int32_t *bases) {
    const Router &router = args.router;
    const bool biased = args.bias != nullptr;
    SoftmaxParts<float> softmax = {};
    ForwardRows<float> mine = rows;
    if (router.num_groups == 1)
        mine.ranked = values;
    bool ordered = score_token(router, biased, true, block.logits[t], mine, softmax);
    block.most[t] = softmax.largest;
    block.sum[t] = softmax.sum;
    if (router.num_groups > 1) {
        const uint64_t kept = kept_groups(router, biased ? rows.ranked : rows.scores);
        ordered = ordered && kept;
        const uint64_t some = (uint64_t(1) << router.topk_groups) - 1; // of an odd token, as many as it should be
        gather_groups(biased ? rows.ranked : block.logits[t], router.num_experts / router.num_groups,
                      kept ? kept : some, values, bases);
    }
    block.values[t] = values;
    block.odd |= static_cast<unsigned>(!ordered) << t;
}

// From positions among the kept groups' experts to experts, and their logits.
PYROUTE_INLINE void load_chosen(const Router &router, const int32_t (*bases)[groups_most], Block &block) {
    const auto size = static_cast<uint64_t>(router.num_experts / router.num_groups);
    const uint64_t inverse = ((uint64_t(1) << 32) + size - 1) / size;
    for (int64_t j = 0; j < router.top_k; ++j)
        for (int t = 0; t < block_tokens; ++t) {
            int32_t id = block.odd >> t & 1 ? 0 : block.ids[j][t];
            if (router.num_groups > 1) // position / size is exact for positions and sizes up to 2^16
                id += bases[t][(static_cast<uint64_t>(id) * inverse) >> 32];
            block.ids[j][t] = id;
            block.chosen[j][t] = block.logits[t][id];
        }
}

PYROUTE_INLINE void weigh_block(const Router &router, Block &block) {
    const int64_t top_k = router.top_k;
    f32x8 most = load<f32x8>(block.most), sum = load<f32x8>(block.sum);
    if (router.score == Score::softmax || router.post) {
        if (router.post) {
            most = load<f32x8>(block.chosen[0]);
            for (int64_t j = 1; j < top_k; ++j)
                most = larger(load<f32x8>(block.chosen[j]), most);
            sum = f32x8{};
        }
        for (int64_t j = 0; j < top_k; ++j) {
            const f32x8 e = exp_lanes(load<f32x8>(block.chosen[j]) - most);
            store(block.weights[j], e);
            if (router.post)
                sum += e;
        }
        for (int64_t j = 0; j < top_k; ++j)
            store(block.weights[j], load<f32x8>(block.weights[j]) / sum);
    } else {
        score_row(router.score, block.chosen[0], block.weights[0], top_k * block_tokens);
    }
    f32x8 divisor = broadcast<f32x8>(1.0f);
    if (router.renormalize != Renormalize::none) {
        const f32x8 eps = broadcast<f32x8>(static_cast<float>(router.renormalize_eps));
        f32x8 total = {};
        for (int64_t j = 0; j < top_k; ++j)
            total += load<f32x8>(block.weights[j]);
        divisor = router.renormalize == Renormalize::sum ? total + eps : larger(eps, total);
    }
    const auto scale = static_cast<float>(router.scaling_factor);
    for (int64_t j = 0; j < top_k; ++j)
        store(block.weights[j], canonical(load<f32x8>(block.weights[j]) / divisor * scale));
}

// Columns of slots as rows of tokens. A row of eight may reach past its k; the next one covers that.
template <int slots> PYROUTE_INLINE void write_columns(const void *columns, int64_t top_k, void *to) {
    float rows[block_tokens * slots + 8];
#pragma GCC unroll 2
    for (int part = slots - 8; part >= 0; part -= 8) {
        f32x8 v[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
            v[j] = load<f32x8>(static_cast<const float *>(columns) + (part + j) * block_tokens);
        transpose(v);
#pragma GCC unroll 8
        for (int t = 0; t < block_tokens; ++t)
            store(rows + t * top_k + part, v[t]);
    }
    memcpy(to, rows, static_cast<size_t>(block_tokens * top_k) * sizeof(float));
}

// Eight tokens' ids and weights; returns which of them have to go one by one.
template <int slots>
__attribute__((noinline)) unsigned gate_block(const GatingArgs &args, const ForwardRows<float> &rows,
                                              const BlockRows &scratch, int64_t token) {
    const Router &router = args.router;
    const int64_t num_experts = router.num_experts, top_k = router.top_k;
    const bool all_scores = args.bias || router.num_groups > 1;
    Block block;
    int32_t bases[block_tokens][groups_most];
    for (int t = 0; t < block_tokens; ++t) {
        block.logits[t] = block.values[t] = row_of(args.logits, token + t, scratch.logits + t * scratch.stride);
        if (all_scores)
            rank_token(args, rows, scratch.values + t * scratch.stride, t, block, bases[t]);
    }
    const int64_t count = num_experts / router.num_groups * router.topk_groups;
    const unsigned unordered = find_thresholds<slots>(block, count, top_k);
    block.odd |= all_scores ? 0 : unordered;
    if (!all_scores && router.score == Score::softmax && !router.post)
        for (int t = 0; t < block_tokens; ++t) { // exp_row gives any number for a NaN that its range does not tell of
            block.most[t] = block.largest[t];
            block.sum[t] = exp_row(block.logits[t], RowRange<float>{block.largest[t], block.smallest[t]}, rows.scores,
                                   num_experts);
            block.odd |= static_cast<unsigned>(block.sum[t] != block.sum[t]) << t;
        }
    order_block<slots>(block, count, top_k, scratch.listed, scratch.places);
    load_chosen(router, bases, block);
    weigh_block(router, block);
    write_columns<slots>(block.ids, top_k, args.topk_idx + token * top_k);
    write_columns<slots>(block.weights, top_k, static_cast<float *>(args.topk_weights) + token * top_k);
    return block.odd;
}

// --- all tokens -----------------------------------------------------------------------------------------------------

template <class Scalar>
__attribute__((noinline)) void gate_or_skip(const GatingArgs &args, const ForwardRows<Scalar> &rows, int64_t token) {
    if (!args.token_mask || args.token_mask[token])
        return gate_token(args, rows, token);
    for (int64_t slot = token * args.router.top_k; slot < (token + 1) * args.router.top_k; ++slot) {
        args.topk_idx[slot] = -1;
        static_cast<Scalar *>(args.topk_weights)[slot] = 0;
    }
}

// Returns the first token that is not in a block.
PYROUTE_INLINE int64_t gate_blocks(const GatingArgs &args, const ForwardRows<float> &rows, int64_t begin, int64_t end,
                                   void *workspace, int64_t slots) {
    const BlockRows scratch(workspace, args.router.num_experts);
    for (; begin + block_tokens <= end; begin += block_tokens) {
        unsigned odd =
            slots == 8 ? gate_block<8>(args, rows, scratch, begin) : gate_block<16>(args, rows, scratch, begin);
        for (int t = 0; args.token_mask && t < block_tokens; ++t)
            odd |= static_cast<unsigned>(!args.token_mask[begin + t]) << t;
        for (; odd; odd &= odd - 1)
            gate_or_skip(args, rows, begin + __builtin_ctz(odd));
    }
    return begin;
}

template <class Scalar> void gate_tokens(const GatingArgs &args, int64_t begin, int64_t end, void *workspace) {
    ForwardRows<Scalar> rows(workspace, args.router.num_experts);
    if (args.bias)
        rows.load_bias(args.bias, args.router.num_experts);
    if constexpr (sizeof(Scalar) == 4) {
        const int64_t slots = block_slots(args, rows);
        if (small_softmax(args)) {
            for (; begin + small_tokens <= end; begin += small_tokens)
                if (!gate_small(args, begin))
                    for (int64_t token = begin; token < begin + small_tokens; ++token)
                        gate_or_skip(args, rows, token);
        } else if (slots && end - begin >= block_tokens) {
            begin = gate_blocks(args, rows, begin, end, rows.free, slots);
        }
    }
    for (; begin < end; ++begin)
        gate_or_skip(args, rows, begin);
}

void forward(const GatingArgs &args, int64_t begin, int64_t end, void *workspace) {
    if (args.logits.type == FloatType::float64)
        gate_tokens<double>(args, begin, end, workspace);
    else
        gate_tokens<float>(args, begin, end, workspace);
}

// --- expert choice ------------------------------------------------------------------------------------------------

// Keys of the scores, by expert.
template <class Scalar> void score_keys(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *workspace) {
    using V = Wide<Scalar>;
    using Key = typename Lane<Scalar>::Int;
    const int64_t num_experts = args.logits.num_experts;
    const ForwardRows<Scalar> rows(workspace, num_experts);
    for (int64_t i = begin; i < end; ++i) {
        const Scalar *z = row_of(args.logits, args.tokens[i], rows.logits);
        const Scalar sum = exp_row(z, range_of_row(z, num_experts), rows.scores, num_experts);
        keys_of_row<Scalar>(rows.keys, num_experts,
                            [&](int64_t e) PYROUTE_INLINED { return load<V>(rows.scores + e) / sum; });
        for (int64_t e = 0; e < num_experts; ++e)
            static_cast<Key *>(args.keys)[e * args.num_real + i] = rows.keys[e];
    }
}

template <class Scalar> void choose_tokens(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *workspace) {
    using Key = typename Lane<Scalar>::Int;
    const int64_t num_real = args.num_real, capacity = args.capacity, taken = capacity < num_real ? capacity : num_real;
    Scratch scratch{static_cast<char *>(workspace)};
    const auto sort = take_sort_buffer<Key>(scratch, num_real);
    for (int64_t e = begin; e < end; ++e) {
        const Key *keys = static_cast<const Key *>(args.keys) + e * num_real;
        int32_t *ids = args.token_idx + e * capacity;
        Scalar *weights = static_cast<Scalar *>(args.token_weights) + e * capacity;
        best_positions<typename Lane<Wide<Scalar>>::Int>(keys, {1, num_real, nullptr}, taken, ids, sort);
        for (int64_t j = 0; j < capacity; ++j) {
            weights[j] = j < taken ? value_of_key<Scalar>(keys[ids[j]]) : Scalar(0);
            ids[j] = j < taken ? args.tokens[ids[j]] : -1;
        }
    }
}

void expert_choice_keys(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *workspace) {
    if (args.logits.type == FloatType::float64)
        score_keys<double>(args, begin, end, workspace);
    else
        score_keys<float>(args, begin, end, workspace);
}

void expert_choice(const ExpertChoiceArgs &args, int64_t begin, int64_t end, void *workspace) {
    if (args.logits.type == FloatType::float64)
        choose_tokens<double>(args, begin, end, workspace);
    else
        choose_tokens<float>(args, begin, end, workspace);
}

} // namespace

extern const GatingKernels gating_kernels = {forward, expert_choice_keys, expert_choice};

} // namespace pyroute::cpu::PYROUTE_ISA
