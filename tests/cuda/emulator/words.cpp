// Where threads meet: collectives of a warp's lanes, barriers of a block. Every rule of the words is checked here.
#include <algorithm>

#include "blocks.h"
#include "machine.h"

namespace emulator {

static constexpr const char *names[] = {"sync_warp",  "shuffle",    "ballot",    "match_any",
                                        "reduce_max", "reduce_min", "reduce_add"};

static const char *name_of(Collective word) { return names[static_cast<int>(word)]; }

static std::string hex(uint32_t mask) {
    char text[16];
    snprintf(text, sizeof(text), "0x%08x", mask);
    return text;
}

// What lane `me` of a complete meeting gets.
static uint64_t result_of(const Meeting &meeting, const Warp &warp, uint32_t me) {
    const uint64_t mine = warp.threads[me].value;
    if (meeting.word == Collective::shuffle) {
        const uint32_t source = warp.threads[me].source;
        return meeting.mask >> source & 1 ? warp.threads[source].value : 0x7f7f7f7f7f7f7f7full; // undefined
    }
    uint64_t result = meeting.word == Collective::reduce_min ? ~uint64_t{0} : 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(meeting.mask >> lane & 1))
            continue;
        const uint64_t value = warp.threads[lane].value;
        switch (meeting.word) {
        case Collective::ballot:
            result |= (value & 1) << lane;
            break;
        case Collective::match_any:
            result |= uint64_t{value == mine} << lane;
            break;
        case Collective::reduce_max:
            result = std::max(result, value);
            break;
        case Collective::reduce_min:
            result = std::min(result, value);
            break;
        case Collective::reduce_add:
            result = (result + value) & 0xffffffffu;
            break;
        default:
            break;
        }
    }
    return result;
}

uint64_t meet(Collective word, uint32_t mask, uint64_t value, uint32_t source) {
    Thread &me = *current;
    Warp &warp = *me.warp;
    const std::string call = std::string(name_of(word)) + " with the mask " + hex(mask);
    if (!(mask >> me.lane & 1))
        fail(call + " does not name the lane that calls it");
    if (mask & warp.exited)
        fail(call + " names a lane that has exited");

    auto meeting = warp.meetings.begin();
    for (; meeting != warp.meetings.end(); ++meeting) {
        if (meeting->word == word && meeting->mask == mask)
            break;
        if ((meeting->arrived & mask) && (meeting->mask >> me.lane & 1)) // each waits for the other
            fail(call + ", while other lanes of it wait at " + name_of(meeting->word) + " with the mask " +
                 hex(meeting->mask));
    }
    if (meeting == warp.meetings.end())
        meeting = warp.meetings.insert(meeting, {word, mask, 0});
    me.value = value;
    me.source = source;
    meeting->arrived |= 1u << me.lane;
    if (meeting->arrived != mask) {
        wait(name_of(word));
        return me.result;
    }
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
            Thread &other = warp.threads[lane];
            other.result = word == Collective::sync_warp ? 0 : result_of(*meeting, warp, lane);
            if (lane != me.lane)
                wake(other);
        }
    warp.meetings.erase(meeting);
    return me.result;
}

void sync_named(uint32_t number, uint32_t threads, bool waits, const char *word) {
    Thread &me = *current;
    Block &block = *me.block;
    NamedBarrier &barrier = block.barriers[number];
    if (threads == 0 || threads % 32 || threads > block.num_threads)
        fail(std::string(word) + ": a barrier of " + std::to_string(threads) + " threads in a block of " +
             std::to_string(block.num_threads));
    if (barrier.arrived && barrier.expected != threads)
        fail(std::string(word) + ": barrier " + std::to_string(number) + " is used for " + std::to_string(threads) +
             " and for " + std::to_string(barrier.expected) + " threads at a time");
    if (threads > block.num_threads - block.exited)
        fail(std::string(word) + " waits for " + std::to_string(threads) + " threads, but " +
             std::to_string(block.exited) + " of the block's have exited");
    barrier.expected = threads;
    if (++barrier.arrived < threads) {
        if (!waits)
            return;
        barrier.waiting.push_back(&me);
        return wait(word);
    }
    barrier.arrived = 0;
    for (Thread *thread : barrier.waiting)
        wake(*thread);
    barrier.waiting.clear();
}

void thread_exits(Thread &thread) {
    Block &block = *thread.block;
    Warp &warp = *thread.warp;
    ++block.exited;
    warp.exited |= 1u << thread.lane;
    for (const Meeting &meeting : warp.meetings)
        if (meeting.mask >> thread.lane & 1)
            fail(std::string("exits, while other lanes wait for it at ") + name_of(meeting.word) + " with the mask " +
                 hex(meeting.mask));
    for (const NamedBarrier &barrier : block.barriers)
        if (!barrier.waiting.empty() && barrier.expected > block.num_threads - block.exited)
            fail(std::string("exits, while ") + std::to_string(barrier.arrived) + " threads wait at " +
                 barrier.waiting.front()->waits_at + " for " + std::to_string(barrier.expected));
}

} // namespace emulator
