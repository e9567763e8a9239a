// Where threads meet: collectives of a warp's lanes, barriers of a block. Every rule of the words is checked here.
#include <algorithm>

#include "blocks.h"
#include "copies.h"
#include "machine.h"

namespace emulator {

static constexpr const char *names[] = {
    "sync_warp",  "shuffle",        "ballot",         "match_any",     "reduce_max",     "reduce_min", "reduce_add",
    "elect_lane", "give_registers", "take_registers", "load_matrices", "store_matrices", "a product",  "matrix_wait"};

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
    if (meeting.word == Collective::elect_lane)
        return elected_lane() == me;
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

static std::string call(Collective word, uint32_t mask) {
    return std::string(name_of(word)) + " with the mask " + hex(mask);
}

// Arrives at the meeting; it is complete when all of its lanes have.
static std::vector<Meeting>::iterator arrive(Warp &warp, const Thread &me, Collective word, uint32_t mask) {
    if (!(mask >> me.lane & 1))
        fail(call(word, mask) + " does not name the lane that calls it");
    if (mask & warp.exited)
        fail(call(word, mask) + " names a lane that has exited");
    auto meeting = warp.meetings.begin();
    for (; meeting != warp.meetings.end(); ++meeting) {
        if (meeting->word == word && meeting->mask == mask)
            break;
        if ((meeting->arrived & mask) && (meeting->mask >> me.lane & 1)) // each waits for the other
            fail(call(word, mask) + ", while other lanes of it wait at " + call(meeting->word, meeting->mask));
    }
    if (meeting == warp.meetings.end())
        meeting = warp.meetings.insert(meeting, {word, mask, 0});
    meeting->arrived |= 1u << me.lane;
    return meeting;
}

static void leave(Warp &warp, std::vector<Meeting>::iterator meeting) {
    const uint32_t mask = meeting->mask;
    warp.meetings.erase(meeting);
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && &warp.threads[lane] != current)
            wake(warp.threads[lane]);
}

uint64_t meet(Collective word, uint32_t mask, uint64_t value, uint32_t source) {
    Thread &me = *current;
    Warp &warp = *me.warp;
    me.value = value;
    me.source = source;
    const auto meeting = arrive(warp, me, word, mask);
    if (meeting->arrived != mask) {
        wait(name_of(word));
        return me.result;
    }
    if (word == Collective::sync_warp)
        join_lanes(warp.threads, mask);
    else
        for (uint32_t lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1)
                warp.threads[lane].result = result_of(*meeting, warp, lane);
    leave(warp, meeting);
    return me.result;
}

void meet_all(Collective word, const void *operands, void (*together)(Warp &warp)) {
    Thread &me = *current;
    Warp &warp = *me.warp;
    me.operands = operands;
    const auto meeting = arrive(warp, me, word, 0xffffffffu);
    if (meeting->arrived != 0xffffffffu)
        return wait(name_of(word));
    leave(warp, meeting);
    together(warp);
    join_lanes(warp.threads, 0xffffffffu);
}

void say_as_warpgroup(Warp &warp, uint64_t what) { warp.said = (warp.said ^ what) * 1099511628211u + 1; } // FNV-1a

static void check_warpgroups(const Block &block) {
    for (size_t w = 0; w + 4 <= block.warps.size(); w += 4)
        for (size_t i = 1; i < 4; ++i)
            if (block.warps[w + i].said != block.warps[w].said)
                fail("exits as the last of its block, but the four warps from warp " + std::to_string(w) +
                     " on asked for different matrix products or registers");
}

// One thread of `threads`; returns when all have arrived.
static void arrive_and_wait(NamedBarrier &barrier, uint32_t threads, const char *word) {
    Thread &me = *current;
    barrier.fenced = (barrier.arrived == 0 || barrier.fenced) && !me.wrote_shared;
    barrier.expected = threads;
    barrier.waiting.push_back(&me);
    if (++barrier.arrived < threads)
        return wait(word);
    join(barrier.waiting.data(), barrier.waiting.size());
    for (Thread *thread : barrier.waiting) {
        thread->copies_see_all = barrier.fenced;
        if (thread != &me)
            wake(*thread);
    }
    barrier.arrived = 0;
    barrier.waiting.clear();
}

void sync_named(uint32_t number, uint32_t threads, const char *word) {
    Block &block = *current->block;
    if (number >= 16 || threads == 0 || threads % 32 || threads > block.num_threads)
        fail(std::string(word) + ": barrier " + std::to_string(number) + " of " + std::to_string(threads) +
             " threads in a block of " + std::to_string(block.num_threads));
    NamedBarrier &barrier = block.barriers[number];
    if (barrier.arrived && barrier.expected != threads)
        fail(std::string(word) + ": barrier " + std::to_string(number) + " is used for " + std::to_string(threads) +
             " and for " + std::to_string(barrier.expected) + " threads at a time");
    if (threads > block.num_threads - block.exited)
        fail(std::string(word) + " waits for " + std::to_string(threads) + " threads, but " +
             std::to_string(block.exited) + " of the block's have exited");
    arrive_and_wait(barrier, threads, word);
}

void sync_cluster() {
    Cluster &cluster = *current->block->cluster;
    const uint32_t threads = current_shape.cluster * current_shape.threads;
    if (cluster.live_threads < threads)
        fail("sync_cluster, but threads of the cluster have exited");
    arrive_and_wait(cluster.barrier, threads, "sync_cluster");
}

void thread_exits(Thread &thread) {
    Block &block = *thread.block;
    Warp &warp = *thread.warp;
    if (++block.exited == block.num_threads) {
        copies_of_exiting_block(block);
        check_warpgroups(block);
    }
    warp.exited |= 1u << thread.lane;
    for (const Meeting &meeting : warp.meetings)
        if (meeting.mask >> thread.lane & 1)
            fail(std::string("exits, while other lanes wait for it at ") + name_of(meeting.word) + " with the mask " +
                 hex(meeting.mask));
    const NamedBarrier &all = block.cluster->barrier;
    if (!all.waiting.empty())
        fail("exits, while other threads wait at sync_cluster");
    for (const NamedBarrier &barrier : block.barriers)
        if (!barrier.waiting.empty() && barrier.expected > block.num_threads - block.exited)
            fail(std::string("exits, while ") + std::to_string(barrier.arrived) + " threads wait at " +
                 barrier.waiting.front()->waits_at + " for " + std::to_string(barrier.expected));
}

} // namespace emulator
