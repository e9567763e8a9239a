// The pool: a block comes back for its own size only, is whole and aligned, and is released as the limit says; with
// threads, after a fork, and when there is no memory.
#include <sys/resource.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "check.h"
#include "cpu/memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace pyroute;
using namespace pyroute::cpu;

namespace {

constexpr int KiB = 1 << 10, MiB = 1 << 20;

bool is_aligned(const void *block, size_t alignment) { return reinterpret_cast<uintptr_t>(block) % alignment == 0; }

void blocks_are_whole_and_aligned() {
    test::Random random(1);
    for (int i = 0; i < 300; ++i) {
        const auto bytes = static_cast<size_t>(random.integer(1, int64_t{1} << random.integer(4, 24)));
        auto *block = static_cast<char *>(take_block(bytes));
        CHECK(block && is_aligned(block, 64));
        const size_t held = block_bytes(block);
        CHECK(held >= bytes && (held <= smallest_kept_block || held - bytes <= held / 9));
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
        CHECK(held < (2 << 20) || is_aligned(block, 2 << 20));
#endif
        std::memset(block, i, bytes);
        give_block(block);
    }
    give_block(nullptr);
    CHECK(take_block(SIZE_MAX) == nullptr && take_block(size_t{1} << 62) == nullptr);
    CHECK(memory_info().in_use == 0);
}

void a_block_serves_its_own_size_again() {
    release_memory();
    for (int size : {64 * KiB, 100 * KiB, 3 * MiB, 20 * MiB}) {
        const auto bytes = static_cast<size_t>(size);
        void *const first = take_block(bytes), *const second = take_block(bytes);
        CHECK(first != second);
        give_block(first);
        CHECK(memory_info().kept >= static_cast<int64_t>(bytes));
        void *const other = take_block(2 * bytes);
        CHECK(other != first);
        CHECK(take_block(bytes - KiB) == first); // sizes are rounded up
        give_block(first);
        give_block(second);
        CHECK(take_block(bytes) == second); // the last one first
        give_block(second);
        give_block(other);
    }
    const int64_t kept = memory_info().kept;
    CHECK(release_memory() == kept && memory_info().kept == 0);
}

void the_limit_holds() {
    const int64_t before = memory_info().limit;
    set_memory_limit(3 * MiB);
    std::vector<void *> blocks;
    for (int i = 0; i < 5; ++i)
        blocks.push_back(take_block(MiB));
    for (void *block : blocks)
        give_block(block);
    CHECK(memory_info().kept == 3 * MiB);
    const int64_t fresh = memory_info().fresh;
    for (size_t i : {4, 3, 2}) // the two that were unused longest are gone
        CHECK(take_block(MiB) == blocks[i]);
    CHECK(memory_info().fresh == fresh && memory_info().kept == 0);
    for (size_t i : {2, 3, 4})
        give_block(blocks[i]);
    give_block(take_block(4 * MiB)); // more than may be kept
    CHECK(memory_info().kept <= 3 * MiB);
    release_memory();
    void *const sizes[] = {take_block(MiB), take_block(2 * MiB), take_block(MiB + MiB / 4)};
    for (void *block : sizes) // over the limit with the last one: the first two go, whatever their size
        give_block(block);
    CHECK(memory_info().kept == MiB + MiB / 4);
    set_memory_limit(0);
    CHECK(memory_info().kept == 0);
    give_block(take_block(MiB));
    CHECK(memory_info().kept == 0);
    set_memory_limit(before);
}

void blocks_can_be_filled() {
    set_memory_fill(0x5a);
    for (int again = 0; again < 2; ++again) {
        auto *block = static_cast<unsigned char *>(take_block(MiB));
        CHECK(block[0] == 0x5a && block[MiB - 1] == 0x5a);
        std::memset(block, 0, MiB);
        give_block(block);
    }
    set_memory_fill(-1);
}

void threads_share_it() {
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([t] {
            test::Random random(static_cast<uint64_t>(t));
            std::vector<std::pair<unsigned char *, size_t>> mine;
            for (int i = 0; i < 400; ++i) {
                if (mine.size() < 8 && random.one_in(2)) {
                    const auto bytes = static_cast<size_t>(random.integer(1, 400 << 10));
                    auto *block = static_cast<unsigned char *>(take_block(bytes));
                    std::memset(block, t + 1, bytes);
                    mine.emplace_back(block, bytes);
                } else if (!mine.empty()) {
                    const auto [block, bytes] = mine.back(); // nobody else has written to it
                    CHECK(block[0] == t + 1 && block[bytes / 2] == t + 1 && block[bytes - 1] == t + 1);
                    give_block(block);
                    mine.pop_back();
                }
            }
            for (const auto &one : mine)
                give_block(one.first);
        });
    for (std::thread &thread : threads)
        thread.join();
    CHECK(memory_info().in_use == 0);
}

template <class Body> void in_child(Body &&body) {
    const pid_t child = fork();
    if (child == 0) {
        body();
        std::_Exit(0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

void a_child_starts_anew() {
    auto *const mine = static_cast<unsigned char *>(take_block(MiB));
    mine[7] = 7;
    give_block(take_block(2 * MiB));
    give_block(take_block(3 * MiB));
    const int64_t kept = memory_info().kept;
    in_child([&] {
        auto *const block = static_cast<unsigned char *>(take_block(2 * MiB));
        CHECK(memory_info().kept == 0); // those pages are the parent's
        std::memset(block, 1, 2 * MiB);
        CHECK(mine[7] == 7);
        give_block(mine);
        give_block(block);
    });
    CHECK(memory_info().kept == kept && mine[7] == 7);
    give_block(mine);
}

void kept_blocks_make_room() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    in_child([] {
        void *const kept = take_block(256 * MiB);
        struct rlimit most = {512 * MiB, 512 * MiB};
        give_block(kept);
        CHECK(setrlimit(RLIMIT_AS, &most) == 0);
        CHECK(take_block(320 * MiB)); // there is room for one of them only
        CHECK(!take_block(320 * MiB));
        bool refused = false;
        try {
            const Workspace<float> too_large(100 << 20);
        } catch (const std::bad_alloc &) {
            refused = true;
        }
        CHECK(refused);
    });
#endif
}

void what_is_not_handed_out_is_poisoned() {
#if defined(__SANITIZE_ADDRESS__)
    auto *const block = static_cast<char *>(take_block(100 * KiB + 3));
    CHECK(!__asan_address_is_poisoned(block + 100 * KiB + 2) && __asan_address_is_poisoned(block + 100 * KiB + 3));
    give_block(block);
    CHECK(__asan_address_is_poisoned(block) && __asan_address_is_poisoned(block + 50 * KiB));
    CHECK(take_block(101 * KiB) == block && !__asan_address_is_poisoned(block + 100 * KiB + 3));
    give_block(block);
#endif
}

void workspaces() {
    const int64_t in_use = memory_info().in_use;
    {
        const Workspace<float> none, empty(0), small(100), large(1 << 20);
        CHECK(!none.get() && is_aligned(small.get(), 64) && is_aligned(large.get(), 64));
        small[99] = large[(1 << 20) - 1] = 1.0f;
        CHECK(memory_info().in_use == in_use + (4 << 20));
        Workspace<float> moved(std::move(const_cast<Workspace<float> &>(large)));
        moved = Workspace<float>(1 << 19);
        CHECK(memory_info().in_use == in_use + (2 << 20));
    }
    CHECK(memory_info().in_use == in_use);
    for (int64_t count : {int64_t{-1}, INT64_MAX, INT64_MAX / 8}) {
        bool refused = false;
        try {
            const Workspace<double> impossible(count);
        } catch (const std::bad_alloc &) {
            refused = true;
        }
        CHECK(refused);
    }
}

} // namespace

int main() {
    set_memory_limit(256 << 20); // none by default under the sanitizers
    set_memory_fill(-1);
    blocks_are_whole_and_aligned();
    a_block_serves_its_own_size_again();
    the_limit_holds();
    blocks_can_be_filled();
    a_child_starts_anew();
    kept_blocks_make_room();
    what_is_not_handed_out_is_poisoned();
    workspaces();
    threads_share_it();
    release_memory();
}
