// Attention of a few query rows (decoding) with AVX-512: lanes are keys or dimensions, never rows, so none is idle.
//
// Keys and values are read once, as the cache holds them. Scores of all keys stay in a core's own cache between the two
// passes; the passes themselves are those of shares of attention (avx512_share.cpp), a page at a time.
#include <string.h>

#include "avx512.h"

namespace va {
namespace avx512 {
namespace {

const i64 FEW = 16, MOST_D = 256;  // from more rows on, lanes of rows are the better way

// Sums over the lanes of each 128 bits of four vectors: [a, b, c, d] in every 128 bits.
inline __m512i sum_quarters(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)),
                  cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// The same over the 128-bit parts: four vectors of [x0..x3] parts become one of sixteen sums, in order.
inline __m512i sum_parts(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)),
                  cd = _mm512_add_epi32(_mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd));
}

// out[r * out_stride + j] = q[r] . k[j] for R rows of C vectors of 64 dimensions, the last with `live` of them.
template <int R, int C>
void score_rows(const int8_t* q, i64 q_stride, const int8_t* k, const int8_t* next, i64 n, i64 d, __mmask64 live, int32_t* out,
                i64 out_stride) {
    const __m512i flip = _mm512_set1_epi8((char)0x80), bytes = _mm512_set1_epi8(1);
    __m512i rows[R][C], offset[R];
    VA_UNROLL
    for (int r = 0; r < R; r++) {
        __m512i sum = _mm512_setzero_si512();
        VA_UNROLL
        for (int c = 0; c < C; c++) {
            rows[r][c] = _mm512_maskz_loadu_epi8(c + 1 < C ? ~(__mmask64)0 : live, q + r * q_stride + 64 * c);
            sum = dp_bytes(sum, bytes, rows[r][c]);
        }
        // Keys are made unsigned by adding 128: that much of the sum of the row is too much.
        offset[r] = _mm512_set1_epi32(-128 * _mm512_reduce_add_epi32(sum));
    }
    for (i64 j = 0; j < n; j += 16) {
        __m512i parts[4][R];
        VA_UNROLL
        for (int g = 0; g < 4; g++) {
            __m512i acc[4][R];
            VA_UNROLL
            for (int x = 0; x < 4; x++) {
                const i64 key = min64(j + 4 * g + x, n - 1);
                VA_UNROLL
                for (int r = 0; r < R; r++) acc[x][r] = _mm512_setzero_si512();
                VA_UNROLL
                for (int c = 0; c < C; c++) {
                    const int8_t* at = k + key * d + 64 * c;
                    prefetch(next + (at - k), 0);
                    const __m512i value = _mm512_xor_si512(flip, _mm512_maskz_loadu_epi8(c + 1 < C ? ~(__mmask64)0 : live, at));
                    VA_UNROLL
                    for (int r = 0; r < R; r++) acc[x][r] = dp_bytes(acc[x][r], value, rows[r][c]);
                }
            }
            VA_UNROLL
            for (int r = 0; r < R; r++) parts[g][r] = sum_quarters(acc[0][r], acc[1][r], acc[2][r], acc[3][r]);
        }
        const __mmask16 there = n - j >= 16 ? 0xffff : (__mmask16)((1u << (n - j)) - 1);
        VA_UNROLL
        for (int r = 0; r < R; r++)
            _mm512_mask_storeu_epi32(out + r * out_stride + j, there,
                                     _mm512_add_epi32(offset[r], sum_parts(parts[0][r], parts[1][r], parts[2][r], parts[3][r])));
    }
}

template <int R>
void score_any(const int8_t* q, i64 q_stride, const int8_t* k, const int8_t* next, i64 n, i64 d, int32_t* out, i64 out_stride) {
    const i64 vectors = (d + 63) / 64;
    const __mmask64 live = d % 64 ? ((__mmask64)1 << (d % 64)) - 1 : ~(__mmask64)0;
    switch (vectors) {
        case 1: score_rows<R, 1>(q, q_stride, k, next, n, d, live, out, out_stride); break;
        case 2: score_rows<R, 2>(q, q_stride, k, next, n, d, live, out, out_stride); break;
        case 3: score_rows<R, 3>(q, q_stride, k, next, n, d, live, out, out_stride); break;
        default: score_rows<R, 4>(q, q_stride, k, next, n, d, live, out, out_stride); break;
    }
}

// O += P V for R rows and up to 64 columns, `left` of them; p and v as in run_values().
template <int R>
void value_rows(const uint16_t* p, i64 p_stride, const int8_t* v, const int8_t* next, i64 n, i64 left, i64 d, int64_t* o) {
    // Pairs of keys as pairs of 16-bit words: unpacking leaves dimensions in the order of `low` and `high` below.
    __m512i acc[R][4];
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int x = 0; x < 4; x++) acc[r][x] = _mm512_setzero_si512();
    const __mmask32 m0 = left >= 32 ? ~0u : (1u << left) - 1, m1 = left >= 64 ? ~0u : left > 32 ? (1u << (left - 32)) - 1 : 0;
    for (i64 j = 0; j < n; j += 2) {
        const bool both = j + 1 < n;
        const int8_t *v0 = v + j * d, *v1 = both ? v0 + d : v0;
        prefetch(next + (v0 - v), 0);
        prefetch(next + (v1 - v), 0);
        const __m512i a0 = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(m0, v0)), a1 = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(m0, v1)),
                      b0 = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(m1, v0 + 32)), b1 = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(m1, v1 + 32));
        const __m512i pairs[4] = {_mm512_unpacklo_epi16(a0, a1), _mm512_unpackhi_epi16(a0, a1), _mm512_unpacklo_epi16(b0, b1),
                                  _mm512_unpackhi_epi16(b0, b1)};
        VA_UNROLL
        for (int r = 0; r < R; r++) {
            const uint16_t* at = p + r * p_stride + j;
            int32_t two = at[0];
            if (both) memcpy(&two, at, 4);
            const __m512i weight = _mm512_set1_epi32(two);
            VA_UNROLL
            for (int x = 0; x < 4; x++) acc[r][x] = dp_words(acc[r][x], pairs[x], weight);
        }
    }
    // Four dimensions of each vector in turn: low = 0..3, 8..11, ...; high = 4..7, 12..15, ...
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0),
                  second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int x = 0; x < 4; x++) {
            const __m512i sums = _mm512_permutex2var_epi32(acc[r][x / 2 * 2], x % 2 ? second : first, acc[r][x / 2 * 2 + 1]);
            const i64 live = left - 16 * x;
            const __mmask8 l0 = live >= 8 ? 0xff : live > 0 ? (__mmask8)((1u << live) - 1) : 0,
                           l1 = live >= 16 ? 0xff : live > 8 ? (__mmask8)((1u << (live - 8)) - 1) : 0;
            int64_t* at = o + r * d + 16 * x;
            const __m512i s0 = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sums)), s1 = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sums, 1));
            _mm512_mask_storeu_epi64(at, l0, _mm512_add_epi64(s0, _mm512_maskz_loadu_epi64(l0, at)));
            _mm512_mask_storeu_epi64(at + 8, l1, _mm512_add_epi64(s1, _mm512_maskz_loadu_epi64(l1, at + 8)));
        }
}

template <int R>
void values_any(const uint16_t* p, i64 p_stride, const int8_t* v, const int8_t* next, i64 n, i64 d, int64_t* o) {
    for (i64 c = 0; c < d; c += 64) value_rows<R>(p, p_stride, v + c, next + c, n, d - c, d, o + c);
}

}  // namespace

// What is needed of head dimensions and rows for the code in this file.
bool few_rows(i64 rows, i64 d) { return rows <= FEW && d <= MOST_D; }

void scores_of_few(const int8_t* q, i64 q_stride, i64 rows, const int8_t* k, const int8_t* next, i64 n, i64 d, int32_t* out,
                   i64 out_stride) {
    for (; rows >= 4; rows -= 4, q += 4 * q_stride, out += 4 * out_stride) score_any<4>(q, q_stride, k, next, n, d, out, out_stride);
    switch (rows) {
        case 3: score_any<3>(q, q_stride, k, next, n, d, out, out_stride); break;
        case 2: score_any<2>(q, q_stride, k, next, n, d, out, out_stride); break;
        case 1: score_any<1>(q, q_stride, k, next, n, d, out, out_stride); break;
        default: break;
    }
}

void values_of_few(const uint16_t* p, i64 p_stride, i64 rows, const int8_t* v, const int8_t* next, i64 n, i64 d, int64_t* o) {
    for (; rows >= 4; rows -= 4, p += 4 * p_stride, o += 4 * d) values_any<4>(p, p_stride, v, next, n, d, o);
    switch (rows) {
        case 3: values_any<3>(p, p_stride, v, next, n, d, o); break;
        case 2: values_any<2>(p, p_stride, v, next, n, d, o); break;
        case 1: values_any<1>(p, p_stride, v, next, n, d, o); break;
        default: break;
    }
}

// attention() for the rows of queries i0 .. i1, few_rows() of them.
void attention_of_few(const AttentionArgs& s, i64 kv, i64 i0, i64 i1) {
    const i64 d = s.d, group = s.heads / s.kv_heads, rows = (i1 - i0) * group, n = s.start + i1, stride = (n + 15) / 16 * 16;
    const bool one_pass = s.row_max != nullptr;
    int32_t* scores = (int32_t*)scratch(S_T, sizeof(int32_t) * (size_t)(rows * (one_pass ? PAGE : stride)));
    const i64 score_stride = one_pass ? PAGE : stride;
    int64_t* o = (int64_t*)scratch(S_ROW, sizeof(int64_t) * (size_t)(rows * d));
    alignas(64) uint16_t p[FEW * PAGE];
    uint64_t pg[2 * FEW] = {};
    int32_t sum[FEW] = {};
    float m[FEW];
    i64 row_of[FEW], sees[FEW];
    int8_t q[FEW * MOST_D];
    for (i64 r = 0; r < rows; r++) {
        const i64 i = i0 + r / group;
        row_of[r] = i * s.heads + kv * group + r % group;
        sees[r] = s.start + i + 1;
        m[r] = one_pass ? s.row_max[row_of[r]] : -__builtin_inff();
        memcpy(q + r * d, s.q + row_of[r] * d, (size_t)d);
    }
    auto page_of = [&](i64 base) { return ((i64)s.table[base / PAGE] * s.kv_heads + kv) * PAGE; };
    // While a page is used, the next one is fetched.
    auto after = [&](i64 base) { return page_of(base + PAGE < n ? base + PAGE : base); };
    for (i64 base = 0; base < n && !one_pass; base += PAGE) {
        const i64 at = page_of(base);
        scores_of_few(q, d, rows, s.k_pages + at * d, s.k_pages + after(base) * d, min64(PAGE, n - base), d, scores + base, score_stride);
        for (i64 r = 0; r < rows; r++)
            m[r] = run_max(scores + r * score_stride + base, s.k_scale + at, min64(PAGE, sees[r] - base), m[r]);
    }
    if (s.own_max) {
        for (i64 r = 0; r < rows; r++) s.own_max[row_of[r]] = m[r];
        return;
    }
    memset(o, 0, sizeof(int64_t) * (size_t)(rows * d));
    for (i64 base = 0; base < n; base += PAGE) {
        const i64 at = page_of(base), count = min64(PAGE, n - base), column = one_pass ? 0 : base;
        if (one_pass) scores_of_few(q, d, rows, s.k_pages + at * d, s.k_pages + after(base) * d, count, d, scores, score_stride);
        for (i64 r = 0; r < rows; r++) {
            const i64 seen = sees[r] - base < 0 ? 0 : min64(count, sees[r] - base);
            sum[r] += run_weigh(scores + r * score_stride + column, s.k_scale + at, seen, m[r], s.q_scale[row_of[r]], p + r * PAGE);
            memset(p + r * PAGE + seen, 0, sizeof(uint16_t) * (size_t)(count - seen));
        }
        if (s.g_pages) run_project(p, PAGE, rows, s.g_pages + at * 2, count, pg);
        if (s.v_pages) values_of_few(p, PAGE, rows, s.v_pages + at * d, s.v_pages + after(base) * d, count, d, o);
    }
    for (i64 r = 0; r < rows; r++) {
        s.l[row_of[r]] = sum[r];
        if (s.g_pages) memcpy(s.pg + row_of[r] * 2, pg + 2 * r, 2 * sizeof(uint64_t));
        if (s.v_pages) memcpy(s.o + row_of[r] * d, o + r * d, sizeof(int64_t) * (size_t)d);
    }
}

}  // namespace avx512
}  // namespace va
