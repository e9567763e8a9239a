"""One Mixture-of-Experts layer in NumPy: gate, forward, backward."""

import numpy as np

import pyroute

rng = np.random.default_rng(0)
num_tokens, num_experts, hidden, intermediate = 512, 64, 256, 128
x = rng.standard_normal((num_tokens, hidden), dtype=np.float32)
w_router = rng.standard_normal((num_experts, hidden), dtype=np.float32) / 16
w_gate_up = rng.standard_normal((num_experts, 2 * intermediate, hidden), dtype=np.float32) / 16
w_down = rng.standard_normal((num_experts, hidden, intermediate), dtype=np.float32) / 16

config = pyroute.RouterConfig(num_experts, top_k=8, renormalize="sum")
logits = x @ w_router.T
gating = pyroute.topk_gating(logits, config)
y, saved = pyroute.moe_forward(x, gating.topk_idx, gating.topk_weights, w_gate_up, w_down, return_saved=True)

grads = pyroute.moe_backward(y, saved)  # of the loss sum(y**2) / 2, whose gradient is y
grad_logits = pyroute.topk_gating_backward(grads.topk_weights, logits, gating, config)
grad_x, grad_w_router = grads.x + grad_logits @ w_router, grad_logits.T @ x
counts = gating.tokens_per_expert
print(f"{counts.min()} to {counts.max()} tokens per expert, loss {(y**2).sum() / 2:.1f}")
