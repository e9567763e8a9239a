// FP8 with block scales on the GPU: the launchers. Every one queues work on the stream and returns.
#pragma once

#include "../quantization.h"
#include "cuda/launch.h"
#include "cuda/quantization_args.h"

namespace pyroute::cuda {

// `scale_rows`: rows of scales of one matrix. With expert_offsets, which lie on the device, the bound for them that
// does not depend on their values; rows of scales past the last segment are 1. With `segments_only` neither those nor
// the codes past the last segment are written. row_block_starts is not used.
void quantize_fp8(const Stream &stream, const QuantizeFp8Args &args, int64_t scale_rows, bool segments_only);
void dequantize_fp8(const Stream &stream, const DequantizeFp8Args &args, int64_t scale_rows);

// Items of 1 or 4 bytes.
void transpose(const Stream &stream, const TransposeLaunch &args, int64_t item_bytes);

} // namespace pyroute::cuda
