// How blocks begin and end, for the scheduler.
#pragma once

#include <memory>

#include "machine.h"

namespace emulator {

std::unique_ptr<Cluster> new_cluster(const Shape &shape, uint64_t number);
std::string end_cluster(Cluster &cluster); // a sentence about what its blocks left behind, or an empty string
void thread_exits(Thread &thread);         // fails if others count on it

} // namespace emulator
