// Fibers: stacks that take turns on one thread of the host. What a switch saves is what a function call keeps.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

using Context = void *; // where a fiber was left: its stack pointer

// Leaves the running fiber in *from and goes on with `to`.
void switch_context(Context *from, Context to);

// Stacks with an inaccessible page below each, used again last in, first out.
class Stacks {
  public:
    static constexpr size_t bytes = 128 * 1024;

    ~Stacks();
    char *take(); // the lowest address that may be used
    void give(char *stack) { free_.push_back(stack); }
    void give_all(); // also those of fibers that were left in the middle
    bool guards(const void *address) const;

  private:
    std::vector<char *> free_, all_;
};

// A fiber that starts with entry(), which must never return.
Context new_context(char *stack, void (*entry)());

} // namespace emulator
