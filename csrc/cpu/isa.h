// Which instruction set serves this process: the best that the CPU has, unless PYROUTE_ISA or a test asks for less.
#pragma once

namespace pyroute::cpu {

enum class Isa { scalar, avx2, avx512 };

bool isa_available(Isa isa);
Isa current_isa();
void set_isa(Isa isa); // the caller has checked isa_available
const char *isa_name(Isa isa);

// The kernels of a room for the current instruction set. A room's header declares a struct of function pointers and
// one constant of it per instruction set with PYROUTE_DECLARE_KERNELS; each ISA folder defines its own.
// current_<name>() is static, so that no copy of it compiled with AVX2 can be shared with the baseline files.
#if defined(PYROUTE_X86)
#define PYROUTE_DECLARE_KERNELS(Kernels, name)                                                                         \
    namespace scalar {                                                                                                 \
    extern const Kernels name;                                                                                         \
    }                                                                                                                  \
    namespace avx2 {                                                                                                   \
    extern const Kernels name;                                                                                         \
    }                                                                                                                  \
    namespace avx512 {                                                                                                 \
    extern const Kernels name;                                                                                         \
    }                                                                                                                  \
    static inline const Kernels &current_##name() {                                                                    \
        switch (current_isa()) {                                                                                       \
        case Isa::avx512:                                                                                              \
            return avx512::name;                                                                                       \
        case Isa::avx2:                                                                                                \
            return avx2::name;                                                                                         \
        default:                                                                                                       \
            return scalar::name;                                                                                       \
        }                                                                                                              \
    }
#else
#define PYROUTE_DECLARE_KERNELS(Kernels, name)                                                                         \
    namespace scalar {                                                                                                 \
    extern const Kernels name;                                                                                         \
    }                                                                                                                  \
    static inline const Kernels &current_##name() { return scalar::name; }
#endif

} // namespace pyroute::cpu
