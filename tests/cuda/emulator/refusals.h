// What the entry points share: told to fail, not initialised, refusing in a sentence.
#pragma once

#include <string>

#include "cuda_abi.h"

namespace emulator {

CUresult begin(const char *entry_point);                       // what every entry point does first
CUresult refuse(CUresult result, const std::string &sentence); // keeps and prints the sentence
int emulated_arch();                                           // 10 * major + minor
int emulated_fp8_bits();                                       // that sums of FP8 products keep; 0: float32's

} // namespace emulator
