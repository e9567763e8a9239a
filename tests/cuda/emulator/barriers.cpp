// Phase barriers (mbarrier): arrivals and bytes are counted exactly, and every step out of the protocol is reported.
#include <cstring>

#include "copies.h"

namespace emulator {

static constexpr uint64_t mark = 0xb0a7dd3e5a11c0deull; // what lies in shared memory for a barrier
static constexpr uint32_t most = (1u << 20) - 1;        // arrivals, and bytes either way

static std::string place_of(const Block &block, uint32_t offset) {
    return "the barrier at byte " + std::to_string(offset) + " of block " + std::to_string(block.index.x);
}

static uint32_t offset_of(const Block &block, uint32_t address, const char *word) {
    if (address % 8)
        fail(std::string(word) + " of a barrier whose address is no multiple of 8");
    return static_cast<uint32_t>(shared_pointer(block, address, 8, word) - block.memory);
}

static PhaseBarrier &find(Block &block, uint32_t address, const char *word) {
    const uint32_t offset = offset_of(block, address, word);
    const auto barrier = block.phase_barriers.find(offset);
    if (barrier == block.phase_barriers.end())
        fail(std::string(word) + ": " + place_of(block, offset) + " is not initialised");
    if (std::memcmp(block.memory + offset, &mark, 8) != 0)
        fail(std::string(word) + ": " + place_of(block, offset) + " was overwritten");
    return barrier->second;
}

// That it is initialised may be known to some threads only, and chance for others.
static PhaseBarrier &find_as_thread(Block &block, uint32_t address, const char *word) {
    PhaseBarrier &barrier = find(block, address, word);
    if (!is_past(barrier.initialised))
        fail("race: " + std::string(word) + ": nothing orders the initialisation of " +
             place_of(block, offset_of(block, address, word)) + " before it");
    return barrier;
}

void check_initialised(Block &block, uint32_t address, const char *word) { find_as_thread(block, address, word); }

void barrier_init(uint32_t address, uint32_t count) {
    Block &block = *current->block;
    const uint32_t offset = offset_of(block, address, "barrier_init");
    if (count == 0 || count > most)
        fail("barrier_init with a count of " + std::to_string(count));
    if (!block.phase_barriers.emplace(offset, PhaseBarrier{count, count, 0, 0, {}, {}, false, current, moment(), {}})
             .second)
        fail("barrier_init: " + place_of(block, offset) + " is initialised already");
    std::memcpy(block.memory + offset, &mark, 8);
}

void barrier_init_fence() {
    for (auto &[offset, barrier] : current->block->phase_barriers)
        if (barrier.owner == current)
            barrier.fenced = true;
}

static void end_phase_if_complete(PhaseBarrier &barrier) {
    if (barrier.pending || barrier.bytes)
        return;
    ++barrier.phase;
    barrier.pending = barrier.count;
    barrier.ended = barrier.arrivals;
    for (Thread *thread : barrier.waiting)
        wake(*thread);
    barrier.waiting.clear();
}

void barrier_arrive(Block &block, uint32_t address, int64_t expected_bytes, const char *word) {
    PhaseBarrier &barrier = find_as_thread(block, address, word);
    if (&block != current->block && !barrier.fenced)
        fail(std::string(word) + " at a barrier of another block that was not fenced after its initialisation");
    if (barrier.pending == 0)
        fail(std::string(word) + ": more than " + std::to_string(barrier.count) + " arrivals in a phase of " +
             place_of(block, offset_of(block, address, word)));
    release(barrier.arrivals);
    barrier.bytes += expected_bytes;
    --barrier.pending;
    if (barrier.bytes > static_cast<int64_t>(most))
        fail(std::string(word) + ": " + std::to_string(barrier.bytes) + " bytes expected, more than a barrier counts");
    if (barrier.pending == 0 && barrier.bytes < 0)
        fail(std::string(word) + ": " + std::to_string(-barrier.bytes) + " more bytes landed than were expected at " +
             place_of(block, offset_of(block, address, word)));
    end_phase_if_complete(barrier);
}

void barrier_complete(Block &block, uint32_t address, int64_t bytes, const Moment &copy) {
    PhaseBarrier &barrier = find(block, address, "a copy");
    release_copy(barrier.arrivals, copy);
    if (!barrier.fenced)
        fail("a copy counts at a barrier that was not fenced after its initialisation");
    barrier.bytes -= bytes;
    if (barrier.bytes < -static_cast<int64_t>(most) || (barrier.pending == 0 && barrier.bytes < 0))
        fail("a copy: " + std::to_string(-barrier.bytes) + " more bytes landed than were expected at " +
             place_of(block, offset_of(block, address, "a copy")));
    end_phase_if_complete(barrier);
}

bool barrier_try_wait(uint32_t address, uint32_t parity) {
    PhaseBarrier &barrier = find_as_thread(*current->block, address, "barrier_try_wait");
    if (parity > 1)
        fail("barrier_try_wait for the parity " + std::to_string(parity));
    if ((barrier.phase & 1) != parity) {
        acquire(barrier.ended);
        return true;
    }
    if (random_below(8) == 0) { // it may give up at any time
        pause("barrier_try_wait");
        return false;
    }
    barrier.waiting.push_back(current);
    wait("barrier_try_wait");
    if ((barrier.phase & 1) == parity)
        return false;
    acquire(barrier.ended);
    return true;
}

std::string barriers_waited_for(const Block &block) {
    std::string text;
    for (const auto &[offset, barrier] : block.phase_barriers)
        if (!barrier.waiting.empty())
            text += "; " + place_of(block, offset) + " is in phase " + std::to_string(barrier.phase) + " and misses " +
                    std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) + " arrivals and " +
                    std::to_string(barrier.bytes) + " bytes";
    return text;
}

} // namespace emulator
