// The floating-point types that arrays come in, as a value: what a binding reads off a dtype and a driver switches on.
#pragma once

#include <stdint.h>

namespace pyroute {

enum class FloatType { float32, bfloat16, float16, float64 };

// Bytes of one element. Static: kernel files of every instruction set see this header.
static inline constexpr int64_t item_size(FloatType type) {
    return type == FloatType::float64 ? 8 : type == FloatType::float32 ? 4 : 2;
}

} // namespace pyroute
