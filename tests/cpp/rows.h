// Random segments of expert-sorted rows, as a route plan with alignment makes them.
#pragma once

#include <vector>

#include "values.h"

namespace pyroute::test {

struct Segments {
    std::vector<int64_t> offsets;      // [E + 1]
    std::vector<int32_t> row_to_token; // [R], -1 on padding rows and past the last offset
    int64_t num_experts, num_rows;

    int64_t begin(int64_t e) const { return offsets[static_cast<size_t>(e)]; }
    int64_t end(int64_t e) const { return offsets[static_cast<size_t>(e) + 1]; }
    bool real(int64_t row) const { return row_to_token[static_cast<size_t>(row)] >= 0; }
    int64_t expert_of(int64_t row) const { // -1 past the last offset
        for (int64_t e = 0; e < num_experts; ++e)
            if (row < end(e))
                return e;
        return -1;
    }
};

// Up to `most` rows: often no rows at all for an expert or for all, padding up to an alignment, rows past the last one.
inline Segments random_segments(Random &random, int64_t most) {
    Segments s;
    s.num_experts = random.one_in(8) ? random.integer(0, 1) : random.integer(2, 9);
    const int64_t alignment = random.one_in(3) ? random.integer(2, 8) : 1;
    const int64_t usual = random.one_in(10) ? 0 : random.integer(1, 12);
    s.offsets.assign(1, 0);
    for (int64_t e = 0; e < s.num_experts; ++e) {
        const int64_t wanted = random.one_in(3)    ? 0
                               : random.one_in(10) ? random.integer(1, most)
                                                   : random.integer(0, usual);
        const int64_t room = (most - s.offsets.back()) / alignment * alignment;
        const int64_t count = wanted < room ? wanted : room;
        for (int64_t i = 0; i < count; ++i)
            s.row_to_token.push_back(static_cast<int32_t>(random.integer(0, 99)));
        const int64_t padded = (count + alignment - 1) / alignment * alignment;
        s.row_to_token.resize(s.row_to_token.size() + static_cast<size_t>(padded - count), -1);
        s.offsets.push_back(s.offsets.back() + padded);
    }
    if (random.one_in(4))
        s.row_to_token.resize(s.row_to_token.size() + static_cast<size_t>(random.integer(1, 5)), -1);
    s.num_rows = static_cast<int64_t>(s.row_to_token.size());
    return s;
}

} // namespace pyroute::test
