// Shared by the AVX-512 files, which are built for F, BW, DQ, VL, VNNI and IFMA (Ice Lake, Zen 4 and later).
#pragma once
#include <immintrin.h>

#include "common.h"

// Loops over registers: left rolled, their arrays would live in memory.
#define VA_UNROLL _Pragma("GCC unroll 32")

namespace va {
namespace avx512 {

void gemm(const uint8_t* packed, i64 n, i64 k, const int8_t* a, i64 m, i64 n0, i64 n1, int32_t* y);
size_t prepare_bytes(const AttentionArgs& s);
void prepare(const AttentionArgs& s, i64 kv, i64 p0, i64 p1);
i64 tile_queries(const AttentionArgs& s);
void attention(const AttentionArgs& s, i64 kv, i64 i0, i64 i1);

// attention() with the integer scores of a page from elsewhere: out[key][16 * row_vectors] = k (count, d) . q, with q
// as [d / 4][16 * row_vectors] groups of four bytes; count may be rounded up to 16 keys, out has room for a page.
typedef void (*PageScores)(const int8_t* k, const int32_t* q, i64 d, i64 row_vectors, i64 count, int32_t* out);
void attention_with(const AttentionArgs& s, i64 kv, i64 i0, i64 i1, PageScores page_scores);

// A few rows against the keys of a page, n <= PAGE: out[r * out_stride + j] = q[r] . k[j]; O as in run_values(); attention().
// next: as in run_scores().
bool few_rows(i64 rows, i64 d);
void scores_of_few(const int8_t* q, i64 q_stride, i64 rows, const int8_t* k, const int8_t* next, i64 n, i64 d, int32_t* out,
                   i64 out_stride);
void values_of_few(const uint16_t* p, i64 p_stride, i64 rows, const int8_t* v, const int8_t* next, i64 n, i64 d, int64_t* o);
void attention_of_few(const AttentionArgs& s, i64 kv, i64 i0, i64 i1);

// out[r] = -128 * sum of row r.
void row_offsets(const int8_t* a, i64 lda, i64 k, i64 rows, int32_t* out);
void transfer(const TransferArgs& s, i64 kv);
void attention_weights(const WeightsArgs& s, i64 head, i64 i0, i64 i1);
bool run_scores(const int8_t* q, i64 rows, const int8_t* k, const int8_t* next, i64 n, i64 d, int32_t* out, i64 out_stride);
float run_max(const int32_t* scores, const float* k_scale, i64 n, float m);
int32_t run_weigh(const int32_t* scores, const float* k_scale, i64 n, float m, float q_scale, uint16_t* p);
void run_project(const uint16_t* p, i64 p_stride, i64 rows, const uint64_t* g, i64 n, uint64_t* pg);
void run_values(const uint16_t* p, i64 p_stride, i64 rows, const int8_t* v, const int8_t* next, i64 n, i64 d, int64_t* o);
void dot_i32(const int32_t* y, i64 n, const uint64_t* r, i64 t0, i64 t1, int32_t* copy, uint64_t* out);
void dot_i8(const int8_t* a, i64 stride, i64 k, const uint64_t* u, i64 t0, i64 t1, uint64_t* out, i64 out_stride);
bool dot_i64(const int64_t* o, i64 stride, i64 k, const uint64_t* u, i64 t0, i64 t1, uint64_t* out, i64 out_stride);
i64 peak(i64 rounds);
void project(const int8_t* w, i64 n, i64 k, const uint64_t* r, i64 reps, i64 k0, i64 k1, uint64_t* u);

// One load of a claim, never repeated by the compiler: its memory may be shared with the claim's maker.
static inline __m512i load_once(const int32_t* p) {
    __m512i x;
    asm volatile("vmovdqu32 %1, %0" : "=v"(x) : "m"(*(const int32_t(*)[16])p));
    return x;
}

static inline __m512i load_once(const int32_t* p, __mmask16 mask) {
    __m512i x;
    asm volatile("vmovdqu32 %1, %0%{%2%}%{z%}" : "=v"(x) : "m"(*(const int32_t(*)[16])p), "Yk"(mask));
    return x;
}

// A hint for an address that may lie outside of any array: it is never dereferenced.
static inline void prefetch(const void* p, i64 ahead) { _mm_prefetch((const char*)((uintptr_t)p + (uintptr_t)ahead), _MM_HINT_T0); }

// Multiply-accumulates in inline assembly: GCC 12 spills half of a register tile around the intrinsics.
static inline __m512i dp_bytes(__m512i acc, __m512i u8, __m512i s8) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
    return acc;
}

static inline __m512i dp_words(__m512i acc, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}

static inline __m512i madd_lo(__m512i acc, __m512i a, __m512i b) {
    asm("vpmadd52luq %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}

static inline __m512i madd_hi(__m512i acc, __m512i a, __m512i b) {
    asm("vpmadd52huq %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}

// Lanes of any 64-bit value to below 2^51, the same mod p: 2^50 = 27.
static inline __m512i fold(__m512i x) {
    const __m512i low = _mm512_and_si512(x, _mm512_set1_epi64(((int64_t)1 << 50) - 1));
    return madd_lo(low, _mm512_srli_epi64(x, 50), _mm512_set1_epi64(27));
}

// Eight lanes of any 64-bit value, summed mod p into 54 bits.
static inline uint64_t sum_lanes(__m512i x) { return (uint64_t)_mm512_reduce_add_epi64(fold(x)); }

// A pair of accumulators of 52-bit multiply-adds as one number of 56 bits, mod p: 2^52 = 108. hi < 2^44.
static inline uint64_t sum_pair(__m512i lo, __m512i hi) {
    return (uint64_t)_mm512_reduce_add_epi64(madd_lo(fold(lo), hi, _mm512_set1_epi64(108)));
}

// The table of weights in two registers.
struct Table {
    __m512i low, high;
    Table() {
        alignas(64) int16_t words[64];
        VA_UNROLL
        for (int i = 0; i < 64; i++) words[i] = (int16_t)LUT15[i];
        low = _mm512_load_si512(words);
        high = _mm512_load_si512(words + 32);
    }
};

// Thirty-two 16-bit weights from two vectors of y: the low words from y0, the high words from y1.
static inline __m512i weights(__m512 y0, __m512 y1, const Table& table) {
    const __m512 top = _mm512_set1_ps(XI_MAX);
    const __m512i x0 = _mm512_cvtps_epi32(_mm512_min_ps(y0, top)), x1 = _mm512_cvtps_epi32(_mm512_min_ps(y1, top));
    const __m512i xi = _mm512_or_si512(x0, _mm512_slli_epi32(x1, 16));
    const __m512i entry = _mm512_permutex2var_epi16(table.low, xi, table.high);  // looks at xi & 63 only
    // A rounded average with zero is (x + 1) >> 1.
    return _mm512_avg_epu16(_mm512_srlv_epi16(entry, _mm512_srli_epi16(xi, 6)), _mm512_setzero_si512());
}

}  // namespace avx512
}  // namespace va
