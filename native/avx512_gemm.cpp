// int8 products with VNNI: weights are the unsigned operand (w + 128, pack.cpp), so 128 * sum(a) is taken off again.
#include <string.h>

#include "avx512.h"

namespace va {
namespace avx512 {
namespace {

const i64 FEW = 16;  // rows of which one register of weights serves all at once
const i64 SHORT = 32768;  // bytes of a panel; longer ones keep four streams of their own, which is faster there

// R rows by NB panels of 16 outputs over `steps` groups of 4 inputs. `chains` splits the sum where few rows would leave
// the multiplier waiting for its own results.
template <int R, int NB>
void block(const uint8_t* w, i64 panel_bytes, const int8_t* a, i64 lda, i64 steps, int32_t* y, i64 ldy,
           const int32_t* init, const __mmask16* masks) {
    constexpr int CHAINS = R * NB <= 8 ? 2 : 1;
    __m512i acc[CHAINS][R][NB];
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int b = 0; b < NB; b++) {
            acc[0][r][b] = init ? _mm512_set1_epi32(init[r]) : _mm512_maskz_loadu_epi32(masks[b], y + r * ldy + b * 16);
            VA_UNROLL
            for (int c = 1; c < CHAINS; c++) acc[c][r][b] = _mm512_setzero_si512();
        }
    i64 s = 0;
    for (; s + CHAINS <= steps; s += CHAINS) {
        VA_UNROLL
        for (int c = 0; c < CHAINS; c++) {
            __m512i v[NB];
            VA_UNROLL
            for (int b = 0; b < NB; b++) {
                v[b] = _mm512_load_si512(w + b * panel_bytes + (s + c) * 64);
                if (R <= 6 && CHAINS > 1) _mm_prefetch((const char*)(w + b * panel_bytes + (s + c) * 64 + 2048), _MM_HINT_T0);
            }
            VA_UNROLL
            for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, a + r * lda + (s + c) * 4, 4);
                const __m512i x = _mm512_set1_epi32(four);
                VA_UNROLL
                for (int b = 0; b < NB; b++) acc[c][r][b] = dp_bytes(acc[c][r][b], v[b], x);
            }
        }
    }
    if (CHAINS > 1 && s < steps) {
        VA_UNROLL
        for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, a + r * lda + s * 4, 4);
            VA_UNROLL
            for (int b = 0; b < NB; b++)
                acc[0][r][b] = dp_bytes(acc[0][r][b], _mm512_load_si512(w + b * panel_bytes + s * 64),
                                                   _mm512_set1_epi32(four));
        }
    }
    VA_UNROLL
    for (int r = 0; r < R; r++)
        VA_UNROLL
        for (int b = 0; b < NB; b++) {
            __m512i sum = acc[0][r][b];
            VA_UNROLL
            for (int c = 1; c < CHAINS; c++) sum = _mm512_add_epi32(sum, acc[c][r][b]);
            _mm512_mask_storeu_epi32(y + r * ldy + b * 16, masks[b], sum);
        }
}

template <int NB>
void rows(i64 m, const uint8_t* w, i64 panel_bytes, const int8_t* a, i64 lda, i64 steps, int32_t* y, i64 ldy,
          const int32_t* init, const __mmask16* masks) {
    i64 r = 0;
    for (; r + 6 <= m; r += 6)
        block<6, NB>(w, panel_bytes, a + r * lda, lda, steps, y + r * ldy, ldy, init ? init + r : nullptr, masks);
    a += r * lda, y += r * ldy, init = init ? init + r : nullptr;
    switch (m - r) {
        case 1: block<1, NB>(w, panel_bytes, a, lda, steps, y, ldy, init, masks); break;
        case 2: block<2, NB>(w, panel_bytes, a, lda, steps, y, ldy, init, masks); break;
        case 3: block<3, NB>(w, panel_bytes, a, lda, steps, y, ldy, init, masks); break;
        case 4: block<4, NB>(w, panel_bytes, a, lda, steps, y, ldy, init, masks); break;
        case 5: block<5, NB>(w, panel_bytes, a, lda, steps, y, ldy, init, masks); break;
        default: break;
    }
}

// One panel of 16 outputs by R rows, in CHAINS sums. Panels lie one after the other, so a caller that goes from panel to
// panel reads its weights as one stream, which prefetching follows over the ends of panels.
template <int R, int CHAINS>
void panel(const uint8_t* w, const int8_t* a, i64 lda, i64 steps, int32_t* y, i64 ldy, const int32_t* init,
           __mmask16 mask) {
    __m512i acc[CHAINS][R];
    VA_UNROLL
    for (int r = 0; r < R; r++) {
        acc[0][r] = _mm512_set1_epi32(init[r]);
        VA_UNROLL
        for (int c = 1; c < CHAINS; c++) acc[c][r] = _mm512_setzero_si512();
    }
    i64 s = 0;
    for (; s + CHAINS <= steps; s += CHAINS) {
        VA_UNROLL
        for (int c = 0; c < CHAINS; c++) {
            const __m512i v = _mm512_load_si512(w + (s + c) * 64);
            prefetch(w + (s + c) * 64, 4096);
            VA_UNROLL
            for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, a + r * lda + (s + c) * 4, 4);
                acc[c][r] = dp_bytes(acc[c][r], v, _mm512_set1_epi32(four));
            }
        }
    }
    for (; s < steps; s++) {
        const __m512i v = _mm512_load_si512(w + s * 64);
        VA_UNROLL
        for (int r = 0; r < R; r++) {
            int32_t four;
            memcpy(&four, a + r * lda + s * 4, 4);
            acc[0][r] = dp_bytes(acc[0][r], v, _mm512_set1_epi32(four));
        }
    }
    VA_UNROLL
    for (int r = 0; r < R; r++) {
        VA_UNROLL
        for (int c = 1; c < CHAINS; c++) acc[0][r] = _mm512_add_epi32(acc[0][r], acc[c][r]);
        _mm512_mask_storeu_epi32(y + r * ldy, mask, acc[0][r]);
    }
}

template <int R, int CHAINS>
void panels(const uint8_t* w, i64 panel_bytes, const int8_t* a, i64 lda, i64 steps, i64 cols, int32_t* y, i64 ldy,
            const int32_t* init) {
    for (i64 j = 0; j < cols; j += 16, w += panel_bytes) {
        const __mmask16 mask = cols - j >= 16 ? 0xffff : (__mmask16)((1u << (cols - j)) - 1);
        panel<R, CHAINS>(w, a, lda, steps, y + j, ldy, init, mask);
    }
}

// panels<m, ...> for the m that is known only now.
template <int R>
void few(i64 m, const uint8_t* w, i64 panel_bytes, const int8_t* a, i64 lda, i64 steps, i64 cols, int32_t* y, i64 ldy,
         const int32_t* init) {
    if (m == R)
        panels<R, R == 1 ? 8 : R <= 4 ? 4 : R <= 8 ? 2 : 1>(w, panel_bytes, a, lda, steps, cols, y, ldy, init);
    else if constexpr (R > 1)
        few<R - 1>(m, w, panel_bytes, a, lda, steps, cols, y, ldy, init);
}

}  // namespace

void row_offsets(const int8_t* a, i64 lda, i64 k, i64 rows, int32_t* out) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (i64 r = 0; r < rows; r++) {
        __m512i s = _mm512_setzero_si512();
        i64 x = 0;
        for (; x + 64 <= k; x += 64) s = dp_bytes(s, ones, _mm512_loadu_si512(a + r * lda + x));
        if (x < k) s = dp_bytes(s, ones, _mm512_maskz_loadu_epi8(((__mmask64)1 << (k - x)) - 1, a + r * lda + x));
        out[r] = -128 * _mm512_reduce_add_epi32(s);
    }
}

void gemm(const uint8_t* packed, i64 n, i64 k, const int8_t* a, i64 m, i64 n0, i64 n1, int32_t* y) {
    const i64 kp = (k + 63) / 64 * 64, k4 = (k + 3) / 4 * 4, panel_bytes = 16 * kp;
    int32_t* init = (int32_t*)scratch(S_ROW, sizeof(int32_t) * (size_t)m);
    i64 lda = k;
    if (k4 != k) {
        // The kernel reads inputs by fours: rows get a tail of zeros, which adds nothing.
        int8_t* padded = (int8_t*)scratch(S_GEMM, (size_t)(m * k4));
        for (i64 r = 0; r < m; r++) {
            memcpy(padded + r * k4, a + r * k, (size_t)k);
            memset(padded + r * k4 + k, 0, (size_t)(k4 - k));
        }
        a = padded;
        lda = k4;
    }
    row_offsets(a, lda, k4, m, init);
    if (m <= FEW && panel_bytes <= SHORT) {
        // What memory delivers is the limit.
        const uint8_t* w = packed + n0 / 16 * panel_bytes;
        few<FEW>(m, w, panel_bytes, a, lda, k4 / 4, n1 - n0, y + n0, n, init);
        return;
    }
    // With many rows, a slice of 64 outputs by 1024 inputs (64 KiB) stays close while all rows pass it.
    const i64 slice = m > 12 ? 1024 : k4;
    for (i64 j = n0; j < n1; j += 64) {
        const uint8_t* w = packed + j / 16 * panel_bytes;
        const i64 cols = min64(64, n1 - j);
        __mmask16 masks[4];
        VA_UNROLL
        for (int b = 0; b < 4; b++) {
            i64 c = cols - 16 * b;
            masks[b] = c >= 16 ? 0xffff : c > 0 ? (__mmask16)((1u << c) - 1) : 0;
        }
        for (i64 x = 0; x < k4; x += slice) {
            const i64 steps = min64(slice, k4 - x) / 4;
            const int32_t* first = x == 0 ? init : nullptr;
            const uint8_t* at = w + x * 16;
            switch ((cols + 15) / 16) {
                case 1: rows<1>(m, at, panel_bytes, a + x, lda, steps, y + j, n, first, masks); break;
                case 2: rows<2>(m, at, panel_bytes, a + x, lda, steps, y + j, n, first, masks); break;
                case 3: rows<3>(m, at, panel_bytes, a + x, lda, steps, y + j, n, first, masks); break;
                default: rows<4>(m, at, panel_bytes, a + x, lda, steps, y + j, n, first, masks); break;
            }
        }
        if (k4 == 0)
            for (i64 r = 0; r < m; r++) memset(y + r * n + j, 0, sizeof(int32_t) * (size_t)cols);
    }
}

i64 peak(i64 rounds) {
    __m512i acc[16];
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    VA_UNROLL
    for (int x = 0; x < 16; x++) acc[x] = a;
    for (i64 r = 0; r < rounds; r++) {
        VA_UNROLL
        for (int x = 0; x < 16; x++) asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc[x]) : "v"(a), "v"(b));
    }
    return rounds * 16 * 64;
}

}  // namespace avx512
}  // namespace va
