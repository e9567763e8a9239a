// What runs beside the threads: copies between global and shared memory, and the barriers that count their bytes. They
// land as late as anything allows, or earlier at random, in any order, a tile in several parts. Until then their
// destination holds poison.
#pragma once

#include "machine.h"
#include "tensor_map.h"

namespace emulator {

// For the scheduler.
bool copies_under_way();
void land_a_copy(bool must); // not must: or none, this time
void land_all_copies();
void forget_copies();
void copies_of_exiting_block(Block &block); // fails if some still need its shared memory
std::string barriers_waited_for(const Block &block);

// Phase barriers; addresses as in shared_address().
void check_initialised(Block &block, uint32_t address, const char *word); // by who asks for a copy that counts there
void barrier_init(uint32_t address, uint32_t count);
void barrier_init_fence();
void barrier_arrive(Block &block, uint32_t address, int64_t expected_bytes, const char *word);
void barrier_complete(Block &block, uint32_t address, int64_t bytes, const Moment &copy);
bool barrier_try_wait(uint32_t address, uint32_t parity);

// Tiles. `map` is a tensor map as the driver made it.
const TensorMap &checked_map(const void *map, const char *word);
void load_tile(uint32_t to, const void *map, int32_t x, int32_t y, uint32_t barrier, uint32_t ranks);
void store_tile(const void *map, int32_t x, int32_t y, uint32_t from);
void writes_shared(bool unfenced); // what copies do not see yet
void commit_stores();
void wait_stores(bool until_written);

// cp.async: `bytes` of shared memory, from global memory or zeros.
void copy_async(void *to, const void *from, uint32_t bytes, bool valid);
void end_copies();
void wait_copies(uint32_t pending);

} // namespace emulator
