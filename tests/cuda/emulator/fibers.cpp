#include "fibers.h"

#include <cstdint>
#include <new>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

static constexpr size_t guard_bytes = 4096;

Stacks::~Stacks() {
    for (char *stack : all_)
        munmap(stack - guard_bytes, bytes + guard_bytes);
}

char *Stacks::take() {
    if (free_.empty()) {
        void *region = mmap(nullptr, bytes + guard_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (region == MAP_FAILED)
            throw std::bad_alloc();
        mprotect(region, guard_bytes, PROT_NONE);
        all_.push_back(static_cast<char *>(region) + guard_bytes);
        free_.push_back(all_.back());
    }
    char *stack = free_.back();
    free_.pop_back();
    return stack;
}

void Stacks::give_all() { free_ = all_; }

bool Stacks::guards(const void *address) const {
    const char *byte = static_cast<const char *>(address);
    for (const char *stack : all_)
        if (byte >= stack - guard_bytes && byte < stack)
            return true;
    return false;
}

// The tops differ by a few cache lines, since stacks at the same offset in their pages would share a few cache sets.
static char *top_of(char *stack) {
    const uintptr_t spread = (reinterpret_cast<uintptr_t>(stack) / Stacks::bytes * 5 % 61) * 64;
    return stack + Stacks::bytes - spread;
}

#if defined(__x86_64__)

extern "C" void pyroute_emulator_switch(Context *from, Context to);

// Callee-saved registers only; the floating-point mode is the same in every fiber.
asm(R"(
.text
.hidden pyroute_emulator_switch
.type pyroute_emulator_switch, @function
.globl pyroute_emulator_switch
pyroute_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size pyroute_emulator_switch, .-pyroute_emulator_switch
)");

void switch_context(Context *from, Context to) { pyroute_emulator_switch(from, to); }

Context new_context(char *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(top_of(stack)) & ~uintptr_t{63});
    *--top = nullptr; // where entry() would return to; its frame is aligned as after a call
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; ++i)
        *--top = nullptr;
    return top;
}

#else // the portable, slower way; the context lies at the bottom of the stack

void switch_context(Context *from, Context to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t *>(to));
}

Context new_context(char *stack, void (*entry)()) {
    auto *context = new (stack) ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
    context->uc_stack.ss_size = static_cast<size_t>(top_of(stack) - stack) - sizeof(ucontext_t);
    makecontext(context, entry, 0);
    return context;
}

#endif

} // namespace emulator
