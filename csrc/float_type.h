// The floating-point types that arrays come in, as a value: what a binding reads off a dtype and a driver switches on.
#pragma once

namespace pyroute {

enum class FloatType { float32, bfloat16, float16, float64 };

} // namespace pyroute
