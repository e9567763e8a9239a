// What this machine can do at best: the yardstick beside every number that the command line and the benchmarks print.
//
// fma    multiply-adds on registers only, twelve independent chains: more than latency 4 x 2 pipes needs
// read   every byte of a buffer once, into registers
// write  every byte of a buffer once, with streaming stores where there are any
// copy   every byte of one buffer to another, likewise
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pyroute::cpu {

struct LimitKernels {
    int flops_per_round;                                  // of fma, one thread
    float (*fma)(int64_t rounds, float seed);             // the sum of the chains, so that nothing is optimised away
    uint64_t (*read)(const uint8_t *from, int64_t bytes); // from: aligned to 64; bytes: a multiple of 256
    void (*write)(uint8_t *to, int64_t bytes);            // likewise
    void (*copy)(uint8_t *to, const uint8_t *from, int64_t bytes); // both aligned to 64; bytes: a multiple of 256
};

PYROUTE_DECLARE_KERNELS(LimitKernels, limit_kernels)

// All with at most `threads` threads, on the current instruction set.
constexpr int64_t limit_block = 256;           // read, write and copy round a buffer down to this many bytes
double fma_flops(int64_t rounds, int threads); // runs the probe; returns the operations done (a multiply-add is two)
uint64_t read_buffer(const uint8_t *from, int64_t bytes, int threads);
void write_buffer(uint8_t *to, int64_t bytes, int threads);
void copy_buffer(uint8_t *to, const uint8_t *from, int64_t bytes, int threads);

} // namespace pyroute::cpu
