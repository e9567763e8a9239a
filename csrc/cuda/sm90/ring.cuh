// The ring of stages between the thread that loads and the warps that multiply, and the order of the tiles.
//
// Stage s has two barriers. full: one arrival, the loader's, and the bytes of its copies. empty: one arrival of every
// math warp of every block that the copies went to. Loader and math warps count stages alike, from (0, phase 0), over
// all tiles: the loader waits for empty of the phase before (free at once in the first lap), math warps for full of
// this one. A barrier more, idle, is never arrived at: a wait for its parity 1 is over at once.
//
// PYROUTE_HANG_TRAP: a build for finding protocol errors. A wait of four billion cycles writes {what is waited
// for, thread, stage, phase, tile m, tile n} into the block's 8 words of hang_report and stops the kernel; the words
// lie in pinned host memory, which outlives the stop.
#pragma once

#include "cuda/sm90/arguments.h"
#include "cuda/sm90/ptx.cuh"

namespace pyroute::cuda::sm90 {

enum class Waits : uint32_t { for_full = 1, for_empty = 2 };

struct Ring {
    SharedAddress base;
    uint32_t stage = 0, phase = 0;
#if defined(PYROUTE_HANG_TRAP)
    uint32_t *report = nullptr;
    TilePlace place = {0, 0};
#endif

    template <class Args> PYROUTE_DEVICE Ring(SharedAddress shared, const Args &args) : base(shared) {
#if defined(PYROUTE_HANG_TRAP)
        report = args.hang_report ? args.hang_report + blockIdx.x * 8 : nullptr;
#else
        static_cast<void>(args);
#endif
    }
    PYROUTE_DEVICE void at(TilePlace tile) { // for the report
#if defined(PYROUTE_HANG_TRAP)
        place = tile;
#else
        static_cast<void>(tile);
#endif
    }
    PYROUTE_DEVICE void wait(SharedAddress barrier, uint32_t parity, Waits what) const {
#if defined(PYROUTE_HANG_TRAP)
        uint64_t start = clock_cycles();
        while (!barrier_try_wait(barrier, parity))
            if (clock_cycles() - start > 4000000000u) { // two seconds; how long a try takes, nobody says
                stop(what);
                start = clock_cycles();
            }
#else
        static_cast<void>(what);
        while (!barrier_try_wait(barrier, parity)) {
        }
#endif
    }
    template <uint32_t Stages> PYROUTE_DEVICE void advance() {
        if (++stage == Stages) {
            stage = 0;
            phase ^= 1;
        }
    }

#if defined(PYROUTE_HANG_TRAP)
    // The first thread of each block tells, leaves the others the time to, and ends the kernel.
    PYROUTE_DEVICE void stop(Waits what) const {
        if (report) {
            if (atomic_add(report + 7, 1u) != 0)
                return;
            const uint32_t words[] = {threadIdx.x, stage, phase, static_cast<uint32_t>(place.m),
                                      static_cast<uint32_t>(place.n)};
            for (uint32_t i = 0; i < 5; ++i)
                report[1 + i] = words[i];
            fence_system();
            report[0] = static_cast<uint32_t>(what); // a record that is whole
            fence_system();
            for (const uint64_t start = clock_cycles(); clock_cycles() - start < 1000000000u;) {
            }
        }
        stop_kernel();
    }
#endif
};

// Said by the math warps of what is the same in all their lanes: the compiler then keeps it, and what follows from it,
// in uniform registers, which barriers and matrix descriptors are read from, and knows that the lanes stay together.
PYROUTE_DEVICE uint32_t uniform(uint32_t value) { return shuffle(value, 0); }
PYROUTE_DEVICE int32_t uniform(int32_t value) { return shuffle(value, 0); }

// By one thread, before the block (the cluster) meets.
PYROUTE_DEVICE void init_ring(SharedAddress shared, uint32_t stages, const SharedPlan &plan, uint32_t releases) {
    for (uint32_t s = 0; s < stages; ++s) {
        barrier_init(shared + plan.full(s), 1);
        barrier_init(shared + plan.empty(s), releases);
    }
    barrier_init(shared + plan.idle(), 1);
    barrier_init_fence();
}

// An entry of the table in 32 bits, which coordinates of the copy engine have.
struct RowTile {
    int32_t expert, row, rows;
};

// The tiles of one block (with clusters: of one cluster, whose blocks take neighbouring columns), in the order that all
// of its threads walk. The table's next entry is fetched while this tile is worked on.
struct Schedule {
    const GemmTile *tiles;
    int32_t num_m, num_n, group, item, step, total;
    TilePlace place, next_place;
    RowTile tile, next;

    // num_n: tiles side by side; `first`, `stride`: this block's among those that share the work.
    PYROUTE_DEVICE Schedule(const GemmTile *table, int32_t num_tiles, int32_t tiles_n, int32_t raster_group,
                            int32_t first, int32_t stride)
        : tiles(table), num_m(num_tiles), num_n(tiles_n), group(raster_group), item(first), step(stride),
          total(num_tiles * tiles_n), place{}, next_place{}, tile{}, next{} {
        fetch();
    }
    // The next tile to `place` and `tile`; false after the last.
    PYROUTE_DEVICE bool take() {
        if (item >= total)
            return false;
        place = next_place;
        tile = next;
        item += step;
        fetch();
        return true;
    }

  private:
    PYROUTE_DEVICE void fetch() {
        if (item < total) {
            next_place = place_of(item, num_m, num_n, group);
            const GemmTile entry = tiles[next_place.m];
            next = {entry.expert, static_cast<int32_t>(entry.row), entry.rows};
        }
    }
};

} // namespace pyroute::cuda::sm90
