// The pool behind take_block. A block is a mapping of its own; sizes are rounded up to eight steps per power of two, so
// that 11 % are unused at most, and a kept block serves its own size only. Blocks of 2 MiB and more start at 2 MiB and
// ask for huge pages: fresh ones are then written three times as fast (6.3 against 2.1 GB/s, 256 MiB) and unmapped
// thirty times. MAP_POPULATE gains nothing over the kernels' own threads touching the pages (2.7, with huge pages 5.2
// to 5.7). Kept blocks of 16 MiB and more that nobody took for a second are offered to the kernel with MADV_FREE: if
// memory runs short elsewhere their pages go before anything is killed. Offered at once, every call paid for it (two
// threads: the other one's translations are flushed huge page by huge page): permute to 128 MiB took 4.5 ms instead
// of 2.9. Under the sanitizers blocks are operator new's, nothing is kept unless a test asks for it, and what is kept
// or lies past the end is poisoned.
#include "cpu/memory.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <unordered_map>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace pyroute::cpu {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

constexpr size_t page = 4096, huge_page = 2 << 20, offered_block = 16 << 20;
constexpr int num_classes = 8 * 32;          // 64 KiB to 2**48 bytes
constexpr int64_t idle_time = 1'000'000'000; // ns

// Size classes: 8, 9, ... 15 eighths of each power of two.
struct SizeClass {
    int index;
    size_t bytes;
};
SizeClass class_of(size_t bytes) {
    size_t power = smallest_kept_block;
    int octave = 0;
    for (bytes = std::max(bytes, power); power <= bytes / 2; power *= 2)
        ++octave;
    const size_t steps = (bytes - 1) / (power / 8) + 1; // 8..16
    return {8 * octave + static_cast<int>(steps) - 8, steps * (power / 8)};
}

void *map(size_t bytes) noexcept {
    const size_t alignment = bytes >= huge_page ? huge_page : page;
    if (sanitized) {
        try {
            return ::operator new(bytes, std::align_val_t{page});
        } catch (const std::bad_alloc &) {
            return nullptr;
        }
    }
    const size_t spare = alignment - page;
    void *raw = mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return nullptr;
    auto *const begin = static_cast<char *>(raw);
    const size_t skip = (alignment - reinterpret_cast<uintptr_t>(begin) % alignment) % alignment;
    if (spare > 0) {
        if (skip > 0)
            munmap(begin, skip);
        if (skip < spare)
            munmap(begin + skip + bytes, spare - skip);
#if defined(MADV_HUGEPAGE)
        madvise(begin + skip, bytes, MADV_HUGEPAGE);
#endif
    }
    return begin + skip;
}

void unmap(void *block, size_t bytes) noexcept {
    ASAN_UNPOISON_MEMORY_REGION(block, bytes);
    if (sanitized)
        ::operator delete(block, std::align_val_t{page});
    else
        munmap(block, bytes);
}

// A sixteenth of what the machine, or the container, may use.
int64_t sixteenth_of_memory() {
    int64_t memory = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    for (const char *file : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"})
        if (std::FILE *f = std::fopen(file, "re")) {
            long long most = 0; // "max" is no number
            if (std::fscanf(f, "%lld", &most) == 1 && most > 0)
                memory = std::min<int64_t>(memory, most);
            std::fclose(f);
        }
    return std::max<int64_t>(memory / 16, 64 << 20);
}

// PYROUTE_CACHE_LIMIT in bytes, or a number with K, M or G behind it; anything else is passed over.
int64_t first_limit() {
    if (const char *wanted = std::getenv("PYROUTE_CACHE_LIMIT")) {
        char *end = nullptr;
        const double number = std::strtod(wanted, &end);
        const char *const units = "KMG";
        const char *const unit = *end ? std::strchr(units, *end) : nullptr;
        const double bytes = number * static_cast<double>(int64_t{1} << (unit ? 10 * (unit - units + 1) : 0));
        if (end != wanted && (!*end || (unit && !end[1])) && bytes >= 0 && bytes < 9e18)
            return static_cast<int64_t>(bytes);
    }
    return sanitized ? 0 : sixteenth_of_memory();
}

// glibc's variable for the same purpose: new memory holds the complement of its low byte.
int first_fill() {
    const char *perturb = std::getenv("MALLOC_PERTURB_");
    const int value = perturb ? std::atoi(perturb) & 0xff : 0;
    return value ? value ^ 0xff : -1;
}

struct Block {
    void *data;
    SizeClass size;
    int64_t given; // when it came back, ns
    bool offered;  // since then
};
using Blocks = std::list<Block>;

// The contents are no longer wanted; the pages stay until somebody needs them more.
void offer(Block &block) noexcept {
    block.offered = true;
#if defined(MADV_FREE)
    if (!sanitized && block.size.bytes >= offered_block)
        madvise(block.data, block.size.bytes, MADV_FREE);
#endif
}

int64_t nanoseconds() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class Pool {
  public:
    static Pool &get() { // never destroyed: arrays outlive static objects
        static Pool &pool = *new Pool;
        return pool;
    }

    void *take(size_t bytes) noexcept {
        if (bytes > size_t{1} << 47)
            return nullptr;
        const SizeClass size = class_of(bytes);
        void *data = recycle(size);
        if (!data)
            data = fresh(size);
        if (!data && release() > 0)
            data = fresh(size);
        if (!data)
            return nullptr;
        ASAN_UNPOISON_MEMORY_REGION(data, size.bytes);
        ASAN_POISON_MEMORY_REGION(static_cast<char *>(data) + bytes, size.bytes - bytes);
        if (const int byte = fill.load(std::memory_order_relaxed); byte >= 0)
            std::memset(data, byte, bytes);
        return data;
    }

    void give(void *data) noexcept {
        Blocks unused;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            const auto known = blocks_.find(data);
            if (known == blocks_.end())
                return;
            const Blocks::iterator block = known->second;
            block->given = nanoseconds();
            block->offered = false;
            in_use_bytes_ -= block->size.bytes;
            kept_bytes_ += block->size.bytes;
            Blocks &same = kept_[block->size.index];
            same.splice(same.begin(), in_use_, block);
            ASAN_POISON_MEMORY_REGION(data, block->size.bytes);
            shrink(limit_, unused);
            offer_idle(block->given);
        }
        unmap_all(unused);
    }

    size_t bytes_of(const void *data) noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto known = blocks_.find(const_cast<void *>(data));
        return known == blocks_.end() ? 0 : known->second->size.bytes;
    }

    size_t release(size_t but = 0) noexcept {
        Blocks unused;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            shrink(but, unused);
        }
        return unmap_all(unused);
    }

    void set_limit(size_t bytes) noexcept {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            limit_ = bytes;
        }
        release(bytes);
    }

    MemoryInfo info() noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        return {static_cast<int64_t>(in_use_bytes_), static_cast<int64_t>(kept_bytes_), static_cast<int64_t>(limit_),
                num_fresh_, num_recycled_};
    }

    std::atomic<int> fill{first_fill()};

  private:
    Pool() {
        pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                       [] {
                           get().forked_ = true; // the kept pages are the parent's too: writing one would copy it
                           get().mutex_.unlock();
                       });
    }

    void *recycle(SizeClass size) noexcept {
        Blocks unused;
        void *data = nullptr;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (std::exchange(forked_, false))
                shrink(0, unused);
            Blocks &same = kept_[size.index];
            if (!same.empty()) {
                data = same.front().data; // the last one that came back: most likely still in cache
                in_use_.splice(in_use_.begin(), same, same.begin());
                kept_bytes_ -= size.bytes;
                in_use_bytes_ += size.bytes;
                ++num_recycled_;
            }
        }
        unmap_all(unused);
        return data;
    }

    void *fresh(SizeClass size) noexcept {
        void *data = map(size.bytes);
        if (!data)
            return nullptr;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            Blocks one{{data, size, 0, false}};
            blocks_.emplace(data, one.begin());
            in_use_.splice(in_use_.begin(), one);
            in_use_bytes_ += size.bytes;
            ++num_fresh_;
        } catch (const std::bad_alloc &) {
            unmap(data, size.bytes);
            return nullptr;
        }
        return data;
    }

    // Moves kept blocks, the longest unused first, to `unused` until no more than `most` bytes are kept.
    void shrink(size_t most, Blocks &unused) noexcept {
        while (kept_bytes_ > most) {
            Blocks *oldest = nullptr;
            for (Blocks &same : kept_)
                if (!same.empty() && (!oldest || same.back().given < oldest->back().given))
                    oldest = &same;
            const auto last = std::prev(oldest->end());
            kept_bytes_ -= last->size.bytes;
            blocks_.erase(last->data);
            unused.splice(unused.end(), *oldest, last);
        }
    }

    // Once per idle_time.
    void offer_idle(int64_t now) noexcept {
        if (now - last_offer_ < idle_time)
            return;
        last_offer_ = now;
        for (Blocks &same : kept_)
            for (auto block = same.rbegin(); block != same.rend() && now - block->given >= idle_time; ++block)
                if (!block->offered)
                    offer(*block);
    }

    static size_t unmap_all(Blocks &unused) noexcept { // without the lock: a large block takes milliseconds
        size_t bytes = 0;
        for (const Block &block : unused) {
            unmap(block.data, block.size.bytes);
            bytes += block.size.bytes;
        }
        return bytes;
    }

    std::mutex mutex_;
    std::unordered_map<void *, Blocks::iterator> blocks_; // all of them, by address
    Blocks in_use_, kept_[num_classes];                   // each class: the last one that came back first
    size_t in_use_bytes_ = 0, kept_bytes_ = 0, limit_ = static_cast<size_t>(first_limit());
    int64_t last_offer_ = 0;
    int64_t num_fresh_ = 0, num_recycled_ = 0;
    bool forked_ = false;
};

} // namespace

void *take_block(size_t bytes) noexcept { return Pool::get().take(bytes); }
void give_block(void *block) noexcept {
    if (block)
        Pool::get().give(block);
}
size_t block_bytes(const void *block) noexcept { return Pool::get().bytes_of(block); }
MemoryInfo memory_info() { return Pool::get().info(); }
void set_memory_limit(int64_t bytes) { Pool::get().set_limit(static_cast<size_t>(bytes)); }
int64_t release_memory() noexcept { return static_cast<int64_t>(Pool::get().release()); }
void set_memory_fill(int byte) { Pool::get().fill.store(byte, std::memory_order_relaxed); }

} // namespace pyroute::cpu
