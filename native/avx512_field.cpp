// Field sums mod p = 2^50 - 27 with 52-bit multiply-adds (IFMA), or with byte limbs (VNNI) where many rows share u.
//
// Signed numbers are made unsigned by an offset; offset * sum(r) is taken off at the end.
#include <string.h>

#include "avx512.h"

namespace va {
namespace avx512 {
namespace {

const i64 CHUNK = 16384;  // elements between folds: at most 4096 52-bit products per lane

const i64 AHEAD = 2048;  // bytes; hardware prefetching stops at every page of 4 KiB

// R rows of claims against both repetitions of r; each claim is loaded once.
template <int R>
void rows_i32(const int32_t* y, i64 n, const uint64_t* r, int32_t* copy, uint64_t* out) {
    constexpr int CHAINS = R == 1 ? 2 : 1;
    const __m512i flip = _mm512_set1_epi32((int)0x80000000);
    u128 total[R][2] = {}, r_total[2] = {0, 0};
    for (i64 j0 = 0; j0 < n; j0 += CHUNK) {
        const i64 j1 = min64(n, j0 + CHUNK);
        __m512i lo[R][2][CHAINS], hi[R][2][CHAINS], rs[2];
        VA_UNROLL
        for (int rep = 0; rep < 2; rep++) {
            rs[rep] = _mm512_setzero_si512();
            VA_UNROLL
            for (int x = 0; x < R; x++)
                VA_UNROLL
                for (int c = 0; c < CHAINS; c++) lo[x][rep][c] = hi[x][rep][c] = _mm512_setzero_si512();
        }
        for (i64 j = j0; j < j1; j += 16) {
            const i64 left = j1 - j;
            const __mmask16 live = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            __m512i rv[2][2];
            VA_UNROLL
            for (int rep = 0; rep < 2; rep++) {
                VA_UNROLL
                for (int half = 0; half < 2; half++) {
                    rv[rep][half] = _mm512_maskz_loadu_epi64((__mmask8)(live >> (8 * half)), r + rep * n + j + 8 * half);
                    prefetch(r + rep * n + j + 8 * half, AHEAD);
                }
                rs[rep] = _mm512_add_epi64(rs[rep], _mm512_add_epi64(rv[rep][0], rv[rep][1]));
            }
            VA_UNROLL
            for (int x = 0; x < R; x++) {
                prefetch(y + x * n + j, AHEAD);
                const __m512i claim = left >= 16 ? load_once(y + x * n + j) : load_once(y + x * n + j, live);
                if (copy) _mm512_mask_storeu_epi32(copy + x * n + j, live, claim);
                const __m512i u = _mm512_xor_si512(claim, flip);
                const __m512i part[2] = {_mm512_cvtepu32_epi64(_mm512_castsi512_si256(u)),
                                         _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(u, 1))};
                VA_UNROLL
                for (int half = 0; half < 2; half++)
                    VA_UNROLL
                    for (int rep = 0; rep < 2; rep++) {
                        const int c = half % CHAINS;
                        lo[x][rep][c] = madd_lo(lo[x][rep][c], part[half], rv[rep][half]);
                        hi[x][rep][c] = madd_hi(hi[x][rep][c], part[half], rv[rep][half]);
                    }
            }
        }
        VA_UNROLL
        for (int rep = 0; rep < 2; rep++) {
            r_total[rep] += sum_lanes(rs[rep]);
            VA_UNROLL
            for (int x = 0; x < R; x++)
                VA_UNROLL
                for (int c = 0; c < CHAINS; c++) total[x][rep] += sum_pair(lo[x][rep][c], hi[x][rep][c]);
        }
    }
    VA_UNROLL
    for (int rep = 0; rep < 2; rep++) {
        const uint64_t off = reduce((u128)reduce(r_total[rep]) << 31);
        VA_UNROLL
        for (int x = 0; x < R; x++) out[2 * x + rep] = sub_mod(reduce(total[x][rep]), off);
    }
}

template <int R>
void rows_i8(const int8_t* a, i64 stride, i64 k, const uint64_t* u, uint64_t* out, i64 out_stride) {
    constexpr int CHAINS = R == 1 ? 2 : 1;
    u128 total[R][2], u_total[2] = {0, 0};
    const __m512i offset = _mm512_set1_epi64(128);
    VA_UNROLL
    for (int x = 0; x < R; x++) total[x][0] = total[x][1] = 0;
    for (i64 j0 = 0; j0 < k; j0 += CHUNK) {
        const i64 j1 = min64(k, j0 + CHUNK);
        __m512i lo[R][2][CHAINS], hi[R][2][CHAINS], us[2];
        VA_UNROLL
        for (int rep = 0; rep < 2; rep++) {
            us[rep] = _mm512_setzero_si512();
            VA_UNROLL
            for (int x = 0; x < R; x++)
                VA_UNROLL
                for (int c = 0; c < CHAINS; c++) lo[x][rep][c] = hi[x][rep][c] = _mm512_setzero_si512();
        }
        int c = 0;
        for (i64 j = j0; j < j1; j += 8, c = (c + 1) % CHAINS) {
            const i64 left = j1 - j;
            const __mmask8 live = left >= 8 ? 0xff : (__mmask8)((1u << left) - 1);
            __m512i uv[2];
            VA_UNROLL
            for (int rep = 0; rep < 2; rep++) {
                uv[rep] = _mm512_maskz_loadu_epi64(live, u + rep * k + j);
                prefetch(u + rep * k + j, AHEAD);
                us[rep] = _mm512_add_epi64(us[rep], uv[rep]);
            }
            VA_UNROLL
            for (int x = 0; x < R; x++) {
                const __m128i bytes = left >= 8 ? _mm_loadl_epi64((const __m128i*)(a + x * stride + j))
                                                : _mm_maskz_loadu_epi8(live, a + x * stride + j);
                const __m512i av = _mm512_add_epi64(_mm512_cvtepi8_epi64(bytes), offset);
                VA_UNROLL
                for (int rep = 0; rep < 2; rep++) {
                    if (CHAINS == 1 || c == 0) {
                        lo[x][rep][0] = madd_lo(lo[x][rep][0], av, uv[rep]);
                        hi[x][rep][0] = madd_hi(hi[x][rep][0], av, uv[rep]);
                    } else {
                        lo[x][rep][CHAINS - 1] = madd_lo(lo[x][rep][CHAINS - 1], av, uv[rep]);
                        hi[x][rep][CHAINS - 1] = madd_hi(hi[x][rep][CHAINS - 1], av, uv[rep]);
                    }
                }
            }
        }
        VA_UNROLL
        for (int rep = 0; rep < 2; rep++) {
            u_total[rep] += sum_lanes(us[rep]);
            VA_UNROLL
            for (int x = 0; x < R; x++)
                VA_UNROLL
                for (int e = 0; e < CHAINS; e++) total[x][rep] += sum_pair(lo[x][rep][e], hi[x][rep][e]);
        }
    }
    VA_UNROLL
    for (int rep = 0; rep < 2; rep++) {
        const uint64_t off = reduce((u128)reduce(u_total[rep]) << 7);
        VA_UNROLL
        for (int x = 0; x < R; x++) out[x * out_stride + rep] = sub_mod(reduce(total[x][rep]), off);
    }
}

const int LIMBS = 7;  // bytes of an element below 2^50

// Two rows against all 14 byte limbs: 64 elements per instruction and limb. 131071 * 255 * 128 / 16 < 2^31.
template <int R>
void rows_limbs(const int8_t* a, i64 stride, i64 k, const uint8_t* limbs, uint64_t* out, i64 out_stride) {
    __m512i acc[R][2 * LIMBS];
    VA_UNROLL
    for (int x = 0; x < R; x++)
        VA_UNROLL
        for (int e = 0; e < 2 * LIMBS; e++) acc[x][e] = _mm512_setzero_si512();
    for (i64 j = 0; j < k; j += 64, limbs += 2 * LIMBS * 64) {
        const __mmask64 live = k - j >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (k - j)) - 1;
        __m512i av[R];
        VA_UNROLL
        for (int x = 0; x < R; x++) av[x] = _mm512_maskz_loadu_epi8(live, a + x * stride + j);
        VA_UNROLL
        for (int e = 0; e < 2 * LIMBS; e++) {
            const __m512i l = _mm512_load_si512(limbs + e * 64);
            VA_UNROLL
            for (int x = 0; x < R; x++) acc[x][e] = dp_bytes(acc[x][e], l, av[x]);
        }
    }
    VA_UNROLL
    for (int x = 0; x < R; x++)
        VA_UNROLL
        for (int rep = 0; rep < 2; rep++) {
            i128 sum = 0;
            VA_UNROLL
            for (int e = LIMBS - 1; e >= 0; e--) {
                // 16 lanes may not fit 32 bits together.
                const __m512i v = acc[x][rep * LIMBS + e];
                const __m512i wide = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                                                      _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
                sum = sum * 256 + _mm512_reduce_add_epi64(wide);
            }
            out[x * out_stride + rep] = reduce_signed(sum);
        }
}

}  // namespace

void dot_i32(const int32_t* y, i64 n, const uint64_t* r, i64 t0, i64 t1, int32_t* copy, uint64_t* out) {
    i64 t = t0;
    for (; t + 4 <= t1; t += 4) rows_i32<4>(y + t * n, n, r, copy ? copy + t * n : nullptr, out + 2 * t);
    for (; t < t1; t++) rows_i32<1>(y + t * n, n, r, copy ? copy + t * n : nullptr, out + 2 * t);
}

void dot_i8(const int8_t* a, i64 stride, i64 k, const uint64_t* u, i64 t0, i64 t1, uint64_t* out, i64 out_stride) {
    i64 t = t0;
    if (t1 - t0 >= 16) {
        // Splitting u into limbs pays from about 16 rows on.
        const i64 blocks = (k + 63) / 64;
        uint8_t* limbs = (uint8_t*)scratch(S_FIELD, (size_t)(blocks * 2 * LIMBS * 64));
        for (i64 b = 0; b < blocks; b++)
            VA_UNROLL
            for (int rep = 0; rep < 2; rep++)
                VA_UNROLL
                for (int part = 0; part < 8; part++) {
                    const i64 j = b * 64 + part * 8, left = k - j;
                    const __mmask8 live = left >= 8 ? 0xff : left > 0 ? (__mmask8)((1u << left) - 1) : 0;
                    __m512i v = _mm512_maskz_loadu_epi64(live, u + rep * k + j);
                    VA_UNROLL
                    for (int e = 0; e < LIMBS; e++) {
                        _mm_storel_epi64((__m128i*)(limbs + ((b * 2 + rep) * LIMBS + e) * 64 + part * 8),
                                         _mm512_cvtepi64_epi8(v));
                        v = _mm512_srli_epi64(v, 8);
                    }
                }
        for (; t + 2 <= t1; t += 2) rows_limbs<2>(a + t * stride, stride, k, limbs, out + t * out_stride, out_stride);
        for (; t < t1; t++) rows_limbs<1>(a + t * stride, stride, k, limbs, out + t * out_stride, out_stride);
        return;
    }
    for (; t + 4 <= t1; t += 4) rows_i8<4>(a + t * stride, stride, k, u, out + t * out_stride, out_stride);
    for (; t < t1; t++) rows_i8<1>(a + t * stride, stride, k, u, out + t * out_stride, out_stride);
}

namespace {

template <int R>
void rows_i64(const int64_t* o, i64 stride, i64 k, const uint64_t* u, const uint64_t* off, uint64_t* out,
              i64 out_stride, __m512i* all, __m512i* least) {
    const __m512i offset = _mm512_set1_epi64((int64_t)1 << 39);
    uint64_t total[R][2] = {};
    for (i64 j0 = 0; j0 < k; j0 += CHUNK) {
        const i64 j1 = min64(k, j0 + CHUNK);
        __m512i lo[R][2], hi[R][2];
        VA_UNROLL
        for (int x = 0; x < R; x++) lo[x][0] = lo[x][1] = hi[x][0] = hi[x][1] = _mm512_setzero_si512();
        for (i64 j = j0; j < j1; j += 8) {
            const i64 left = j1 - j;
            const __mmask8 live = left >= 8 ? 0xff : (__mmask8)((1u << left) - 1);
            const __m512i u0 = _mm512_maskz_loadu_epi64(live, u + j), u1 = _mm512_maskz_loadu_epi64(live, u + k + j);
            VA_UNROLL
            for (int x = 0; x < R; x++) {
                const __m512i v = _mm512_add_epi64(_mm512_maskz_loadu_epi64(live, o + x * stride + j), offset);
                *all = _mm512_or_si512(*all, v);
                *least = _mm512_min_epu64(*least, v);
                lo[x][0] = madd_lo(lo[x][0], v, u0);
                hi[x][0] = madd_hi(hi[x][0], v, u0);
                lo[x][1] = madd_lo(lo[x][1], v, u1);
                hi[x][1] = madd_hi(hi[x][1], v, u1);
            }
        }
        VA_UNROLL
        for (int x = 0; x < R; x++)
            for (int rep = 0; rep < 2; rep++) total[x][rep] += sum_pair(lo[x][rep], hi[x][rep]);
    }
    for (int x = 0; x < R; x++)
        for (int rep = 0; rep < 2; rep++) out[x * out_stride + rep] = sub_mod(reduce(total[x][rep]), off[rep]);
}

}  // namespace

bool dot_i64(const int64_t* o, i64 stride, i64 k, const uint64_t* u, i64 t0, i64 t1, uint64_t* out, i64 out_stride) {
    uint64_t off[2];
    for (int rep = 0; rep < 2; rep++) {
        __m512i sum = _mm512_setzero_si512();  // k <= 65536: lanes stay below 2^64
        for (i64 j = 0; j < k; j += 8)
            sum = _mm512_add_epi64(sum, _mm512_maskz_loadu_epi64(k - j >= 8 ? 0xff : (__mmask8)((1u << (k - j)) - 1), u + rep * k + j));
        off[rep] = reduce((u128)reduce(sum_lanes(sum)) << 39);
    }
    // -2^39 < o < 2^39 iff 1 <= o + 2^39 < 2^40 without sign.
    __m512i all = _mm512_setzero_si512(), least = _mm512_set1_epi64(-1);
    i64 t = t0;
    for (; t + 4 <= t1; t += 4) rows_i64<4>(o + t * stride, stride, k, u, off, out + t * out_stride, out_stride, &all, &least);
    for (; t < t1; t++) rows_i64<1>(o + t * stride, stride, k, u, off, out + t * out_stride, out_stride, &all, &least);
    return _mm512_reduce_or_epi64(all) >> 40 == 0 && _mm512_reduce_min_epu64(least) >= 1;
}

// u += r @ w: r in byte limbs times four rows of w at a time, 32-bit sums folded into u at the end of the chunk.
void project(const int8_t* w, i64 n, i64 k, const uint64_t* r, i64 reps, i64 k0, i64 k1, uint64_t* u) {
    const i64 ROWS_IN = 128, WIDE = 256, MOST = 65536;  // MOST * 255 * 128 < 2^31
    const i64 channels = reps * LIMBS, padded = (channels + 13) / 14 * 14;
    for (i64 n0 = 0; n0 < n; n0 += MOST) {
        const i64 rows = min64(MOST, n - n0), quads = (rows + 3) / 4;
        // Limbs of four rows side by side: [row / 4][channel].
        uint8_t* limbs = (uint8_t*)scratch(S_FIELD, (size_t)(quads * padded * 4));
        memset(limbs, 0, (size_t)(quads * padded * 4));
        for (i64 rep = 0; rep < reps; rep++)
            for (i64 j = 0; j < rows; j++) {
                const uint64_t x = r[rep * n + n0 + j];
                VA_UNROLL
                for (int e = 0; e < LIMBS; e++)
                    limbs[((j / 4) * padded + rep * LIMBS + e) * 4 + j % 4] = (uint8_t)(x >> (8 * e));
            }
        uint8_t* woven = (uint8_t*)scratch(S_GEMM, (size_t)(ROWS_IN * WIDE));
        int32_t* sums = (int32_t*)scratch(S_ROW2, sizeof(int32_t) * (size_t)(padded * WIDE));
        for (i64 c0 = k0; c0 < k1; c0 += WIDE) {
            const i64 cols = min64(WIDE, k1 - c0), groups = (cols + 31) / 32 * 2;
            memset(sums, 0, sizeof(int32_t) * (size_t)(padded * WIDE));
            for (i64 j0 = 0; j0 < rows; j0 += ROWS_IN) {
                const i64 count = min64(ROWS_IN, rows - j0), q = (count + 3) / 4;
                // woven[row / 4][column][row % 4]
                for (i64 x = 0; x < q; x++)
                    for (i64 g = 0; g < groups; g++) {
                        const i64 at = g * 16, left = cols - at;
                        const __mmask16 live = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
                        __m128i v[4];
                        VA_UNROLL
                        for (int e = 0; e < 4; e++) {
                            const bool there = x * 4 + e < count;
                            // Rows lie far apart: fetch those of some steps later.
                            if (g % 4 == 0) prefetch(w + (n0 + j0 + x * 4 + e) * k + c0 + at, 24 * k);
                            v[e] = _mm_maskz_loadu_epi8(there ? live : 0, w + (there ? (n0 + j0 + x * 4 + e) * k + c0 + at : 0));
                        }
                        const __m128i a0 = _mm_unpacklo_epi8(v[0], v[1]), a1 = _mm_unpackhi_epi8(v[0], v[1]),
                                      b0 = _mm_unpacklo_epi8(v[2], v[3]), b1 = _mm_unpackhi_epi8(v[2], v[3]);
                        __m128i* to = (__m128i*)(woven + (x * WIDE + at) * 4);
                        _mm_store_si128(to, _mm_unpacklo_epi16(a0, b0));
                        _mm_store_si128(to + 1, _mm_unpackhi_epi16(a0, b0));
                        _mm_store_si128(to + 2, _mm_unpacklo_epi16(a1, b1));
                        _mm_store_si128(to + 3, _mm_unpackhi_epi16(a1, b1));
                    }
                for (i64 ch = 0; ch < padded; ch += 14)
                    for (i64 g = 0; g < groups; g += 2) {
                        __m512i acc[14][2];
                        VA_UNROLL
                        for (int e = 0; e < 14; e++)
                            VA_UNROLL
                            for (int b = 0; b < 2; b++) acc[e][b] = _mm512_load_si512(sums + (ch + e) * WIDE + (g + b) * 16);
                        const uint8_t* l = limbs + (j0 / 4 * padded + ch) * 4;
                        for (i64 x = 0; x < q; x++, l += padded * 4) {
                            const __m512i w0 = _mm512_load_si512(woven + (x * WIDE + g * 16) * 4),
                                          w1 = _mm512_load_si512(woven + (x * WIDE + g * 16 + 16) * 4);
                            VA_UNROLL
                            for (int e = 0; e < 14; e++) {
                                int32_t four;
                                memcpy(&four, l + e * 4, 4);
                                const __m512i b = _mm512_set1_epi32(four);
                                acc[e][0] = dp_bytes(acc[e][0], b, w0);
                                acc[e][1] = dp_bytes(acc[e][1], b, w1);
                            }
                        }
                        VA_UNROLL
                        for (int e = 0; e < 14; e++)
                            VA_UNROLL
                            for (int b = 0; b < 2; b++) _mm512_store_si512(sums + (ch + e) * WIDE + (g + b) * 16, acc[e][b]);
                    }
            }
            for (i64 rep = 0; rep < reps; rep++) {
                const int32_t* s = sums + rep * LIMBS * WIDE;
                uint64_t* to = u + rep * k + c0;
                const int64_t mask = ((int64_t)1 << 50) - 1;
                for (i64 c = 0; c < cols; c++) {
                    // low < 2^56; high * 2^32 with 2^50 = 27: everything stays in 64 bits.
                    const int64_t low = s[c] + (int64_t)s[WIDE + c] * 256 + (int64_t)s[2 * WIDE + c] * 65536 +
                                        (int64_t)s[3 * WIDE + c] * 16777216;
                    const int64_t high = s[4 * WIDE + c] + (int64_t)s[5 * WIDE + c] * 256 + (int64_t)s[6 * WIDE + c] * 65536;
                    int64_t x = low + (high >> 18) * 27 + ((high & 0x3ffff) << 32) + (int64_t)to[c];
                    x = (x & mask) + (x >> 50) * 27;
                    x += x < 0 ? (int64_t)P : 0;
                    x -= x >= (int64_t)P ? (int64_t)P : 0;
                    to[c] = (uint64_t)x;
                }
            }
        }
    }
}

}  // namespace avx512
}  // namespace va
