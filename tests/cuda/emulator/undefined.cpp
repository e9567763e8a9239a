// What the compiler finds undefined in a kernel while it runs (-fsanitize) ends the launch in a sentence with the line.
// These are the hooks that the compiler calls; no sanitizer library is linked.
#include <cstdint>
#include <string>

#include "machine.h"

namespace {

// Every hook's data begins with the place in the source.
struct Place {
    const char *file;
    uint32_t line, column;
};

[[noreturn]] void report(const Place *place, const char *what) {
    const std::string file = place->file;
    emulator::fail(std::string(what) + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place->line));
}

} // namespace

#define HOOK(name, what)                                                                                               \
    extern "C" void __ubsan_handle_##name##_abort(const Place *place);                                                 \
    extern "C" void __ubsan_handle_##name##_abort(const Place *place) { report(place, what); }

HOOK(type_mismatch_v1, "a misaligned address")
HOOK(out_of_bounds, "an index outside of an array")
HOOK(shift_out_of_bounds, "a shift by too many bits")
HOOK(add_overflow, "a sum that overflows")
HOOK(sub_overflow, "a difference that overflows")
HOOK(mul_overflow, "a product that overflows")
HOOK(negate_overflow, "a negation that overflows")
HOOK(divrem_overflow, "a division by zero, or one that overflows")
HOOK(float_cast_overflow, "a float that no integer of the type holds")
HOOK(missing_return, "a missing return")

extern "C" void __ubsan_handle_builtin_unreachable(const Place *place);
extern "C" void __ubsan_handle_builtin_unreachable(const Place *place) { report(place, "what was called unreachable"); }
