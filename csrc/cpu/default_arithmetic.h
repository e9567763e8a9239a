#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyroute::cpu {

// Arithmetic as IEEE 754 has it by default while it lives: to nearest, subnormals kept, nothing trapped. A thread's
// mode is otherwise what its caller or its creator left: libraries built with -ffast-math have subnormals flushed from
// their import on, torch.set_flush_denormal does so on purpose, and feenableexcept ends the process at the first NaN.
class DefaultArithmetic {
  public:
    DefaultArithmetic() {
        if (differs(mode_))
            set((mode_ & ~control) | by_default);
    }
    ~DefaultArithmetic() {
        if (differs(mode_))
            set(mode_);
    }
    DefaultArithmetic(const DefaultArithmetic &) = delete;
    DefaultArithmetic &operator=(const DefaultArithmetic &) = delete;

  private:
#if defined(__SSE2__)
    using Mode = unsigned;
    static constexpr Mode control = 0xffc0, by_default = 0x1f80;
    static Mode get() { return _mm_getcsr(); }
    static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
    using Mode = uint64_t;
    static constexpr Mode control = ~Mode{0}, by_default = 0;
    static Mode get() {
        Mode mode;
        asm volatile("mrs %0, fpcr" : "=r"(mode));
        return mode;
    }
    static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
    using Mode = unsigned;
    static constexpr Mode control = 0, by_default = 0;
    static Mode get() { return 0; }
    static void set(Mode) {}
#endif
    static bool differs(Mode mode) { return (mode & control) != by_default; }
    const Mode mode_ = get();
};

} // namespace pyroute::cpu
