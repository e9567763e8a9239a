// The emulated GPU: blocks of threads, each thread a fiber, all on one thread of the host.
//
// Threads run until a word makes them wait (a barrier, a shuffle); then another one, chosen at random by a seed, goes
// on. Several blocks are resident at a time, in a random order. A missing barrier therefore shows as a wrong result for
// some seed, and what can never go on is reported in a sentence, as is an access to memory that is not there.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fibers.h"
#include "races.h"

namespace emulator {

constexpr uint32_t shared_limit = 232448, static_shared_limit = 49152;
constexpr uint8_t poison = 0x7f; // what shared memory holds at the start of a block

struct Index3 {
    uint32_t x, y, z;
};

struct Kernel {
    const char *name;
    uint32_t threads, blocks; // the launch bounds
    size_t args_bytes;
    void (*run)(const void *args);
};

struct Shape {
    Index3 grid;
    uint32_t threads, shared_bytes, cluster;
    uint32_t arch; // 10 * major + minor: what code compiled for it would do
};

enum class Collective : uint8_t {
    sync_warp,
    shuffle,
    ballot,
    match_any,
    reduce_max,
    reduce_min,
    reduce_add,
    elect_lane,
    give_registers,
    take_registers,
    load_matrices,
    store_matrices,
    multiply,
    matrix_wait,
};

struct Block;
struct Warp;
struct Products; // products.cpp
struct Copies;   // copies.cpp

struct Thread {
    enum State : uint8_t { fresh, ready, waiting, exited };
    Index3 index;
    Index3 block_index;
    Block *block;
    Warp *warp;
    uint32_t lane;
    State state;
    const char *waits_at; // the word, while it waits
    Context context;
    char *stack;
    uint64_t value, result; // of a collective
    uint32_t source;
    const void *operands; // of a word that all lanes say together
    bool wrote_shared;    // since its last fence for copies
    bool copies_see_all;  // what was written before its last barrier
    uint32_t registers;
    Knowledge knows;
    std::shared_ptr<Products> products; // that it asked for and that are not done
    std::shared_ptr<Copies> copies;
};

// Lanes that meet at one word with one mask.
struct Meeting {
    Collective word;
    uint32_t mask, arrived;
};

struct Warp {
    Block *block;
    Thread *threads; // 32
    uint32_t ready;  // lanes that can go on
    uint32_t exited;
    int64_t position; // in the list of warps that can go on; -1: not in it
    std::vector<Meeting> meetings;
    uint64_t said; // of what a warpgroup says together: the warps of one must end with the same
};

// Barrier 0 is sync_block.
struct NamedBarrier {
    uint32_t expected, arrived;
    bool fenced; // by all that arrived
    std::vector<Thread *> waiting;
};

// In shared memory, where only a mark of it lies (barriers.cpp).
struct PhaseBarrier {
    uint32_t count, pending; // arrivals: of a phase, still missing
    int64_t bytes;           // still to come
    uint64_t phase;
    Times arrivals, ended; // what lies before the end of this phase, of the last one
    bool fenced;           // the cluster and the copy engine see it
    Thread *owner;
    Moment initialised;
    std::vector<Thread *> waiting;
};

struct Cluster {
    std::vector<Block *> blocks; // its own
    uint32_t number = 0;
    Times engine_times{}, fenced{}; // of copies; before the last fence_device
    Foreign foreign{};
    uint32_t live_threads = 0;
    NamedBarrier barrier{};
    ~Cluster();
};

// Shared memory: the dynamic part, then the objects in the order of their first use, with canaries between.
struct Block {
    Index3 index;
    uint32_t rank; // in the cluster
    Cluster *cluster;
    uint32_t num_threads, exited;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    std::vector<Cell> *cells;
    std::map<uint32_t, PhaseBarrier> phase_barriers; // by offset
    uint32_t free_registers;
    std::vector<Thread *> waiting_for_registers;
    char *memory; // multiple of 1024
    uint32_t dynamic_bytes, static_bytes, used_bytes;
    std::vector<char *> objects; // by slot
    std::vector<uint32_t> canaries;
};

extern Thread *current;     // null on the host's side
extern Shape current_shape; // of the launch that runs

// Runs a launch to its end; returns an empty string, or a sentence that says why it failed.
std::string run(const Kernel &kernel, const Shape &shape, const void *args);

// Launches are numbered from 1 again, so that a test's orders do not depend on the tests before it.
void restart();

// Ends the launch that runs.
[[noreturn]] void fail(const std::string &sentence);
std::string name_of(const Thread &thread); // "thread 3 of block 1"

// For the words. wait() gives the turn away until wake(); pause() gives it away for a moment.
void wait(const char *word);
void wake(Thread &thread);
void pause(const char *word);
void maybe_pause(); // sometimes: another order of atomic operations
uint32_t random_below(uint32_t n);
uint32_t elected_lane(); // the same one during a launch

uint64_t meet(Collective word, uint32_t mask, uint64_t value, uint32_t source);
// A word of all 32 lanes: `together` runs once, in the lane that comes last, and finds what each one gave.
void meet_all(Collective word, const void *operands, void (*together)(Warp &warp));
template <class Operands> const Operands &operands_of(const Warp &warp, uint32_t lane) {
    return *static_cast<const Operands *>(warp.threads[lane].operands);
}
void say_as_warpgroup(Warp &warp, uint64_t what);
void sync_named(uint32_t barrier, uint32_t threads, const char *word);
void sync_cluster();

uint32_t registers_at_start(const Kernel &kernel); // per thread
extern const Kernel *current_kernel;

uint32_t new_slot();
char *shared_object(uint32_t slot, size_t bytes, size_t alignment);

// Addresses in shared memory as the hardware counts them: 32 bits, 1 + the block's rank in its cluster above bit 24, 0
// for the own block.
uint32_t shared_address(const void *pointer);
char *shared_pointer(uint32_t address, size_t bytes, const char *word);
char *shared_pointer(const Block &block, uint32_t address, size_t bytes, const char *word);
Block &block_of_cluster(uint32_t rank, const char *word);

} // namespace emulator
