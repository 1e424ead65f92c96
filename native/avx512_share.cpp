// Shares of attention with AVX-512: lanes are keys for maxima, weights and challenges, columns for values.
#include <string.h>

#include "avx512.h"

namespace va {
namespace avx512 {
namespace {

inline __mmask16 lanes16(i64 n) { return n >= 16 ? 0xffff : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }
inline __mmask8 lanes8(i64 n) { return n >= 8 ? 0xff : n > 0 ? (__mmask8)((1u << n) - 1) : 0; }

inline __m512 product(const int32_t* scores, const float* k_scale, __mmask16 live) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(live, scores)), _mm512_maskz_loadu_ps(live, k_scale));
}

template <int R>
void project_rows(const uint16_t* p, i64 p_stride, const uint64_t* g, i64 n, uint64_t* pg) {
    __m512i lo[R][2], hi[R][2];
    VA_UNROLL
    for (int r = 0; r < R; r++) lo[r][0] = lo[r][1] = hi[r][0] = hi[r][1] = _mm512_setzero_si512();
    const __m512i even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0), odd = _mm512_set_epi64(15, 13, 11, 9, 7, 5, 3, 1);
    // PAGE / 8 sums of 52 bits per lane stay below 2^64.
    for (i64 j = 0; j < n; j += 8) {
        const __m512i z0 = _mm512_maskz_loadu_epi64(lanes8(2 * (n - j)), g + 2 * j),
                      z1 = _mm512_maskz_loadu_epi64(lanes8(2 * (n - j) - 8), g + 2 * j + 8);
        const __m512i pair[2] = {_mm512_permutex2var_epi64(z0, even, z1), _mm512_permutex2var_epi64(z0, odd, z1)};
        const __mmask8 live = lanes8(n - j);
        VA_UNROLL
        for (int r = 0; r < R; r++) {
            const __m512i w = _mm512_cvtepu16_epi64(_mm_maskz_loadu_epi16(live, p + r * p_stride + j));
            VA_UNROLL
            for (int rep = 0; rep < 2; rep++) {
                lo[r][rep] = madd_lo(lo[r][rep], w, pair[rep]);
                hi[r][rep] = madd_hi(hi[r][rep], w, pair[rep]);
            }
        }
    }
    VA_UNROLL
    for (int r = 0; r < R; r++)
        for (int rep = 0; rep < 2; rep++)
            pg[2 * r + rep] = reduce((u128)pg[2 * r + rep] + sum_pair(lo[r][rep], hi[r][rep]));
}

// R rows of pairs of weights [R][PAGE / 2] by 64 columns of pairs of values.
template <int R>
void value_rows(const int32_t* p, i64 pairs, const int32_t* v, i64 d, i64 left, int64_t* o) {
    __m512i acc[R][4];
    __mmask16 live[4];
    VA_UNROLL
    for (int x = 0; x < 4; x++) live[x] = lanes16(left - 16 * x);
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int x = 0; x < 4; x++) acc[r][x] = _mm512_setzero_si512();
    for (i64 j = 0; j < pairs; j++) {
        __m512i w[4];
        VA_UNROLL
        for (int x = 0; x < 4; x++) w[x] = _mm512_maskz_loadu_epi32(live[x], v + j * d + 16 * x);
        VA_UNROLL
        for (int r = 0; r < R; r++) {
            const __m512i b = _mm512_set1_epi32(p[r * (PAGE / 2) + j]);
            VA_UNROLL
            for (int x = 0; x < 4; x++) acc[r][x] = dp_words(acc[r][x], w[x], b);
        }
    }
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int x = 0; x < 4; x++) {
            int64_t* at = o + r * d + 16 * x;
            const __mmask8 m0 = (__mmask8)live[x], m1 = (__mmask8)(live[x] >> 8);
            const __m512i s0 = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(acc[r][x])),
                          s1 = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(acc[r][x], 1));
            _mm512_mask_storeu_epi64(at, m0, _mm512_add_epi64(s0, _mm512_maskz_loadu_epi64(m0, at)));
            _mm512_mask_storeu_epi64(at + 8, m1, _mm512_add_epi64(s1, _mm512_maskz_loadu_epi64(m1, at + 8)));
        }
}

}  // namespace

bool run_scores(const int8_t* q, i64 rows, const int8_t* k, const int8_t* next, i64 n, i64 d, int32_t* out, i64 out_stride) {
    if (!few_rows(rows, d)) return false;
    scores_of_few(q, d, rows, k, next, n, d, out, out_stride);
    return true;
}

float run_max(const int32_t* scores, const float* k_scale, i64 n, float m) {
    __m512 best = _mm512_set1_ps(m);
    for (i64 j = 0; j < n; j += 16) {
        const __mmask16 live = lanes16(n - j);
        best = _mm512_mask_max_ps(best, live, best, product(scores + j, k_scale + j, live));
    }
    return _mm512_reduce_max_ps(best);
}

int32_t run_weigh(const int32_t* scores, const float* k_scale, i64 n, float m, float q_scale, uint16_t* p) {
    const Table table;
    const __m512 top = _mm512_set1_ps(m), scale = _mm512_set1_ps(q_scale);
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i sum = _mm512_setzero_si512();
    for (i64 j = 0; j < n; j += 32) {
        const __mmask16 m0 = lanes16(n - j), m1 = lanes16(n - j - 16);
        const __m512 t0 = product(scores + j, k_scale + j, m0), t1 = product(scores + j + 16, k_scale + j + 16, m1);
        const __m512i w = weights(_mm512_mul_ps(_mm512_sub_ps(top, t0), scale), _mm512_mul_ps(_mm512_sub_ps(top, t1), scale), table);
        const __mmask32 live = (__mmask32)m0 | (__mmask32)m1 << 16;
        const __m512i in_order = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(w)),
                                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)), 1);
        const __m512i seen = _mm512_maskz_mov_epi16(live, in_order);
        sum = dp_words(sum, seen, ones);
        _mm512_mask_storeu_epi16(p + j, live, seen);
    }
    return _mm512_reduce_add_epi32(sum);
}

void run_project(const uint16_t* p, i64 p_stride, i64 rows, const uint64_t* g, i64 n, uint64_t* pg) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) project_rows<4>(p + r * p_stride, p_stride, g, n, pg + 2 * r);
    for (; r < rows; r++) project_rows<1>(p + r * p_stride, p_stride, g, n, pg + 2 * r);
}

void run_values(const uint16_t* p, i64 p_stride, i64 rows, const int8_t* v, const int8_t* next, i64 n, i64 d, int64_t* o) {
    if (few_rows(rows, d)) {
        values_of_few(p, p_stride, rows, v, next, n, d, o);
        return;
    }
    const i64 pairs = (n + 1) / 2;
    int32_t* wide = (int32_t*)scratch(S_GEMM, sizeof(int32_t) * (size_t)(pairs * d));
    for (i64 j = 0; j < n; j += 2) {
        const int8_t* row = v + j * d;
        for (i64 c = 0; c < d; c += 16) {
            const __mmask16 live = lanes16(d - c);
            const __m512i x0 = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(live, row + c)),
                          x1 = j + 1 < n ? _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(live, row + d + c)) : _mm512_setzero_si512();
            _mm512_mask_storeu_epi32(wide + j / 2 * d + c, live, _mm512_mask_blend_epi16(0xaaaaaaaa, x0, _mm512_slli_epi32(x1, 16)));
        }
    }
    alignas(64) int32_t weights4[4 * PAGE / 2];
    for (i64 r = 0; r < rows; r += 4) {
        const i64 count = min64(4, rows - r);
        for (i64 x = 0; x < count; x++) {
            weights4[x * (PAGE / 2) + pairs - 1] = 0;
            memcpy(weights4 + x * (PAGE / 2), p + (r + x) * p_stride, sizeof(uint16_t) * (size_t)n);
        }
        for (i64 c = 0; c < d; c += 64) {
            int64_t* at = o + r * d + c;
            switch (count) {
                case 4: value_rows<4>(weights4, pairs, wide + c, d, d - c, at); break;
                case 3: value_rows<3>(weights4, pairs, wide + c, d, d - c, at); break;
                case 2: value_rows<2>(weights4, pairs, wide + c, d, d - c, at); break;
                default: value_rows<1>(weights4, pairs, wide + c, d, d - c, at); break;
            }
        }
    }
}

}  // namespace avx512
}  // namespace va
