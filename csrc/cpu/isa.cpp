#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyroute::cpu {

bool isa_available(Isa isa) {
#if defined(PYROUTE_X86)
    // GCC's tests include what the operating system saves: a CPU flag without XSAVE state does not count.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    switch (isa) {
    case Isa::avx512: // AVX-512 without its byte permutations (before Ice Lake and Zen 4) is served by AVX2
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vbmi");
    case Isa::avx2:
        return avx2;
    default:
        return true;
    }
#else
    return isa == Isa::scalar;
#endif
}

const char *isa_name(Isa isa) {
    static const char *const names[] = {"scalar", "avx2", "avx512"};
    return names[static_cast<int>(isa)];
}

namespace {

Isa best_isa() {
    const char *wanted = std::getenv("PYROUTE_ISA"); // an instruction set that is not there is passed over
    for (Isa isa : {Isa::avx512, Isa::avx2, Isa::scalar})
        if (wanted && std::strcmp(wanted, isa_name(isa)) == 0 && isa_available(isa))
            return isa;
    for (Isa isa : {Isa::avx512, Isa::avx2})
        if (isa_available(isa))
            return isa;
    return Isa::scalar;
}

std::atomic<Isa> &selected() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

} // namespace

Isa current_isa() { return selected().load(std::memory_order_relaxed); }
void set_isa(Isa isa) { selected().store(isa, std::memory_order_relaxed); }

} // namespace pyroute::cpu
