// Memory that is handed out again. The first write to fresh pages runs at 2 to 6 GB/s, a second one at 17 and more
// (Zen 4, 256 MiB, two threads), so large blocks are kept when they are given back and serve the next call of a similar
// size: outputs that Python allocates (bindings/memory.cpp) and the kernels' own workspaces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

namespace pyroute::cpu {

// Shorter blocks are the C library's own, which re-uses them well.
constexpr size_t smallest_kept_block = 64 << 10;

// Results that are larger are written past the caches: a reader right after would not find them there anyway.
constexpr int64_t most_cached_result = 8 << 20;

// A block of at least `bytes`, aligned to 64 bytes (to a page, and from 2 MiB on to 2 MiB, if it is large); what it
// holds is arbitrary. Null when there is no memory, even with every kept block released. Any thread may give it back.
void *take_block(size_t bytes) noexcept;
void give_block(void *block) noexcept;          // null is nothing
size_t block_bytes(const void *block) noexcept; // that `block` can hold; of blocks of smallest_kept_block and more

struct MemoryInfo {
    int64_t in_use;   // bytes handed out, by the kept sizes
    int64_t kept;     // bytes waiting for the next call
    int64_t limit;    // of `kept`
    int64_t fresh;    // blocks that came from the system so far
    int64_t recycled; // blocks that were handed out again
};
MemoryInfo memory_info();
void set_memory_limit(int64_t bytes); // at least 0; what is kept above it is released, the longest unused first
int64_t release_memory() noexcept;    // everything that is kept; its bytes
void set_memory_fill(int byte);       // each block taken from now on is filled with this byte; -1: is not

// Workspace of one call: `count` items that are not initialised, aligned to 64 bytes. Give each thread its part, or
// let each take its own.
template <class T> class Workspace {
    static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T> && alignof(T) <= 64);

  public:
    Workspace() = default;
    explicit Workspace(int64_t count) {
        const auto n = static_cast<size_t>(count);
        if (count < 0 || n > std::numeric_limits<size_t>::max() / sizeof(T))
            throw std::bad_alloc();
        small_ = n * sizeof(T) < smallest_kept_block;
        data_ =
            static_cast<T *>(small_ ? ::operator new(n * sizeof(T), std::align_val_t{64}) : take_block(n * sizeof(T)));
        if (!data_)
            throw std::bad_alloc();
    }
    ~Workspace() {
        if (small_)
            ::operator delete(static_cast<void *>(data_), std::align_val_t{64});
        else
            give_block(data_);
    }
    Workspace(Workspace &&other) noexcept
        : data_(std::exchange(other.data_, nullptr)), small_(std::exchange(other.small_, false)) {}
    Workspace &operator=(Workspace &&other) noexcept {
        std::swap(data_, other.data_);
        std::swap(small_, other.small_);
        return *this;
    }
    T *get() const { return data_; }
    T &operator[](int64_t i) const { return data_[i]; }

  private:
    T *data_ = nullptr;
    bool small_ = false;
};

} // namespace pyroute::cpu
