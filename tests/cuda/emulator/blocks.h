// How blocks begin and end, for the scheduler.
#pragma once

#include <memory>

#include "machine.h"

namespace emulator {

std::unique_ptr<Cluster> new_cluster(const Shape &shape, uint64_t number);
void end_cluster(Cluster &cluster); // fails if its blocks left something behind
void thread_exits(Thread &thread);  // fails if others count on it

} // namespace emulator
