// Arguments of the MoE layer's own kernels: those of the op, and what their launches decided.
#pragma once

#include "../moe.h"
#include "../permutation.h"

namespace pyroute {

template <class Row> struct ActivateLaunch {
    ExpertRows experts;
    ActivationArgs<Row> op;
    uint32_t row_threads; // of a row, each of 8 or (quantised) 16 elements
    bool whole_words;     // all elements of a thread begin at multiples of 16 bytes
    bool power_of_two;    // quantised: scales
    uint8_t *codes;       // [R, I], or null: op.hidden is written
    float *scales;        // [R, ceil(I / 128)]
};

template <class Row> struct ActivateBackwardLaunch {
    ExpertRows experts;
    ActivationBackwardArgs<Row> op;
    bool whole_words;
};

template <class Row> struct AddBiasLaunch {
    ExpertRows experts;
    AddBiasArgs<Row> op;
};

template <class Row> struct BiasDotLaunch {
    ExpertRows experts;
    BiasDotArgs<Row> op;
};

template <class Row> struct BiasGradLaunch {
    ExpertRows experts;
    BiasGradArgs<Row> op;
    uint32_t column_parts; // of 256 columns
};

// by_row[r] = by_slot[slot of row r], 0 on padding rows; or the other way, 0 for slots that are not routed.
struct SlotValuesLaunch {
    RouteMaps maps;
    const float *from;
    float *to;
};

} // namespace pyroute
