// Stores that pass the caches by. A plain store first reads the line that it overwrites and then displaces others; a
// streaming store does neither, as long as nothing else writes the same lines: one plain store at each end of a row
// halved the speed of the whole (Zen 4, two threads, rows of 4 KiB at addresses 16 past a line: 4.4 ms against 2.4).
#pragma once

#include "cpu/lanes.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyroute::cpu::PYROUTE_ISA {

#if defined(__SSE2__)
// 4 bytes at a time where both ends allow it, else plain.
PYROUTE_INLINE void stream_few(uint8_t *to, const uint8_t *from, int64_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % 4 != 0) {
        memcpy(to, from, static_cast<size_t>(bytes));
        return;
    }
    for (int64_t i = 0; i < bytes; i += 4)
        _mm_stream_si32(reinterpret_cast<int *>(to + i), load<int>(from + i));
}

PYROUTE_INLINE void stream_line(uint8_t *to, const uint8_t *from) { // 64 bytes, `to` aligned to them
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i *>(to), load<__m512i>(from));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to), load<__m256i>(from));
    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + 32), load<__m256i>(from + 32));
#else
    for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i *>(to + i), load<__m128i>(from + i));
#endif
}
#endif

PYROUTE_INLINE void stream_bytes(uint8_t *to, const uint8_t *from, int64_t bytes) {
#if defined(__SSE2__)
    const auto head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % 16);
    if (bytes < head + 64) {
        memcpy(to, from, static_cast<size_t>(bytes));
        return;
    }
    stream_few(to, from, head);
    int64_t at = head;
    const auto sixteen = [&] {
        _mm_stream_si128(reinterpret_cast<__m128i *>(to + at), load<__m128i>(from + at));
        at += 16;
    };
    while (reinterpret_cast<uintptr_t>(to + at) % 64 != 0)
        sixteen();
    for (; at + 64 <= bytes; at += 64)
        stream_line(to + at, from + at);
    while (at + 16 <= bytes)
        sixteen();
    stream_few(to + at, from + at, bytes - at);
#else
    memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// The line that ends with the first `head` bytes of `from`, which has 64, and begins with the last ones of a run that
// ends at `before_end`, zeros if null; `to` is where `from` goes, `head` bytes before the end of its line.
PYROUTE_INLINE void stream_joint(uint8_t *to, const uint8_t *before_end, const uint8_t *from, int64_t head) {
    uint8_t both[128] = {};
    if (before_end)
        memcpy(both, before_end - 64, 64);
    memcpy(both + 64, from, 64);
#if defined(__SSE2__)
    stream_line(to + head - 64, both + head);
#else
    memcpy(to + head - 64, both + head, 64);
#endif
}

// Before another thread may be told that the bytes are there.
PYROUTE_INLINE void finish_streaming(bool streaming) {
#if defined(__SSE2__)
    if (streaming)
        _mm_sfence();
#else
    (void)streaming;
#endif
}

} // namespace pyroute::cpu::PYROUTE_ISA
