// Transferred scores and softmax apart with AVX-512: lanes are keys.
#include <string.h>

#include "avx512.h"

namespace va {
namespace avx512 {
namespace {

const i64 AHEAD = 1024;  // bytes
const i64 FOLD = 8192;   // keys between folds: 52-bit sums stay far below 2^64

// R heads of one query against the keys it sees: challenge sums, t, maximum; then P, L and P.g. Each score is loaded
// once; challenges and projections are shared by the heads of a group.
template <int R>
void transfer_rows(const TransferArgs& s, i64 kv, i64 i, i64 head, const uint64_t* c, const uint64_t* r_sum, float* t,
                   i64 t_stride, const Table& table) {
    const i64 d = s.d, n = s.start + i + 1, keys = s.start + s.tokens, pages = (n + PAGE - 1) / PAGE;
    const __m512i flip = _mm512_set1_epi32((int)0x80000000), ones = _mm512_set1_epi16(1);
    const int32_t* claimed[R];
    uint64_t total[R][2] = {};
    __m512 best[R];
    VA_UNROLL
    for (int x = 0; x < R; x++) {
        claimed[x] = s.scores + ((head + x) * s.tokens + i) * keys;
        best[x] = _mm512_set1_ps(-__builtin_inff());
    }
    for (i64 j0 = 0; j0 < n; j0 += FOLD) {
        const i64 j1 = min64(n, j0 + FOLD);
        __m512i lo[R][2], hi[R][2];
        VA_UNROLL
        for (int x = 0; x < R; x++) lo[x][0] = lo[x][1] = hi[x][0] = hi[x][1] = _mm512_setzero_si512();
        for (i64 j = j0; j < j1; j += 16) {
            const i64 left = j1 - j;
            const __mmask16 live = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            const __m512 scale = _mm512_loadu_ps(s.k_scale + ((i64)s.table[j / PAGE] * s.kv_heads + kv) * PAGE + j % PAGE);
            __m512i r[2][2];
            VA_UNROLL
            for (int rep = 0; rep < 2; rep++)
                VA_UNROLL
                for (int half = 0; half < 2; half++) {
                    const uint64_t* at = s.r + rep * s.r_stride + j + 8 * half;
                    r[rep][half] = _mm512_maskz_loadu_epi64((__mmask8)(live >> (8 * half)), at);
                    prefetch(at, AHEAD);
                }
            VA_UNROLL
            for (int x = 0; x < R; x++) {
                prefetch(claimed[x] + j, AHEAD);
                const __m512i score = left >= 16 ? load_once(claimed[x] + j) : load_once(claimed[x] + j, live);
                const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(score), scale);
                _mm512_storeu_ps(t + x * t_stride + j, value);
                best[x] = _mm512_mask_max_ps(best[x], live, best[x], value);
                // Unsigned by adding 2^31; that much of the sum of r is taken off at the end.
                const __m512i y = _mm512_xor_si512(score, flip);
                const __m512i part[2] = {_mm512_cvtepu32_epi64(_mm512_castsi512_si256(y)),
                                         _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(y, 1))};
                VA_UNROLL
                for (int half = 0; half < 2; half++)
                    VA_UNROLL
                    for (int rep = 0; rep < 2; rep++) {
                        lo[x][rep] = madd_lo(lo[x][rep], part[half], r[rep][half]);
                        hi[x][rep] = madd_hi(hi[x][rep], part[half], r[rep][half]);
                    }
            }
        }
        VA_UNROLL
        for (int x = 0; x < R; x++)
            for (int rep = 0; rep < 2; rep++) total[x][rep] += sum_pair(lo[x][rep], hi[x][rep]);
    }
    __m512 m[R], q_scale[R];
    __m512i sum[R], lo[R][2], hi[R][2];
    VA_UNROLL
    for (int x = 0; x < R; x++) {
        const i64 row = i * s.heads + head + x;
        uint64_t qc[2];
        dot_i8(s.q + row * d, d, d, c, 0, 1, qc, 2);
        bool ok = true;
        for (int rep = 0; rep < 2; rep++)
            ok &= sub_mod(reduce(total[x][rep]), reduce((u128)r_sum[rep] << 31)) == qc[rep];
        s.ok[row] = ok;
        total[x][0] = total[x][1] = 0;
        m[x] = _mm512_set1_ps(_mm512_reduce_max_ps(best[x]));
        q_scale[x] = _mm512_set1_ps(s.q_scale[row]);
        sum[x] = lo[x][0] = lo[x][1] = hi[x][0] = hi[x][1] = _mm512_setzero_si512();
    }
    // g holds both repetitions of a key side by side: each weight meets two lanes.
    const __m512i spread = _mm512_set_epi32(0, 3, 0, 3, 0, 2, 0, 2, 0, 1, 0, 1, 0, 0, 0, 0);
    for (i64 page = 0; page < pages; page++) {
        const uint64_t* g = s.g_pages + ((i64)s.table[page] * s.kv_heads + kv) * PAGE * 2;
        const uint64_t* next = page + 1 < pages ? s.g_pages + ((i64)s.table[page + 1] * s.kv_heads + kv) * PAGE * 2 : g;
        const i64 base = page * PAGE, count = min64(PAGE, n - base);
        for (i64 j = 0; j < count; j += 32) {
            const i64 left = count - j;
            __m512i w[R];
            VA_UNROLL
            for (int x = 0; x < R; x++) {
                const float* at = t + x * t_stride + base + j;
                w[x] = weights(_mm512_mul_ps(_mm512_sub_ps(m[x], _mm512_loadu_ps(at)), q_scale[x]),
                               _mm512_mul_ps(_mm512_sub_ps(m[x], _mm512_loadu_ps(at + 16)), q_scale[x]), table);
                if (left < 32) {
                    const uint32_t live = (1u << left) - 1;
                    w[x] = _mm512_and_si512(
                        w[x], _mm512_or_si512(_mm512_maskz_set1_epi32((__mmask16)live, 0xffff),
                                              _mm512_maskz_set1_epi32((__mmask16)(live >> 16), (int)0xffff0000)));
                }
                sum[x] = dp_words(sum[x], w[x], ones);
            }
            VA_UNROLL
            for (int half = 0; half < 2; half++)
                VA_UNROLL
                for (int e = 0; e < 4; e++) {
                    const __m512i at = _mm512_add_epi32(spread, _mm512_set1_epi32(4 * e));
                    const __m512i gv = _mm512_loadu_si512(g + 2 * j + half * 32 + e * 8);
                    prefetch(next + 2 * j + half * 32 + e * 8, 0);
                    VA_UNROLL
                    for (int x = 0; x < R; x++) {
                        const __m512i p = half ? _mm512_srli_epi32(w[x], 16) : _mm512_and_si512(w[x], _mm512_set1_epi32(0xffff));
                        const __m512i two = _mm512_maskz_permutexvar_epi32(0x5555, at, p);
                        lo[x][e % 2] = madd_lo(lo[x][e % 2], two, gv);
                        hi[x][e % 2] = madd_hi(hi[x][e % 2], two, gv);
                    }
                }
        }
        // 32 sums of 52 bits per lane and page: folded well before 2^64.
        if (page % 32 == 31 || page + 1 == pages) {
            VA_UNROLL
            for (int x = 0; x < R; x++) {
                const __m512i l = _mm512_add_epi64(fold(lo[x][0]), fold(lo[x][1])), h = _mm512_add_epi64(hi[x][0], hi[x][1]);
                for (int rep = 0; rep < 2; rep++) {
                    const __mmask8 lanes = rep ? 0xaa : 0x55;
                    total[x][rep] = reduce((u128)total[x][rep] + sum_pair(_mm512_maskz_mov_epi64(lanes, l), _mm512_maskz_mov_epi64(lanes, h)));
                }
                lo[x][0] = lo[x][1] = hi[x][0] = hi[x][1] = _mm512_setzero_si512();
            }
        }
    }
    VA_UNROLL
    for (int x = 0; x < R; x++) {
        const i64 row = i * s.heads + head + x;
        s.l[row] = _mm512_reduce_add_epi32(sum[x]);
        for (int rep = 0; rep < 2; rep++) s.pg[row * 2 + rep] = total[x][rep];
    }
}

}  // namespace

void transfer(const TransferArgs& s, i64 kv) {
    const i64 d = s.d, group = s.heads / s.kv_heads, keys = s.start + s.tokens, t_stride = (keys + 63) / 16 * 16;
    uint64_t* c = (uint64_t*)scratch(S_ROW, sizeof(uint64_t) * (size_t)(2 * d));
    float* t = (float*)scratch(S_T, sizeof(float) * (size_t)(4 * t_stride));
    const Table table;
    uint64_t r_sum[2];
    memcpy(c, s.c + kv * 2 * d, sizeof(uint64_t) * (size_t)(2 * d));
    for (int rep = 0; rep < 2; rep++) {
        u128 sum = 0;
        for (i64 j = 0; j < s.start; j += 1024) {
            uint64_t part = 0;  // 1024 * 2^50 < 2^64
            for (i64 e = min64(s.start, j + 1024), x = j; x < e; x++) part += s.r[rep * s.r_stride + x];
            sum += part;
        }
        r_sum[rep] = reduce(sum);
    }
    for (i64 i = 0; i < s.tokens; i++) {
        const int8_t* k = s.k + (i * s.kv_heads + kv) * d;
        for (int rep = 0; rep < 2; rep++) {
            const int64_t r = (int64_t)s.r[rep * s.r_stride + s.start + i];
            r_sum[rep] = add_mod(r_sum[rep], (uint64_t)r);
            for (i64 x = 0; x < d; x++) c[rep * d + x] = reduce_signed((i128)r * k[x] + (i128)c[rep * d + x]);
        }
        i64 h = kv * group;
        for (; h + 4 <= (kv + 1) * group; h += 4) transfer_rows<4>(s, kv, i, h, c, r_sum, t, t_stride, table);
        switch ((kv + 1) * group - h) {
            case 3: transfer_rows<3>(s, kv, i, h, c, r_sum, t, t_stride, table); break;
            case 2: transfer_rows<2>(s, kv, i, h, c, r_sum, t, t_stride, table); break;
            case 1: transfer_rows<1>(s, kv, i, h, c, r_sum, t, t_stride, table); break;
            default: break;
        }
    }
}

// --- softmax and products apart --------------------------------------------------------------------------------------

void attention_weights(const WeightsArgs& s, i64 head, i64 i0, i64 i1) {
    const i64 kv = head / (s.heads / s.kv_heads);
    float* t = (float*)scratch(S_T, sizeof(float) * (size_t)(s.keys + 64));
    const Table table;
    for (i64 i = i0; i < i1; i++) {
        const i64 n = min64(s.start + i + 1, s.keys);
        const int32_t* row = s.scores + (head * s.tokens + i) * s.keys;
        uint16_t* out = s.p + (head * s.tokens + i) * s.keys;
        __m512 best = _mm512_set1_ps(-__builtin_inff());
        for (i64 j = 0; j < n; j += 16) {
            const __mmask16 live = n - j >= 16 ? 0xffff : (__mmask16)((1u << (n - j)) - 1);
            const float* scale = s.k_scale + ((i64)s.table[j / PAGE] * s.kv_heads + kv) * PAGE + j % PAGE;
            const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(live, row + j)), _mm512_loadu_ps(scale));
            _mm512_storeu_ps(t + j, value);
            best = _mm512_mask_max_ps(best, live, best, value);
        }
        const __m512 m = _mm512_set1_ps(_mm512_reduce_max_ps(best)), q_scale = _mm512_set1_ps(s.q_scale[i * s.heads + head]);
        for (i64 j = 0; j < s.keys; j += 32) {
            const i64 seen = n - j, there = s.keys - j;
            const __mmask32 live = seen >= 32 ? ~0u : seen > 0 ? (1u << seen) - 1 : 0, room = there >= 32 ? ~0u : (1u << there) - 1;
            __m512i p = _mm512_setzero_si512();
            if (live) {
                const __m512i w = weights(_mm512_mul_ps(_mm512_sub_ps(m, _mm512_loadu_ps(t + j)), q_scale),
                                          _mm512_mul_ps(_mm512_sub_ps(m, _mm512_loadu_ps(t + j + 16)), q_scale), table);
                p = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(w)),
                                       _mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)), 1);
            }
            _mm512_mask_storeu_epi16(out + j, room, _mm512_maskz_mov_epi16(live, p));
        }
    }
}

}  // namespace avx512
}  // namespace va
