// Races: two threads at the same bytes, one of them writing, with nothing between that orders them.
//
// The compiler calls a hook at every access of a kernel to memory (-fsanitize=thread, without its library). Each thread
// has a time, and knows of every thread of its cluster until when that one's accesses lie before its own: a barrier
// joins what its threads know. An access is checked against the last ones to the same 4 bytes. Copies are threads of
// their own. Shuffles and ballots order nothing, as in CUDA; sync_warp does.
//
// Beyond the cluster, in global memory, fence_device before an atomic operation orders what the block did before it
// ahead of what another block does after an atomic operation at the same address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#define EMULATOR_UNWATCHED __attribute__((no_sanitize("thread")))

namespace emulator {

struct Block;
struct Cluster;
struct Thread;

using Times = std::vector<uint32_t>;                 // by slot: threads of the cluster, then its copy engines
using Foreign = std::unordered_map<uint32_t, Times>; // of other clusters, by number
struct Cell;

struct Knowledge {
    std::shared_ptr<const Times> of_others;
    uint32_t now;
};

enum class Access : uint8_t { read, write, atomic };

void watch_launch();
void watch_cluster(Cluster &cluster);
void unwatch_cluster(const Cluster &cluster);
void watch(const void *address, size_t bytes, Access access); // by the current thread

// What orders. Words of a barrier join all who meet at it.
void join(Thread *const *threads, size_t count);
void join_lanes(Thread *lanes, uint32_t mask);
void release(Times &to);         // all that the current thread did lies before who acquires
void acquire(const Times &from); // by the current thread
void fence_blocks();
void order_blocks(const void *atomic);

// A time of one thread or copy.
struct Moment {
    uint32_t slot, time;
};
Moment moment();                  // of the current thread
bool is_past(const Moment &then); // for the current thread, which knows of it

// Copies of the current thread: a load's write lies before who acquires its time; a store's read before its wait.
Moment watch_load(const Block &to, const char *place, size_t bytes, uint32_t barrier);
void release_copy(Times &to, const Moment &copy);
Moment watch_store(const char *place, size_t bytes);
void acquire_copy(const Moment &copy);

} // namespace emulator
