// Attention with VNNI over tiles of up to 32 query rows (query, head of one group): lanes are rows.
//
// Keys are broadcast four dimensions at a time against packed queries, so keys and values are read as the cache holds
// them and nothing is transposed; row maximum, table, row sum and products stay in their lanes. Two passes: the first
// finds the row maximum and leaves t = float(score) * k_scale in the core's own cache (or, for very long contexts, the
// second pass computes it again); the second makes P and uses it.
//
// P.g: g is split into five signed digits of 10 bits, so that 16-bit multiply-adds sum a page exactly in 32 bits:
// 256 * 16336 * 512 < 2^31. P.V: values as 16-bit pairs, 256 * 16336 * 128 < 2^31.
#include <string.h>

#include "avx512.h"

namespace va {
namespace avx512 {
namespace {

const int DIGITS = 5;
const i64 T_BYTES = 1024 * 1024;  // the most that t may take before it is computed twice instead

inline bool by_hand(i64 d) { return d % 4 == 0 && d <= 1024; }

struct Prepared {
    uint8_t* keys;    // [keys][d] key + 128
    int32_t* digits;  // per page [rep][digit][PAGE / 2] pairs of 16-bit digits of g
    int32_t* pairs;   // [keys / 2][d] pairs of 16-bit values
};

i64 used_pages(const AttentionArgs& s) { return (s.start + s.tokens + PAGE - 1) / PAGE; }

Prepared prepared_of(const AttentionArgs& s, i64 kv) {
    const i64 keys = used_pages(s) * PAGE;
    char* base = (char*)s.prepared + (size_t)kv * prepare_bytes(s);
    Prepared p;
    p.keys = (uint8_t*)base;
    p.digits = (int32_t*)(base + keys * s.d);
    p.pairs = p.digits + (s.g_pages ? keys * DIGITS : 0);
    return p;
}

template <int RV>
struct Tile {
    alignas(64) int32_t q[256 * 16 * RV];  // [d / 4][row] four bytes of q
    alignas(64) int32_t offset[16 * RV];   // -128 * sum of q
    alignas(64) int32_t p[PAGE / 2 * 16 * RV];
    alignas(64) float q_scale[16 * RV];
    alignas(64) float row_max[16 * RV];
    alignas(64) int32_t limit[16 * RV];  // last visible key
    alignas(64) int64_t pg[2 * DIGITS * 16 * RV];
};

// t[key][row] for `count` keys of a page (rounded up to a multiple of 8), and the maximum over visible ones.
template <int RV>
void scores(const uint8_t* k, const float* k_scale, const int32_t* q, const int32_t* offset, i64 d, i64 count, i64 base,
            const int32_t* limit, bool all_visible, float* t, __m512* best) {
    constexpr int KB = RV == 1 ? 16 : 8;
    for (i64 j = 0; j < count; j += KB) {
        __m512i acc[KB][RV];
        VA_UNROLL
        for (int x = 0; x < KB; x++)
            VA_UNROLL
            for (int v = 0; v < RV; v++) acc[x][v] = _mm512_load_si512(offset + v * 16);
        const uint8_t* row = k + j * d;
        for (i64 c = 0; c < d / 4; c++) {
            __m512i qv[RV];
            VA_UNROLL
            for (int v = 0; v < RV; v++) qv[v] = _mm512_load_si512(q + (c * RV + v) * 16);
            VA_UNROLL
            for (int x = 0; x < KB; x++) {
                int32_t four;
                memcpy(&four, row + x * d + c * 4, 4);
                const __m512i kv = _mm512_set1_epi32(four);
                VA_UNROLL
                for (int v = 0; v < RV; v++) acc[x][v] = dp_bytes(acc[x][v], kv, qv[v]);
            }
        }
        VA_UNROLL
        for (int x = 0; x < KB; x++) {
            const __m512 scale = _mm512_set1_ps(k_scale[j + x]);
            VA_UNROLL
            for (int v = 0; v < RV; v++) {
                const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[x][v]), scale);
                _mm512_store_ps(t + ((j + x) * RV + v) * 16, value);
                if (all_visible) {
                    best[v] = _mm512_max_ps(best[v], value);
                } else {
                    const __mmask16 sees = _mm512_cmpge_epi32_mask(_mm512_load_si512(limit + v * 16),
                                                                   _mm512_set1_epi32((int)(base + j + x)));
                    best[v] = _mm512_mask_max_ps(best[v], sees, best[v], value);
                }
            }
        }
    }
}

// The second half of scores() where the integers come from elsewhere: in place.
template <int RV>
void finish(const float* k_scale, i64 count, i64 base, const int32_t* limit, bool all_visible, float* t, __m512* best) {
    for (i64 j = 0; j < (count + 1) / 2 * 2; j++) {
        const __m512 scale = _mm512_set1_ps(k_scale[j]);
        VA_UNROLL
        for (int v = 0; v < RV; v++) {
            float* at = t + (j * RV + v) * 16;
            const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), scale);
            _mm512_store_ps(at, value);
            const __mmask16 sees = all_visible ? 0xffff
                                               : _mm512_cmpge_epi32_mask(_mm512_load_si512(limit + v * 16),
                                                                         _mm512_set1_epi32((int)(base + j)));
            best[v] = _mm512_mask_max_ps(best[v], sees, best[v], value);
        }
    }
}

// P of a page into p[pair][row]; returns row sums added to `sum`.
template <int RV>
void weigh(const float* t, i64 pairs, i64 base, const int32_t* limit, bool all_visible, const __m512* m,
           const __m512* q_scale, const Table& table, int32_t* p, __m512i* sum) {
    const __m512i ones = _mm512_set1_epi16(1);
    for (i64 j = 0; j < pairs; j++) {
        VA_UNROLL
        for (int v = 0; v < RV; v++) {
            const __m512 t0 = _mm512_load_ps(t + (2 * j * RV + v) * 16), t1 = _mm512_load_ps(t + ((2 * j + 1) * RV + v) * 16);
            __m512i w = weights(_mm512_mul_ps(_mm512_sub_ps(m[v], t0), q_scale[v]),
                                _mm512_mul_ps(_mm512_sub_ps(m[v], t1), q_scale[v]), table);
            if (!all_visible) {
                const __m512i last = _mm512_load_si512(limit + v * 16);
                const int key = (int)(base + 2 * j);
                const __mmask16 s0 = _mm512_cmpge_epi32_mask(last, _mm512_set1_epi32(key)),
                                s1 = _mm512_cmpge_epi32_mask(last, _mm512_set1_epi32(key + 1));
                w = _mm512_and_si512(w, _mm512_or_si512(_mm512_maskz_set1_epi32(s0, 0xffff),
                                                        _mm512_maskz_set1_epi32(s1, (int)0xffff0000)));
            }
            sum[v] = dp_words(sum[v], w, ones);
            _mm512_store_si512(p + (j * RV + v) * 16, w);
        }
    }
}

inline void add_wide(int64_t* at, __m512i sums) {
    const __m512i lo = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sums)),
                  hi = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sums, 1));
    _mm512_store_si512(at, _mm512_add_epi64(_mm512_load_si512(at), lo));
    _mm512_store_si512(at + 8, _mm512_add_epi64(_mm512_load_si512(at + 8), hi));
}

// out[x][row] += sum over pairs of p * w, for N columns; w[pair * stride + column * step].
template <int RV, int N>
void columns(const int32_t* p, i64 pairs, const int32_t* w, i64 stride, i64 step, int64_t* out) {
    __m512i acc[N][RV];
    VA_UNROLL
    for (int x = 0; x < N; x++)
        VA_UNROLL
        for (int v = 0; v < RV; v++) acc[x][v] = _mm512_setzero_si512();
    for (i64 j = 0; j < pairs; j++) {
        __m512i pv[RV];
        VA_UNROLL
        for (int v = 0; v < RV; v++) pv[v] = _mm512_load_si512(p + (j * RV + v) * 16);
        VA_UNROLL
        for (int x = 0; x < N; x++) {
            const __m512i b = _mm512_set1_epi32(w[j * stride + x * step]);
            VA_UNROLL
            for (int v = 0; v < RV; v++) acc[x][v] = dp_words(acc[x][v], pv[v], b);
        }
    }
    VA_UNROLL
    for (int x = 0; x < N; x++)
        VA_UNROLL
        for (int v = 0; v < RV; v++) add_wide(out + (x * RV + v) * 16, acc[x][v]);
}

// The same for 4 rows by 64 columns with columns as lanes: where rows are few, lanes of rows would be idle.
void four_rows(const int32_t* p, i64 pairs, const int32_t* w, i64 stride, int64_t* out) {
    __m512i acc[4][4];
    VA_UNROLL
    for (int r = 0; r < 4; r++)
        VA_UNROLL
        for (int x = 0; x < 4; x++) acc[r][x] = _mm512_setzero_si512();
    for (i64 j = 0; j < pairs; j++) {
        __m512i v[4];
        VA_UNROLL
        for (int x = 0; x < 4; x++) v[x] = _mm512_loadu_si512(w + j * stride + x * 16);
        VA_UNROLL
        for (int r = 0; r < 4; r++) {
            const __m512i b = _mm512_set1_epi32(p[j * 16 + r]);
            VA_UNROLL
            for (int x = 0; x < 4; x++) acc[r][x] = dp_words(acc[r][x], v[x], b);
        }
    }
    alignas(64) int32_t sums[64];
    for (int r = 0; r < 4; r++) {
        VA_UNROLL
        for (int x = 0; x < 4; x++) _mm512_store_si512(sums + x * 16, acc[r][x]);
        for (int x = 0; x < 64; x++) out[x * 16 + r] += sums[x];
    }
}

void split_digits(const uint64_t* g, int32_t* out);

// One page as the kernels want it; null outputs are skipped.
void prepare_page(const AttentionArgs& s, i64 kv, i64 page, uint8_t* keys, int32_t* digits, int32_t* pairs) {
    const i64 d = s.d, at = ((i64)s.table[page] * s.kv_heads + kv) * PAGE;
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    if (keys)
        for (i64 c = 0; c < PAGE * d; c += 64)
            _mm512_storeu_si512(keys + c, _mm512_xor_si512(flip, _mm512_loadu_si512(s.k_pages + at * d + c)));
    if (digits) split_digits(s.g_pages + at * 2, digits);
    if (pairs)
        for (i64 j = 0; j < PAGE; j += 2) {
            const int8_t *v0 = s.v_pages + (at + j) * d, *v1 = v0 + d;
            int32_t* out = pairs + j / 2 * d;
            for (i64 c = 0; c < d; c += 16) {
                const __mmask16 live = d - c >= 16 ? 0xffff : (__mmask16)((1u << (d - c)) - 1);
                const __m512i x0 = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(live, v0 + c)),
                              x1 = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(live, v1 + c));
                _mm512_mask_storeu_epi32(out + c, live, _mm512_mask_blend_epi16(0xaaaaaaaa, x0, _mm512_slli_epi32(x1, 16)));
            }
        }
}

template <int RV>
void tile(const AttentionArgs& s, i64 kv, i64 i0, i64 first, i64 count, PageScores page_scores) {
    // Rows first .. first + count of the tile that starts at query i0; lanes beyond repeat the first row.
    const i64 d = s.d, group = s.heads / s.kv_heads;
    // Where one tile is all there is (decode), pages are prepared as they come and stay in the core's own cache.
    const bool ahead = s.prepared != nullptr;
    Prepared prep;
    if (ahead) {
        prep = prepared_of(s, kv);
    } else {
        prep.keys = (uint8_t*)scratch(S_GEMM, (size_t)(PAGE * (d + 4 * DIGITS + 2 * d)));
        prep.digits = (int32_t*)(prep.keys + PAGE * d);
        prep.pairs = prep.digits + PAGE * DIGITS;
    }
    Tile<RV>& w = *(Tile<RV>*)scratch(S_ROW2, sizeof(Tile<RV>));
    int64_t* o = (int64_t*)scratch(S_ROW, sizeof(int64_t) * (size_t)(d * 16 * RV));
    i64 row_of[16 * RV], most = 0, least = 0;
    for (i64 r = 0; r < 16 * RV; r++) {
        const i64 x = first + (r < count ? r : 0), i = i0 + x / group, row = i * s.heads + kv * group + x % group;
        row_of[r] = row;
        const i64 limit = s.start + i;
        w.limit[r] = (int32_t)limit;
        most = r == 0 || limit > most ? limit : most;
        least = r == 0 || limit < least ? limit : least;
        w.q_scale[r] = s.q_scale[row];
        for (i64 c = 0; c < d / 4; c++) {
            uint32_t four;
            memcpy(&four, s.q + row * d + c * 4, 4);
            w.q[c * 16 * RV + r] = (int32_t)four;
        }
        int32_t q_sum = 0;
        for (i64 c = 0; c < d; c++) q_sum += s.q[row * d + c];
        w.offset[r] = -128 * q_sum;
    }
    const i64 n = most + 1, pages = (n + PAGE - 1) / PAGE, page_floats = PAGE * 16 * RV;
    // With a given maximum or the maximum alone there is one pass only.
    const bool keep = !s.row_max && !s.own_max && pages * page_floats * (i64)sizeof(float) <= T_BYTES;
    float* t = (float*)scratch(S_T, sizeof(float) * (size_t)((keep ? pages : 1) * page_floats));
    __m512 m[RV], ignored[RV], q_scale[RV];
    __m512i sum[RV];
    VA_UNROLL
    for (int v = 0; v < RV; v++) {
        m[v] = ignored[v] = _mm512_set1_ps(-__builtin_inff());
        q_scale[v] = _mm512_load_ps(w.q_scale + v * 16);
        sum[v] = _mm512_setzero_si512();
    }
    const Table table;
    auto score_page = [&](i64 page, __m512* best) {
        const i64 base = page * PAGE, at = ((i64)s.table[page] * s.kv_heads + kv) * PAGE;
        if (page_scores) {
            float* to = t + (keep ? page * page_floats : 0);
            page_scores(s.k_pages + at * d, w.q, d, RV, min64(PAGE, n - base), (int32_t*)to);
            finish<RV>(s.k_scale + at, min64(PAGE, n - base), base, w.limit, base + PAGE - 1 <= least, to, best);
            return;
        }
        if (!ahead) prepare_page(s, kv, page, prep.keys, nullptr, nullptr);
        scores<RV>(prep.keys + (ahead ? base * d : 0), s.k_scale + at, w.q, w.offset, d, min64(PAGE, n - base), base, w.limit,
                   base + PAGE - 1 <= least, t + (keep ? page * page_floats : 0), best);
    };
    if (s.row_max) {
        for (i64 r = 0; r < 16 * RV; r++) w.row_max[r] = s.row_max[row_of[r]];
        VA_UNROLL
        for (int v = 0; v < RV; v++) m[v] = _mm512_load_ps(w.row_max + v * 16);
    } else {
        for (i64 page = 0; page < pages; page++) score_page(page, m);
    }
    if (s.own_max) {
        VA_UNROLL
        for (int v = 0; v < RV; v++) _mm512_store_ps(w.row_max + v * 16, m[v]);
        for (i64 r = 0; r < count; r++) s.own_max[row_of[r]] = w.row_max[r];
        return;
    }
    memset(w.pg, 0, sizeof w.pg);
    if (s.v_pages) memset(o, 0, sizeof(int64_t) * (size_t)(d * 16 * RV));
    for (i64 page = 0; page < pages; page++) {
        const i64 base = page * PAGE, pairs = (min64(PAGE, n - base) + 1) / 2;
        if (!keep) score_page(page, ignored);
        weigh<RV>(t + (keep ? page * page_floats : 0), pairs, base, w.limit, base + PAGE - 1 <= least, m, q_scale, table,
                  w.p, sum);
        if (!ahead) prepare_page(s, kv, page, nullptr, s.g_pages ? prep.digits : nullptr, s.v_pages ? prep.pairs : nullptr);
        if (s.g_pages) columns<RV, 2 * DIGITS>(w.p, pairs, prep.digits + (ahead ? base * DIGITS : 0), 1, PAGE / 2, w.pg);
        if (s.v_pages) {
            const int32_t* values = prep.pairs + (ahead ? base / 2 * d : 0);
            i64 c = 0;
            if (RV == 1)
                for (; c + 64 <= d; c += 64)
                    for (i64 r = 0; r < count; r += 4) four_rows(w.p + r, pairs, values + c, d, o + c * 16 + r);
            for (; c + 8 <= d; c += 8) columns<RV, 8>(w.p, pairs, values + c, d, 1, o + c * 16 * RV);
            for (; c < d; c += 4) columns<RV, 4>(w.p, pairs, values + c, d, 1, o + c * 16 * RV);
        }
    }
    alignas(64) int32_t sums[16 * RV];
    VA_UNROLL
    for (int v = 0; v < RV; v++) _mm512_store_si512(sums + v * 16, sum[v]);
    for (i64 r = 0; r < count; r++) {
        s.l[row_of[r]] = sums[r];
        if (s.g_pages) {
            VA_UNROLL
            for (int rep = 0; rep < 2; rep++) {
                i128 x = 0;
                VA_UNROLL
                for (int e = DIGITS - 1; e >= 0; e--) x = x * 1024 + w.pg[(rep * DIGITS + e) * 16 * RV + r];
                s.pg[row_of[r] * 2 + rep] = reduce_signed(x);
            }
        }
        if (s.v_pages)
            for (i64 c = 0; c < d; c++) s.o[row_of[r] * d + c] = o[c * 16 * RV + r];
    }
}

// g of a page to signed digits of 10 bits, low digit first: out[rep][digit][pair of keys].
void split_digits(const uint64_t* g, int32_t* out) {
    const int64_t half = 512;
    const __m512i bias = _mm512_set1_epi64(half + (half << 10) + (half << 20) + (half << 30));
    const __m512i p = _mm512_set1_epi64((int64_t)P), middle = _mm512_set1_epi64((int64_t)(P / 2));
    // Sixteen keys: even and odd keys of each repetition in a vector of their own.
    const __m512i pick0 = _mm512_set_epi64(13, 9, 5, 1, 12, 8, 4, 0), pick2 = _mm512_set_epi64(15, 11, 7, 3, 14, 10, 6, 2);
    for (i64 j = 0; j < PAGE; j += 16) {
        const __m512i z0 = _mm512_loadu_si512(g + 2 * j), z1 = _mm512_loadu_si512(g + 2 * j + 8),
                      z2 = _mm512_loadu_si512(g + 2 * j + 16), z3 = _mm512_loadu_si512(g + 2 * j + 24);
        // pick0: [even key rep 0 x 4][even key rep 1 x 4]; pick2: the odd keys.
        const __m512i e01 = _mm512_permutex2var_epi64(z0, pick0, z1), e23 = _mm512_permutex2var_epi64(z2, pick0, z3),
                      o01 = _mm512_permutex2var_epi64(z0, pick2, z1), o23 = _mm512_permutex2var_epi64(z2, pick2, z3);
        const __m512i even[2] = {_mm512_shuffle_i64x2(e01, e23, 0x44), _mm512_shuffle_i64x2(e01, e23, 0xee)},
                      odd[2] = {_mm512_shuffle_i64x2(o01, o23, 0x44), _mm512_shuffle_i64x2(o01, o23, 0xee)};
        for (int rep = 0; rep < 2; rep++) {
            __m512i h[2] = {even[rep], odd[rep]};
            for (int x = 0; x < 2; x++) {
                // Centred, |g| < 2^49, so that the top digit is as small as the others.
                h[x] = _mm512_mask_sub_epi64(h[x], _mm512_cmpgt_epi64_mask(h[x], middle), h[x], p);
                h[x] = _mm512_add_epi64(h[x], bias);
            }
            for (int e = 0; e < DIGITS; e++) {
                __m512i digit[2];
                for (int x = 0; x < 2; x++) {
                    digit[x] = h[x];
                    if (e < DIGITS - 1)
                        digit[x] = _mm512_sub_epi64(_mm512_and_si512(h[x], _mm512_set1_epi64(1023)), _mm512_set1_epi64(half));
                    h[x] = _mm512_srai_epi64(h[x], 10);
                }
                const __m512i pair = _mm512_mask_blend_epi16(0x22222222, digit[0], _mm512_slli_epi64(digit[1], 16));
                _mm256_storeu_si256((__m256i*)(out + (rep * DIGITS + e) * (PAGE / 2) + j / 2), _mm512_cvtepi64_epi32(pair));
            }
        }
    }
}

}  // namespace

size_t prepare_bytes(const AttentionArgs& s) {
    if (!by_hand(s.d) || s.tokens * (s.heads / s.kv_heads) <= 32) return 0;
    const size_t keys = (size_t)(used_pages(s) * PAGE);
    return keys * ((size_t)s.d + sizeof(int32_t) * (s.g_pages ? DIGITS : 0) + sizeof(int16_t) * (s.v_pages ? (size_t)s.d : 0));
}

void prepare(const AttentionArgs& s, i64 kv, i64 p0, i64 p1) {
    const Prepared prep = prepared_of(s, kv);
    for (i64 page = p0; page < p1; page++) {
        const i64 base = page * PAGE;
        prepare_page(s, kv, page, prep.keys + base * s.d, s.g_pages ? prep.digits + base * DIGITS : nullptr,
                     s.v_pages ? prep.pairs + base / 2 * s.d : nullptr);
    }
}

i64 tile_queries(const AttentionArgs& s) {
    if (!by_hand(s.d)) return avx2_kernels.tile_queries(s);
    const i64 group = s.heads / s.kv_heads;
    return group < 32 ? 32 / group : 1;
}

void attention_with(const AttentionArgs& s, i64 kv, i64 i0, i64 i1, PageScores page_scores) {
    if (!by_hand(s.d)) {
        avx2_kernels.attention(s, kv, i0, i1);
        return;
    }
    const i64 rows = (i1 - i0) * (s.heads / s.kv_heads);
    if (!s.prepared && few_rows(rows, s.d)) {
        attention_of_few(s, kv, i0, i1);
        return;
    }
    for (i64 first = 0; first < rows; first += 32) {
        const i64 count = min64(32, rows - first);
        if (count <= 16)
            tile<1>(s, kv, i0, first, count, page_scores);
        else
            tile<2>(s, kv, i0, first, count, page_scores);
    }
}

void attention(const AttentionArgs& s, i64 kv, i64 i0, i64 i1) { attention_with(s, kv, i0, i1, nullptr); }

}  // namespace avx512
}  // namespace va
