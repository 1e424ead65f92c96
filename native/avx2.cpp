// The AVX2 table: elementwise kernels vectorised by the compiler; products, attention and the claims' side of checks by
// hand with 16-bit multiply-adds. (This file alone is built with -mavx2.)
#include <immintrin.h>
#include <string.h>

#include "common.h"

#define VA_NS avx2
#define VA_LANES 8
// Some of the portable kernels are replaced below.
#pragma GCC diagnostic ignored "-Wunused-function"
#include "elementwise.inc"
#include "generic.inc"

#define VA_UNROLL _Pragma("GCC unroll 16")

namespace va {
namespace avx2 {
namespace hand {
namespace {

inline int32_t sum_of(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
}

inline __m256i madd(__m256i acc, __m256i a, __m256i b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }

// --- gemm: rows of weights as given, rows of inputs widened to 16 bits and padded with zeros ------------------------

template <int R, int C>
void block(const int16_t* a, i64 lda, const int8_t* w, i64 k, int32_t* y, i64 ldy) {
    __m256i acc[R][C];
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int c = 0; c < C; c++) acc[r][c] = _mm256_setzero_si256();
    i64 x = 0;
    for (; x + 16 <= k; x += 16) {
        __m256i av[R];
        VA_UNROLL
        for (int r = 0; r < R; r++) av[r] = _mm256_loadu_si256((const __m256i*)(a + r * lda + x));
        VA_UNROLL
        for (int c = 0; c < C; c++) {
            const __m256i wv = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + c * k + x)));
            VA_UNROLL
            for (int r = 0; r < R; r++) acc[r][c] = madd(acc[r][c], av[r], wv);
        }
    }
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int c = 0; c < C; c++) {
            int32_t s = sum_of(acc[r][c]);
            for (i64 e = x; e < k; e++) s += a[r * lda + e] * w[c * k + e];
            y[r * ldy + c] = s;
        }
}

void gemm(const uint8_t* packed, i64 n, i64 k, const int8_t* a, i64 m, i64 n0, i64 n1, int32_t* y) {
    const int8_t* w = (const int8_t*)packed;
    const i64 rows = 64;
    int16_t* wide = (int16_t*)scratch(S_GEMM, sizeof(int16_t) * (size_t)(rows * k));
    for (i64 m0 = 0; m0 < m; m0 += rows) {
        const i64 count = min64(rows, m - m0);
        widen(a + m0 * k, count * k, wide);
        i64 j = n0;
        for (; j + 4 <= n1; j += 4) {
            i64 i = 0;
            for (; i + 2 <= count; i += 2) block<2, 4>(wide + i * k, k, w + j * k, k, y + (m0 + i) * n + j, n);
            if (i < count) block<1, 4>(wide + i * k, k, w + j * k, k, y + (m0 + i) * n + j, n);
        }
        for (; j < n1; j++)
            for (i64 i = 0; i < count; i++) block<1, 1>(wide + i * k, k, w + j * k, k, y + (m0 + i) * n + j, n);
    }
}

// --- attention: keys transposed once per call to pairs of dimensions, lanes are keys -------------------------------

// Transposing keys pays from about 16 rows on.
inline bool by_hand(const AttentionArgs& s) {
    return s.d % 8 == 0 && s.d <= 1024 && s.tokens * (s.heads / s.kv_heads) >= 16;
}

struct Prepared {
    int32_t* keys;   // per page [d / 2][PAGE] pairs of 16-bit elements
    int32_t* g;      // per page [rep][low 25 bits, high 25 bits][PAGE]
    int32_t* pairs;  // [keys / 2][d] pairs of 16-bit values
};

i64 used_pages(const AttentionArgs& s) { return (s.start + s.tokens + PAGE - 1) / PAGE; }

size_t prepare_bytes(const AttentionArgs& s) {
    if (!by_hand(s)) return 0;
    const size_t keys = (size_t)(used_pages(s) * PAGE);
    return keys * (2 * (size_t)s.d + (s.g_pages ? 16 : 0) + (s.v_pages ? 2 * (size_t)s.d : 0));
}

Prepared prepared_of(const AttentionArgs& s, i64 kv) {
    const i64 keys = used_pages(s) * PAGE;
    Prepared p;
    p.keys = (int32_t*)((char*)s.prepared + (size_t)kv * prepare_bytes(s));
    p.g = p.keys + keys * s.d / 2;
    p.pairs = p.g + (s.g_pages ? keys * 4 : 0);
    return p;
}

inline int32_t pair_of(int8_t low, int8_t high) { return (int32_t)((uint32_t)(uint16_t)low | (uint32_t)(uint16_t)high << 16); }

void prepare(const AttentionArgs& s, i64 kv, i64 p0, i64 p1) {
    const i64 d = s.d;
    const Prepared prep = prepared_of(s, kv);
    for (i64 page = p0; page < p1; page++) {
        const i64 at = ((i64)s.table[page] * s.kv_heads + kv) * PAGE, base = page * PAGE;
        int32_t* keys = prep.keys + base * d / 2;
        for (i64 j = 0; j < PAGE; j++) {
            const int8_t* k = s.k_pages + (at + j) * d;
            for (i64 c = 0; c < d / 2; c++) keys[c * PAGE + j] = pair_of(k[2 * c], k[2 * c + 1]);
        }
        if (s.g_pages) {
            int32_t* to = prep.g + base * 4;
            for (i64 j = 0; j < PAGE; j++)
                for (int rep = 0; rep < 2; rep++) {
                    const uint64_t x = s.g_pages[(at + j) * 2 + rep];
                    to[(2 * rep) * PAGE + j] = (int32_t)(x & ((1 << 25) - 1));
                    to[(2 * rep + 1) * PAGE + j] = (int32_t)(x >> 25);
                }
        }
        if (s.v_pages)
            for (i64 j = 0; j < PAGE; j += 2) {
                const int8_t *v0 = s.v_pages + (at + j) * d, *v1 = v0 + d;
                int32_t* out = prep.pairs + (base + j) / 2 * d;
                for (i64 c = 0; c < d; c += 8) {
                    const __m256i x0 = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(v0 + c))),
                                  x1 = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(v1 + c)));
                    _mm256_storeu_si256((__m256i*)(out + c), _mm256_blend_epi16(x0, _mm256_slli_epi32(x1, 16), 0xaa));
                }
            }
    }
}

i64 tile_queries(const AttentionArgs& s) {
    const i64 group = s.heads / s.kv_heads;
    return group < 16 ? 16 / group : 1;
}

// P of 8 keys as 32-bit numbers.
inline __m256i weights8(__m256 t, __m256 m, __m256 q_scale) {
    const __m256 y = _mm256_min_ps(_mm256_mul_ps(_mm256_sub_ps(m, t), q_scale), _mm256_set1_ps(XI_MAX));
    const __m256i xi = _mm256_cvtps_epi32(y);
    const __m256i entry = _mm256_i32gather_epi32((const int*)LUT15, _mm256_and_si256(xi, _mm256_set1_epi32(63)), 4);
    const __m256i shifted = _mm256_srlv_epi32(entry, _mm256_srli_epi32(xi, 6));
    return _mm256_srli_epi32(_mm256_add_epi32(shifted, _mm256_set1_epi32(1)), 1);
}

inline __m256i below(i64 count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(count > 8 ? 8 : count < 0 ? 0 : count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline int64_t sum_wide(__m256i v) {
    alignas(32) int64_t x[4];
    _mm256_store_si256((__m256i*)x, v);
    return x[0] + x[1] + x[2] + x[3];
}

const int ROWS_AT_ONCE = 4;

// Four rows (the last ones repeated where there are fewer): scores of all pages, then weights and their products.
void four_rows(const AttentionArgs& s, i64 kv, const i64* row, const i64* visible, float* t, i64 t_stride) {
    const i64 d = s.d, half = d / 2;
    const Prepared prep = prepared_of(s, kv);
    i64 most = 0;
    for (int r = 0; r < ROWS_AT_ONCE; r++) most = visible[r] > most ? visible[r] : most;
    int32_t* q = (int32_t*)scratch(S_GEMM, sizeof(int32_t) * (size_t)(ROWS_AT_ONCE * half));
    for (int r = 0; r < ROWS_AT_ONCE; r++)
        for (i64 c = 0; c < half; c++) q[r * half + c] = pair_of(s.q[row[r] * d + 2 * c], s.q[row[r] * d + 2 * c + 1]);
    __m256 best[ROWS_AT_ONCE];
    for (int r = 0; r < ROWS_AT_ONCE; r++) best[r] = _mm256_set1_ps(-__builtin_inff());
    for (i64 base = 0; base < most; base += PAGE) {
        const i64 count = min64(PAGE, most - base), at = ((i64)s.table[base / PAGE] * s.kv_heads + kv) * PAGE;
        const int32_t* keys = prep.keys + base * half;
        for (i64 j = 0; j < count; j += 16) {
            __m256i acc[ROWS_AT_ONCE][2];
            VA_UNROLL
            for (int r = 0; r < ROWS_AT_ONCE; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
            for (i64 c = 0; c < half; c++) {
                const __m256i k0 = _mm256_loadu_si256((const __m256i*)(keys + c * PAGE + j)),
                              k1 = _mm256_loadu_si256((const __m256i*)(keys + c * PAGE + j + 8));
                VA_UNROLL
                for (int r = 0; r < ROWS_AT_ONCE; r++) {
                    const __m256i qv = _mm256_set1_epi32(q[r * half + c]);
                    acc[r][0] = madd(acc[r][0], k0, qv);
                    acc[r][1] = madd(acc[r][1], k1, qv);
                }
            }
            VA_UNROLL
            for (int x = 0; x < 2; x++) {
                const __m256 scale = _mm256_loadu_ps(s.k_scale + at + j + 8 * x);
                VA_UNROLL
                for (int r = 0; r < ROWS_AT_ONCE; r++) {
                    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[r][x]), scale);
                    _mm256_storeu_ps(t + r * t_stride + base + j + 8 * x, value);
                    const __m256 sees = _mm256_castsi256_ps(below(visible[r] - (base + j + 8 * x)));
                    best[r] = _mm256_blendv_ps(best[r], _mm256_max_ps(best[r], value), sees);
                }
            }
        }
    }
    int64_t* o = (int64_t*)scratch(S_ROW, sizeof(int64_t) * (size_t)d);
    alignas(32) int16_t p[PAGE];
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, best[r]);
        float top = lanes[0];
        for (int x = 1; x < 8; x++) top = lanes[x] > top ? lanes[x] : top;
        if (s.own_max) {
            s.own_max[row[r]] = top;
            continue;
        }
        if (s.row_max) top = s.row_max[row[r]];
        const __m256 m = _mm256_set1_ps(top), q_scale = _mm256_set1_ps(s.q_scale[row[r]]);
        __m256i sum = _mm256_setzero_si256(), g_sum[4];
        for (int e = 0; e < 4; e++) g_sum[e] = _mm256_setzero_si256();
        if (s.v_pages) memset(o, 0, sizeof(int64_t) * (size_t)d);
        for (i64 base = 0; base < visible[r]; base += PAGE) {
            const i64 count = min64(PAGE, visible[r] - base);
            const int32_t* g = prep.g + base * 4;
            for (i64 j = 0; j < count; j += 8) {
                __m256i w = weights8(_mm256_loadu_ps(t + r * t_stride + base + j), m, q_scale);
                w = _mm256_and_si256(w, below(count - j));
                sum = _mm256_add_epi32(sum, w);
                if (s.g_pages) {
                    const __m256i odd = _mm256_srli_epi64(w, 32);
                    VA_UNROLL
                    for (int e = 0; e < 4; e++) {
                        const __m256i gv = _mm256_loadu_si256((const __m256i*)(g + e * PAGE + j));
                        g_sum[e] = _mm256_add_epi64(g_sum[e], _mm256_mul_epu32(w, gv));
                        g_sum[e] = _mm256_add_epi64(g_sum[e], _mm256_mul_epu32(odd, _mm256_srli_epi64(gv, 32)));
                    }
                }
                const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0x08);
                _mm_storeu_si128((__m128i*)(p + j), _mm256_castsi256_si128(narrow));
            }
            if (s.v_pages) {
                // 256 * 16336 * 128 < 2^31
                const int32_t* values = prep.pairs + base / 2 * d;
                const i64 pairs = (count + 1) / 2;
                for (i64 c0 = 0; c0 < d; c0 += 64) {
                    const i64 cols = min64(64, d - c0) / 8;
                    __m256i acc[8];
                    VA_UNROLL
                    for (int x = 0; x < 8; x++) acc[x] = _mm256_setzero_si256();
                    for (i64 j = 0; j < pairs; j++) {
                        int32_t two;
                        memcpy(&two, p + 2 * j, 4);
                        const __m256i b = _mm256_set1_epi32(two);
                        const __m256i* v = (const __m256i*)(values + j * d + c0);
                        if (cols == 8) {
                            VA_UNROLL
                            for (int x = 0; x < 8; x++) acc[x] = madd(acc[x], b, _mm256_loadu_si256(v + x));
                        } else {
                            VA_UNROLL
                            for (int x = 0; x < 8; x++)
                                if (x < cols) acc[x] = madd(acc[x], b, _mm256_loadu_si256(v + x));
                        }
                    }
                    alignas(32) int32_t sums[64];
                    VA_UNROLL
                    for (int x = 0; x < 8; x++) _mm256_store_si256((__m256i*)(sums + 8 * x), acc[x]);
                    for (i64 c = 0; c < 8 * cols; c++) o[c0 + c] += sums[c];
                }
            }
        }
        s.l[row[r]] = sum_of(sum);
        if (s.g_pages)
            for (int rep = 0; rep < 2; rep++)
                s.pg[row[r] * 2 + rep] =
                    reduce((u128)(uint64_t)sum_wide(g_sum[2 * rep]) + ((u128)(uint64_t)sum_wide(g_sum[2 * rep + 1]) << 25));
        if (s.v_pages) memcpy(s.o + row[r] * d, o, sizeof(int64_t) * (size_t)d);
    }
}

void attention(const AttentionArgs& s, i64 kv, i64 i0, i64 i1) {
    if (!s.prepared) {
        avx2::attention(s, kv, i0, i1);
        return;
    }
    const i64 group = s.heads / s.kv_heads, rows = (i1 - i0) * group, t_stride = s.start + i1 + 16;
    float* t = (float*)scratch(S_T, sizeof(float) * (size_t)(ROWS_AT_ONCE * t_stride));
    for (i64 first = 0; first < rows; first += ROWS_AT_ONCE) {
        i64 row[ROWS_AT_ONCE], visible[ROWS_AT_ONCE];
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            const i64 x = min64(first + r, rows - 1), i = i0 + x / group;
            row[r] = i * s.heads + kv * group + x % group;
            visible[r] = s.start + i + 1;
        }
        four_rows(s, kv, row, visible, t, t_stride);
    }
}

// --- claims against challenges: 32 x 25-bit products, folded to 32-bit halves every 64 -----------------------------

inline __m256i load_once(const int32_t* p) {
    __m256i x;
    asm volatile("vmovdqu %1, %0" : "=x"(x) : "m"(*(const int32_t(*)[8])p));
    return x;
}

void dot_i32(const int32_t* y, i64 n, const uint64_t* r, i64 t0, i64 t1, int32_t* copy, uint64_t* out) {
    if (t1 - t0 < 4) {
        avx2::dot_i32(y, n, r, t0, t1, copy, out);  // splitting r would cost more than it saves
        return;
    }
    const i64 whole = n / 8 * 8;
    // Challenges of eight claims: even ones, then odd ones, each in halves of 25 bits: [n / 8][rep][half][even, odd][4].
    uint64_t* split = (uint64_t*)scratch(S_FIELD, sizeof(uint64_t) * (size_t)(whole * 4 + 4));
    u128 r_total[2] = {0, 0};
    for (int rep = 0; rep < 2; rep++)
        for (i64 j = 0; j < whole; j++) {
            const uint64_t x = r[rep * n + j];
            r_total[rep] += x;
            for (int half = 0; half < 2; half++)
                split[j / 8 * 32 + rep * 16 + half * 8 + (j & 1) * 4 + j % 8 / 2] = half ? x >> 25 : x & ((1 << 25) - 1);
        }
    const __m256i flip = _mm256_set1_epi32((int)0x80000000), low32 = _mm256_set1_epi64x(0xffffffff);
    for (i64 t = t0; t < t1; t++) {
        const int32_t* row = y + t * n;
        __m256i lo[4], hi[4];
        for (int e = 0; e < 4; e++) lo[e] = hi[e] = _mm256_setzero_si256();
        for (i64 j0 = 0; j0 < whole; j0 += 256) {
            __m256i acc[4];
            VA_UNROLL
            for (int e = 0; e < 4; e++) acc[e] = _mm256_setzero_si256();
            for (i64 j = j0, j1 = min64(whole, j0 + 256); j < j1; j += 8) {
                const __m256i claim = load_once(row + j);
                if (copy) _mm256_storeu_si256((__m256i*)(copy + t * n + j), claim);
                const __m256i u = _mm256_xor_si256(claim, flip), odd = _mm256_srli_epi64(u, 32);
                const __m256i* c = (const __m256i*)(split + j * 4);
                VA_UNROLL
                for (int e = 0; e < 4; e++) {
                    acc[e] = _mm256_add_epi64(acc[e], _mm256_mul_epu32(u, _mm256_loadu_si256(c + 2 * e)));
                    acc[e] = _mm256_add_epi64(acc[e], _mm256_mul_epu32(odd, _mm256_loadu_si256(c + 2 * e + 1)));
                }
            }
            // At most 64 products of 57 bits per lane.
            VA_UNROLL
            for (int e = 0; e < 4; e++) {
                lo[e] = _mm256_add_epi64(lo[e], _mm256_and_si256(acc[e], low32));
                hi[e] = _mm256_add_epi64(hi[e], _mm256_srli_epi64(acc[e], 32));
            }
        }
        i128 tail[2] = {0, 0};
        for (i64 j = whole; j < n; j++) {
            const int64_t v = *(const volatile int32_t*)(row + j);
            if (copy) copy[t * n + j] = (int32_t)v;
            for (int rep = 0; rep < 2; rep++) tail[rep] += (i128)v * (int64_t)r[rep * n + j];
        }
        for (int rep = 0; rep < 2; rep++) {
            uint64_t part[2];
            for (int half = 0; half < 2; half++) {
                const int e = 2 * rep + half;
                part[half] = reduce((u128)(uint64_t)sum_wide(lo[e]) + ((u128)(uint64_t)sum_wide(hi[e]) << 32));
            }
            const uint64_t all = reduce((u128)part[0] + ((u128)part[1] << 25));
            out[2 * t + rep] = add_mod(sub_mod(all, reduce((u128)reduce(r_total[rep]) << 31)), reduce_signed(tail[rep]));
        }
    }
}

}  // namespace
}  // namespace hand
}  // namespace avx2

const Kernels avx2_kernels = {
    avx2::norm_quantise, avx2::quantise, avx2::qkv_epilogue, avx2::attention_epilogue,
    avx2::mlp_epilogue, avx2::dequantise, ROWS, avx2::hand::gemm, avx2::hand::prepare_bytes, avx2::hand::prepare,
    avx2::hand::tile_queries, avx2::hand::attention, avx2::transfer, avx2::attention_weights,
    avx2::run_scores, avx2::run_max, avx2::run_weigh, avx2::run_project, avx2::run_values, avx2::hand::dot_i32, avx2::dot_i8,
    avx2::dot_i64, avx2::project, nullptr,
};

}  // namespace va
