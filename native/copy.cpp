#include "copy.h"

#include <string.h>

#include "threads.h"

#if VA_X86
#include <emmintrin.h>
#endif

namespace va {
namespace {

const size_t POOLED = (size_t)1 << 20;    // below, waking threads takes as long as copying
const size_t PIECE = (size_t)128 << 10;   // of one thread at a time; a C library copies such pieces in its best way
const size_t UNCACHED = (size_t)32 << 20; // messages that a cache does not keep until they are checked

#if VA_X86

// Past the caches: the old contents of `to` are not read first. `to` is at a multiple of 64, n one of 64.
void stream(uint8_t* to, const uint8_t* from, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        const __m128i* s = reinterpret_cast<const __m128i*>(from + i);
        __m128i* d = reinterpret_cast<__m128i*>(to + i);
        const __m128i a = _mm_loadu_si128(s), b = _mm_loadu_si128(s + 1);
        const __m128i c = _mm_loadu_si128(s + 2), e = _mm_loadu_si128(s + 3);
        _mm_stream_si128(d, a);
        _mm_stream_si128(d + 1, b);
        _mm_stream_si128(d + 2, c);
        _mm_stream_si128(d + 3, e);
    }
    _mm_sfence();  // such stores are not ordered with what tells other threads that this piece is done
}

void copy_piece(uint8_t* to, const uint8_t* from, size_t n, bool past_caches) {
    if (!past_caches) {
        memcpy(to, from, n);
        return;
    }
    const size_t head = (64 - (uintptr_t)to % 64) % 64;
    if (n < head + 64) {
        memcpy(to, from, n);
        return;
    }
    const size_t middle = (n - head) / 64 * 64;
    memcpy(to, from, head);
    stream(to + head, from + head, middle);
    memcpy(to + head + middle, from + head + middle, n - head - middle);
}

#else

void copy_piece(uint8_t* to, const uint8_t* from, size_t n, bool) { memcpy(to, from, n); }

#endif

}  // namespace

void copy_in(uint8_t* to, const uint8_t* from, size_t n, size_t whole) {
    const bool past_caches = whole >= UNCACHED;
    if (n < POOLED) {
        copy_piece(to, from, n, past_caches);
        return;
    }
    // Cut where lines of `to` begin, so that no line is written by two threads.
    const size_t first = PIECE - (uintptr_t)to % PIECE;
    const size_t pieces = 1 + (n - first + PIECE - 1) / PIECE;
    parallel_for((i64)pieces, true, [&](i64 i) {
        const size_t begin = i == 0 ? 0 : first + (size_t)(i - 1) * PIECE;
        const size_t end = first + (size_t)i * PIECE;
        copy_piece(to + begin, from + begin, (end < n ? end : n) - begin, past_caches);
    });
}

}  // namespace va
