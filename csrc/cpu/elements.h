// Eight consecutive elements of an array of any float type, as lanes wide enough to compute in: float32 for float32,
// bfloat16 and float16, float64 for float64. Stores round once and write every NaN as the canonical one. Partial loads
// and stores touch nothing past the count.
#pragma once

#include "cpu/half.h"

namespace pyroute::cpu::PYROUTE_ISA {

using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = int64_t __attribute__((vector_size(64)));

template <> struct Lane<f64x8> {
    using Scalar = double;
    using Int = i64x8;
    using Uint = uint64_t __attribute__((vector_size(64)));
    static constexpr int width = 8;
};

// Every NaN as the one quiet NaN, so that bytes agree between machines.
PYROUTE_INLINE f32x8 canonical(const f32x8 &v) {
    const i32x8 nan = less(i32x8{} + 0x7f800000, bit_cast<i32x8>(v) & 0x7fffffff);
    return select(nan, bit_cast<f32x8>(u32x8{} + 0x7fc00000), v);
}
PYROUTE_INLINE f64x8 canonical(const f64x8 &v) { return v == v ? v : bit_cast<f64x8>(i64x8{} + 0x7ff8000000000000); }

struct Float32 {
    using Storage = float;
    using Wide = f32x8;
    using Scalar = float;
    PYROUTE_INLINE f32x8 widen(const f32x8 &v) { return v; }
    PYROUTE_INLINE f32x8 narrow(const f32x8 &v) { return canonical(v); }
    using Packed = f32x8;
};

struct Bfloat16 {
    using Storage = uint16_t;
    using Wide = f32x8;
    using Scalar = float;
    using Packed = u16x8;
    PYROUTE_INLINE f32x8 widen(const u16x8 &v) { return bf16_to_f32(v); }
    // f32_to_bf16 less its care for NaN, since rounding keeps the canonical one
    PYROUTE_INLINE u16x8 narrow(const f32x8 &v) {
        const u32x8 bits = bit_cast<u32x8>(canonical(v));
        return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x8);
    }
};

struct Float16 {
    using Storage = uint16_t;
    using Wide = f32x8;
    using Scalar = float;
    using Packed = u16x8;
    PYROUTE_INLINE f32x8 widen(const u16x8 &v) { return f16_to_f32(v); }
    PYROUTE_INLINE u16x8 narrow(const f32x8 &v) { return f32_to_f16(canonical(v)); }
};

struct Float64 {
    using Storage = double;
    using Wide = f64x8;
    using Scalar = double;
    using Packed = f64x8;
    PYROUTE_INLINE f64x8 widen(const f64x8 &v) { return v; }
    PYROUTE_INLINE f64x8 narrow(const f64x8 &v) { return canonical(v); }
};

template <class Type> PYROUTE_INLINE typename Type::Wide load_elements(const typename Type::Storage *from) {
    return Type::widen(load<typename Type::Packed>(from));
}

// The lanes past `count` are zero.
template <class Type>
PYROUTE_INLINE typename Type::Wide load_elements(const typename Type::Storage *from, int64_t count) {
    typename Type::Packed packed = {};
    memcpy(&packed, from, static_cast<size_t>(count) * sizeof(*from));
    return Type::widen(packed);
}

template <class Type> PYROUTE_INLINE void store_elements(typename Type::Storage *to, const typename Type::Wide &v) {
    store(to, Type::narrow(v));
}

template <class Type>
PYROUTE_INLINE void store_elements(typename Type::Storage *to, const typename Type::Wide &v, int64_t count) {
    const typename Type::Packed packed = Type::narrow(v);
    memcpy(to, &packed, static_cast<size_t>(count) * sizeof(*to));
}

} // namespace pyroute::cpu::PYROUTE_ISA
