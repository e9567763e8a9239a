#include "races.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <unordered_map>

#include "machine.h"

namespace emulator {

// The last accesses to 4 bytes.
struct Last {
    uint32_t launch, cluster, time;
    uint16_t slot;
    uint8_t bytes; // of the 4
    bool atomic;
};
struct Cell {
    Last write, reads[2];
};

namespace {

constexpr size_t region_bytes = 512 * 1024;
constexpr uint32_t engines = 16; // slots of a block's loads, by barrier, and as many of its stores, by warp

struct Watch {
    bool on = false;
    uint32_t launch = 0;
    uint32_t time = 0; // later than everything so far
    std::unordered_map<uintptr_t, std::unique_ptr<std::array<Cell, 1024>>> pages;
    struct Recent {
        uintptr_t page;
        std::array<Cell, 1024> *cells;
    };
    std::array<Recent, 256> recent{}; // pages, by their low bits
    std::unordered_map<const void *, Foreign> atomics;
};
Watch state;

std::array<Cell, 1024> &cells_of(uintptr_t page) {
    Watch::Recent &recent = state.recent[page % state.recent.size()];
    if (recent.page != page || !recent.cells) {
        auto &cells = state.pages[page];
        if (!cells)
            cells = std::make_unique<std::array<Cell, 1024>>();
        recent = {page, cells.get()};
    }
    return *recent.cells;
}

uint32_t num_threads() { return current_shape.cluster * current_shape.threads; }
uint32_t slot_of(const Thread &thread) { return thread.block->rank * current_shape.threads + thread.index.x; }

void merge(Times &to, const Times &from) {
    to.resize(std::max(to.size(), from.size()));
    uint32_t *a = to.data();
    const uint32_t *b = from.data();
    for (size_t i = 0; i < from.size(); ++i)
        a[i] = std::max(a[i], b[i]);
}

// Whether an access lies before what somebody of this cluster with this knowledge does.
bool lies_before(const Last &last, const Cluster &cluster, const Times &known, uint32_t me) {
    if (last.launch != state.launch || (last.cluster == cluster.number && last.slot == me))
        return true;
    if (last.cluster == cluster.number)
        return last.time <= known[last.slot];
    const auto foreign = cluster.foreign.find(last.cluster);
    return foreign != cluster.foreign.end() && last.slot < foreign->second.size() &&
           last.time <= foreign->second[last.slot];
}

std::string who(const Last &last) {
    if (last.slot >= num_threads())
        return "a copy";
    const uint32_t block = last.cluster * current_shape.cluster + last.slot / current_shape.threads;
    return "thread " + std::to_string(last.slot % current_shape.threads) + " of block " + std::to_string(block);
}

// The line of the code at an address, if the machine has addr2line.
std::string line_of(const void *code) {
    Dl_info info;
    if (!code || !dladdr(code, &info) || !info.dli_fname)
        return "";
    char command[1024], line[256] = "";
    snprintf(command, sizeof(command), "addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
             static_cast<size_t>(static_cast<const char *>(code) - static_cast<char *>(info.dli_fbase)) - 1);
    if (FILE *pipe = popen(command, "r")) {
        if (!fgets(line, sizeof(line), pipe))
            line[0] = 0;
        pclose(pipe);
    }
    const std::string text(line, strcspn(line, "\n ("));
    return text.empty() || text[0] == '?' ? "" : ", at " + text;
}

struct Accessor {
    const Cluster &cluster;
    const Times &known;
    uint32_t slot, time;
    Access access;
    const void *code;
    const char *subject; // "" for a thread
};

[[noreturn]] void report(const Accessor &by, const Last &last, const char *did, const char *where) {
    fail(std::string("race: ") + by.subject + (by.access == Access::read ? "reads " : "writes ") + where + " that " +
         who(last) + " " + did + ", and nothing between orders the two" + line_of(by.code));
}

// The later of two accesses; of both, if they are one thread's at one time.
void replace(Last &last, Last with) {
    if (last.launch == with.launch && last.cluster == with.cluster && last.slot == with.slot && last.time == with.time)
        with.bytes |= last.bytes;
    last = with;
}

void check(Cell &cell, uint8_t bytes, const Accessor &by, const char *where) {
    if (cell.write.launch != state.launch && by.access == Access::read) { // the commonest: what was there before
        const Last &last = cell.reads[0];
        if (last.launch == state.launch && last.time == by.time && last.slot == by.slot &&
            last.cluster == by.cluster.number && (last.bytes & bytes) == bytes)
            return;
    }
    const Last mine{state.launch, by.cluster.number,          by.time, static_cast<uint16_t>(by.slot),
                    bytes,        by.access == Access::atomic};
    const bool both_atomic = by.access == Access::atomic && cell.write.atomic;
    if ((cell.write.bytes & bytes) && !both_atomic && !lies_before(cell.write, by.cluster, by.known, by.slot))
        report(by, cell.write, "wrote", where);
    if (by.access == Access::read) {
        Last &first = cell.reads[0], &second = cell.reads[1];
        if ((first.slot == mine.slot && first.cluster == mine.cluster) ||
            lies_before(first, by.cluster, by.known, by.slot))
            replace(first, mine);
        else if (lies_before(second, by.cluster, by.known, by.slot) || random_below(2))
            replace(second, mine);
        else
            replace(first, mine);
        return;
    }
    for (const Last &read : cell.reads)
        if ((read.bytes & bytes) && !lies_before(read, by.cluster, by.known, by.slot))
            report(by, read, "read", where);
    replace(cell.write, mine);
}

template <class Cells>
void check_all(Cells &&cell_at, uintptr_t offset, size_t bytes, const Accessor &by, const char *where) {
    for (uintptr_t at = offset; at < offset + bytes;) {
        const uintptr_t end = std::min<uintptr_t>(offset + bytes, (at | 3) + 1);
        const auto mask = static_cast<uint8_t>(((1u << (end - at)) - 1) << (at & 3));
        check(cell_at(at), mask, by, where);
        at = end;
    }
}

std::vector<Cell> &shared_cells(const char *memory) {
    static std::unordered_map<const char *, std::vector<Cell>> all;
    auto &cells = all[memory];
    if (cells.empty())
        cells.resize(region_bytes / 4);
    return cells;
}

void watch_at(const void *address, size_t bytes, Access access, const void *code) {
    if (!state.on || !current)
        return;
    const Thread &me = *current;
    const auto *place = static_cast<const char *>(address);
    if (static_cast<uintptr_t>(place - me.stack) < Stacks::bytes)
        return;
    const Cluster &cluster = *me.block->cluster;
    const Accessor by{cluster, *me.knows.of_others, slot_of(me), me.knows.now, access, code, ""};
    for (const Block *block : cluster.blocks) {
        const uintptr_t offset = static_cast<uintptr_t>(place - block->memory);
        if (offset < region_bytes)
            return check_all([&](uintptr_t at) -> Cell & { return (*block->cells)[at / 4]; }, offset, bytes, by,
                             block == me.block ? "bytes in shared memory" : "bytes in another block's shared memory");
    }
    check_all([](uintptr_t at) -> Cell & { return cells_of(at >> 12)[(at & 4095) / 4]; },
              reinterpret_cast<uintptr_t>(place), bytes, by, "bytes in global memory");
}

} // namespace

void watch_launch() {
    const char *text = std::getenv("PYROUTE_EMULATOR_RACES");
    state.on = text && *text == '1';
    ++state.launch;
    state.atomics.clear();
    if (state.pages.size() > 20000) { // some 80 MB of arrays
        state.pages.clear();
        state.recent = {};
    }
}

void watch_cluster(Cluster &cluster) {
    if (!state.on)
        return;
    const auto start = std::make_shared<const Times>(num_threads() + current_shape.cluster * 2 * engines, state.time);
    cluster.engine_times.assign(start->size() - num_threads(), state.time);
    for (Block *block : cluster.blocks) {
        block->cells = &shared_cells(block->memory);
        for (Thread &thread : block->threads)
            thread.knows = {start, state.time + 1};
    }
}

void unwatch_cluster(const Cluster &cluster) {
    if (!state.on)
        return;
    for (const Block *block : cluster.blocks) {
        std::fill_n(block->cells->begin(), block->used_bytes / 4 + 1, Cell{});
        for (const Thread &thread : block->threads)
            state.time = std::max(state.time, thread.knows.now);
    }
    for (uint32_t time : cluster.engine_times)
        state.time = std::max(state.time, time);
}

void watch(const void *address, size_t bytes, Access access) {
    watch_at(address, bytes, access, __builtin_return_address(0));
}

void join(Thread *const *threads, size_t count) {
    if (!state.on)
        return;
    Times merged = *threads[0]->knows.of_others;
    const Times *last = threads[0]->knows.of_others.get();
    for (size_t i = 0; i < count; ++i) {
        const Knowledge &knows = threads[i]->knows;
        if (knows.of_others.get() != last)
            merge(merged, *(last = knows.of_others.get()));
    }
    for (size_t i = 0; i < count; ++i) {
        uint32_t &own = merged[slot_of(*threads[i])];
        own = std::max(own, threads[i]->knows.now);
    }
    const auto together = std::make_shared<const Times>(std::move(merged));
    for (size_t i = 0; i < count; ++i)
        threads[i]->knows = {together, threads[i]->knows.now + 1};
}

void join_lanes(Thread *lanes, uint32_t mask) {
    Thread *all[32];
    size_t count = 0;
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1)
            all[count++] = lanes + lane;
    join(all, count);
}

void release(Times &to) {
    if (!state.on)
        return;
    Knowledge &mine = current->knows;
    merge(to, *mine.of_others);
    to[slot_of(*current)] = mine.now++;
}

void acquire(const Times &from) {
    if (!state.on || from.empty())
        return;
    Times merged = *current->knows.of_others;
    merge(merged, from);
    current->knows.of_others = std::make_shared<const Times>(std::move(merged));
}

// ---- beyond the cluster

void fence_blocks() {
    if (!state.on)
        return;
    Cluster &cluster = *current->block->cluster;
    release(cluster.fenced);
}

void order_blocks(const void *atomic) {
    if (!state.on)
        return;
    Cluster &cluster = *current->block->cluster;
    Foreign &there = state.atomics[atomic];
    for (const auto &[number, times] : there)
        if (number != cluster.number)
            merge(cluster.foreign[number], times);
    if (!cluster.fenced.empty()) {
        merge(there[cluster.number], cluster.fenced);
        for (const auto &[number, times] : cluster.foreign)
            merge(there[number], times);
    }
}

Moment moment() { return state.on ? Moment{slot_of(*current), current->knows.now} : Moment{}; }

bool is_past(const Moment &then) {
    return !state.on || then.slot == slot_of(*current) || then.time <= (*current->knows.of_others)[then.slot];
}

// ---- copies

static Moment next_time(Cluster &cluster, uint32_t engine) {
    return {num_threads() + engine, ++cluster.engine_times[engine]};
}

Moment watch_load(const Block &to, const char *place, size_t bytes, uint32_t barrier) {
    if (!state.on)
        return {};
    Cluster &cluster = *to.cluster;
    const Moment copy = next_time(cluster, to.rank * 2 * engines + barrier / 8 % engines);
    Times known = *current->knows.of_others;
    known[slot_of(*current)] = current->knows.now;
    const Accessor by{cluster, known, copy.slot, copy.time, Access::write, nullptr, "a copy that it asks for "};
    check_all([&](uintptr_t at) -> Cell & { return (*to.cells)[at / 4]; }, static_cast<uintptr_t>(place - to.memory),
              bytes, by, "bytes in shared memory");
    return copy;
}

void release_copy(Times &to, const Moment &copy) {
    if (!state.on)
        return;
    to.resize(std::max<size_t>(to.size(), copy.slot + 1));
    to[copy.slot] = std::max(to[copy.slot], copy.time);
}

Moment watch_store(const char *place, size_t bytes) {
    if (!state.on)
        return {};
    const Block &block = *current->block;
    Cluster &cluster = *block.cluster;
    const Moment copy = next_time(cluster, block.rank * 2 * engines + engines + current->index.x / 32 % engines);
    Times known = *current->knows.of_others;
    known[slot_of(*current)] = current->knows.now;
    const Accessor by{cluster, known, copy.slot, copy.time, Access::read, nullptr, "a copy that it asks for "};
    check_all([&](uintptr_t at) -> Cell & { return (*block.cells)[at / 4]; },
              static_cast<uintptr_t>(place - block.memory), bytes, by, "bytes in shared memory");
    return copy;
}

void acquire_copy(const Moment &copy) {
    if (!state.on || !copy.time)
        return;
    Times known = *current->knows.of_others;
    known[copy.slot] = std::max(known[copy.slot], copy.time);
    current->knows.of_others = std::make_shared<const Times>(std::move(known));
}

} // namespace emulator

// ---- what the compiler calls

#define HOOK(name, bytes, access)                                                                                      \
    extern "C" void name(void *address);                                                                               \
    extern "C" void name(void *address) {                                                                              \
        emulator::watch_at(address, bytes, emulator::Access::access, __builtin_return_address(0));                     \
    }
#define HOOKS(bytes)                                                                                                   \
    HOOK(__tsan_read##bytes, bytes, read)                                                                              \
    HOOK(__tsan_write##bytes, bytes, write)                                                                            \
    HOOK(__tsan_unaligned_read##bytes, bytes, read)                                                                    \
    HOOK(__tsan_unaligned_write##bytes, bytes, write)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" void __tsan_read_range(void *address, size_t bytes);
extern "C" void __tsan_read_range(void *address, size_t bytes) {
    emulator::watch_at(address, bytes, emulator::Access::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void *address, size_t bytes);
extern "C" void __tsan_write_range(void *address, size_t bytes) {
    emulator::watch_at(address, bytes, emulator::Access::write, __builtin_return_address(0));
}
extern "C" void __tsan_init();
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void *);
extern "C" void __tsan_func_entry(void *) {}
extern "C" void __tsan_func_exit();
extern "C" void __tsan_func_exit() {}
