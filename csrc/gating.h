// Gating: what each op takes. Scalar is float, or double for float64 logits; every floor fills the same bytes.
#pragma once

#include <stdint.h>

#include "float_type.h"

namespace pyroute {

enum class Score { softmax, sigmoid, sqrtsoftplus };
enum class Renormalize { none, sum, clamp };

// The router's rule: the fields of pyroute.RouterConfig. E = num_experts, k = top_k.
struct Router {
    int64_t num_experts;
    int64_t top_k;
    int64_t num_groups;  // divides num_experts
    int64_t topk_groups; // these hold at least top_k experts
    int64_t group_topn;  // how many of a group's largest keys rank it, at most the group's size
    Score score;
    bool post; // softmax over the chosen logits
    Renormalize renormalize;
    double renormalize_eps;
    double scaling_factor;
};

// float32, bfloat16, float16 or float64 [T, E], C-contiguous
struct Logits {
    const void *data;
    FloatType type;
    int64_t num_tokens;
    int64_t num_experts;
};

struct GatingArgs {
    Router router;
    Logits logits;
    const void *bias;           // Scalar [E] or null
    const int32_t *given_idx;   // [T, k] or null: replay; anything outside [0, E) is not routed
    const uint8_t *token_mask;  // [T] or null: 0 is not a real token
    int32_t *topk_idx;          // [T, k]
    void *topk_weights;         // Scalar [T, k]
    int32_t *tokens_per_expert; // [E]
};

// What the balance loss knows of the assignments; N sequences, one for the batch and global scopes.
struct BalanceTerms {
    const void *fractions;   // Scalar [N, E], or null: no balance loss
    const void *scales;      // Scalar [N]
    const int32_t *sequence; // [T]; anything outside [0, N) is read as 0
    int64_t num_sequences;   // N
};

struct GatingBackwardArgs {
    Router router;
    Logits logits;
    const void *grad_weights;  // Scalar [T, k]
    const int32_t *topk_idx;   // [T, k]; anything outside [0, E) is not routed
    const uint8_t *token_mask; // [T] or null
    BalanceTerms balance;
    double z_scale;    // 2 * coefficient / number of real tokens; 0: no z-loss
    void *grad_logits; // Scalar [T, E]
};

struct LossTermsArgs {
    Score score;
    Logits logits;
    BalanceTerms balance; // null fractions: the z-loss
    double *terms;        // [T]: <P_t, f> in the Scalar type, or logsumexp squared
};

// Each expert takes its best tokens by softmax score. R = num_real, C = capacity.
struct ExpertChoiceArgs {
    Logits logits;
    const int32_t *tokens; // [R] ids of the real tokens, ascending and in [0, T)
    int64_t num_real;
    int64_t capacity;
    void *keys;          // workspace, int32 [E, R], int64 for float64 logits
    int32_t *token_idx;  // [E, C]; -1 past the R-th
    void *token_weights; // Scalar [E, C]
};

} // namespace pyroute
