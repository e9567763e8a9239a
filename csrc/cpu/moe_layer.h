#pragma once

#include "../moe_layer.h"

namespace pyroute::cpu {

// The maps must stay inside their arrays: tokens in [-1, T), rows in [-1, R).
void moe_forward(const MoeForwardArgs &args);
void moe_backward(const MoeBackwardArgs &args);

} // namespace pyroute::cpu
