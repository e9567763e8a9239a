// What the gating kernels take beside the ops' own arguments: how a launch is cut, and workspaces.
#pragma once

#include "../gating.h"

namespace pyroute::cuda {

// topk_gating, a token in the registers of 8, 16 or 32 lanes. A group of experts belongs to `lanes_per_group` lanes,
// each of which holds a run of at most `experts_per_lane`; without groups all experts are one group.
struct GatingLaunch {
    GatingArgs args;
    int32_t num_experts, top_k, group_size; // the router's, in as many bits as an instruction takes
    uint32_t group_shift;                   // lanes_per_group = 1 << group_shift
    int32_t experts_per_lane;
    float renormalize_eps, scaling_factor; // the router's, rounded
    int32_t token_words;                   // 32-bit words of shared memory of a token
    bool vectors;                          // every run starts at a multiple of 4 logits and has a multiple of 4
    bool full;                             // every lane holds as many experts as it has registers
    bool alone;                            // the only block: counts are written, not added
};

// topk_gating of any other router: a token to a warp, its rows in a workspace.
struct AnyGatingLaunch {
    GatingArgs args;
    void *workspace; // gating_workspace_rows rows of E keys a warp, then one of num_groups
};
constexpr int gating_workspace_rows = 3;

constexpr int slot_arrays = 5; // [k] each, of what gating's backward keeps of the slots of a token

// topk_gating_backward. z_scale is a number of the host where it can be, else in memory: the number of real tokens is
// then the device's.
struct GatingBackwardLaunch {
    GatingBackwardArgs args;
    const double *z_scale; // or null
    void *workspace;       // up to 1024 experts of float32 none, else slot_arrays k numbers a warp
    int32_t warp_words;    // 32-bit words of shared memory of a warp
};

struct BalanceTotals {
    int32_t num_sequences;
};

// What is counted of the assignments; N sequences, one where there are no ids of sequences.
struct BalanceCounts {
    int64_t num_tokens, top_k, num_experts;
    const int32_t *topk_idx;   // [T, k]
    const uint8_t *token_mask; // [T] or null
    const void *sequence_ids;  // [T], integers of any type, or null
    int64_t sequence_item_size;
    int32_t *table; // [table_size], a power of two above T, filled with -1
    uint64_t table_size;
    uint32_t table_shift;  // 64 - log2(table_size)
    BalanceTotals *totals; // zeros, as are all counts
    int32_t *sequence;     // [T] or null
    int32_t *tokens;       // [N] or null
    int32_t *loads;        // [N, E] or null
    bool counts_in_block;  // one sequence, whose loads fit into shared memory
};

struct BalanceFractions {
    int64_t num_rows, num_experts, top_k; // num_rows: N, or T where N is the device's
    const int32_t *loads;                 // [N, E]
    const int64_t *wide_loads;            // [E] in their place, or null
    const int32_t *tokens;                // [N]
    int64_t total_tokens;                 // in their place, or -1
    const BalanceTotals *totals;          // or null: one sequence
    double coef;
    const double *factor; // multiplies coef, or null
    void *fractions;      // Scalar [N, E]
    void *scales;         // Scalar [N]
    double *weights;      // [N]
};

struct TokenSum {
    int64_t num_tokens;
    const double *terms;       // [T]
    const double *weights;     // [N], or null: the mean over real tokens
    const int32_t *sequence;   // [T], with weights
    const uint8_t *token_mask; // [T] or null
    const int32_t *num_real;   // or null: all
    double *chunk_sums;        // workspace, a number for every 64 tokens
    double *sum;
};

struct TokenShare {
    double numerator;
    const double *factor;    // multiplies it, or null
    int64_t num_tokens;      // or
    const int32_t *num_real; // not null
    double *share;
};

struct BiasUpdate {
    int64_t num_experts;
    const void *bias;     // Scalar [E]
    const int64_t *loads; // [E]
    double rate;
    void *updated; // Scalar [E]
};

struct IntegerCopy {
    int64_t count;
    const void *from;
    int64_t item_size;
    bool is_signed;
    int64_t num_experts;
    int32_t *ids;   // or
    int64_t *loads; // not null
};

struct ExpertChoiceLaunch {
    Logits logits;
    const uint8_t *token_mask; // [T] or null
    int64_t capacity;
    void *keys[2];         // workspaces, uint32 [E, T], uint64 for float64 logits
    int32_t *positions[2]; // workspaces, [E, T]
    int32_t *token_idx;    // [E, C]; -1 past the last real token
    void *token_weights;   // Scalar [E, C]
};

} // namespace pyroute::cuda
