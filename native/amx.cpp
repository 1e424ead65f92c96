// int8 products on AMX tiles: gemm() of many rows and the scores of attention. Everything else is the AVX-512 code.
//
// Not measured yet: written without access to such a machine, and tested against the portable kernels with the tiles
// emulated (VERIATTN_EMULATE_AMX: the same loops over plain memory). On a machine with AMX it is used only after a
// self-test at start-up has returned the portable kernels' bits (dispatch.cpp).
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx.h"
#include "avx512.h"

namespace va {
namespace amx {
namespace {

#ifdef VERIATTN_EMULATE_AMX

thread_local uint8_t tiles[8][16][64];

void configure() { memset(tiles, 0xee, sizeof tiles); }
void release() {}

template <int T>
void load(const void* p, i64 stride) {
    for (int r = 0; r < 16; r++) memcpy(tiles[T][r], (const char*)p + r * stride, 64);
}

template <int T>
void store(void* p, i64 stride) {
    for (int r = 0; r < 16; r++) memcpy((char*)p + r * stride, tiles[T][r], 64);
}

template <int T>
void zero() {
    memset(tiles[T], 0, sizeof tiles[T]);
}

template <int C, int A, int B, bool UNSIGNED_B>
void multiply_emulated() {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            memcpy(&sum, &tiles[C][m][4 * n], 4);
            for (int k = 0; k < 64; k++) {
                const uint8_t b = tiles[B][k / 4][4 * n + k % 4];
                sum += (int8_t)tiles[A][m][k] * (UNSIGNED_B ? (int)b : (int)(int8_t)b);
            }
            memcpy(&tiles[C][m][4 * n], &sum, 4);
        }
}

template <int C, int A, int B>
void multiply_su() { multiply_emulated<C, A, B, true>(); }
template <int C, int A, int B>
void multiply_ss() { multiply_emulated<C, A, B, false>(); }

#else

// All eight tiles as 16 rows of 64 bytes.
void configure() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
}

void release() { asm volatile("tilerelease"); }

// The instruction names its tiles, so tile numbers are template arguments pasted into assembly.
template <int T>
void load(const void* p, i64 stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

template <int T>
void store(void* p, i64 stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

template <int T>
void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// C += A (signed) * B (unsigned), and both signed.
template <int C, int A, int B>
void multiply_su() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

template <int C, int A, int B>
void multiply_ss() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

struct Tiles {
    Tiles() { configure(); }
    ~Tiles() { release(); }
};

// 16 * RM rows by 16 * CN outputs over one slice of inputs, onto what y holds. C: tiles 0..3, A: 4, 5, B: 6, 7.
template <int RM, int CN>
void block(const uint8_t* w, i64 panel_bytes, const int8_t* a, i64 lda, i64 inputs, int32_t* y, i64 ldy) {
    const i64 row = ldy * 4;
    load<0>(y, row);
    if (CN == 2) load<1>(y + 16, row);
    if (RM == 2) load<2>(y + 16 * ldy, row);
    if (RM == 2 && CN == 2) load<3>(y + 16 * ldy + 16, row);
    for (i64 x = 0; x < inputs; x += 64) {
        load<4>(a + x, lda);
        load<6>(w + x * 16, 64);
        multiply_su<0, 4, 6>();
        if (CN == 2) {
            load<7>(w + panel_bytes + x * 16, 64);
            multiply_su<1, 4, 7>();
        }
        if (RM == 2) {
            load<5>(a + 16 * lda + x, lda);
            multiply_su<2, 5, 6>();
            if (CN == 2) multiply_su<3, 5, 7>();
        }
    }
    store<0>(y, row);
    if (CN == 2) store<1>(y + 16, row);
    if (RM == 2) store<2>(y + 16 * ldy, row);
    if (RM == 2 && CN == 2) store<3>(y + 16 * ldy + 16, row);
}

template <int CN>
void rows(const uint8_t* w, i64 panel_bytes, const int8_t* a, i64 lda, i64 inputs, int32_t* y, i64 ldy, i64 m) {
    i64 r = 0;
    for (; r + 32 <= m; r += 32) block<2, CN>(w, panel_bytes, a + r * lda, lda, inputs, y + r * ldy, ldy);
    if (r < m) block<1, CN>(w, panel_bytes, a + r * lda, lda, inputs, y + r * ldy, ldy);
}

}  // namespace

void gemm(const uint8_t* packed, i64 n, i64 k, const int8_t* a, i64 m, i64 n0, i64 n1, int32_t* y) {
    // Whole tiles here; the rest of rows and outputs, and odd input widths, go to VNNI on the same packed weights.
    const i64 whole_rows = k % 64 == 0 && k > 0 ? m / 16 * 16 : 0;
    const i64 whole_cols = n1 % 16 == 0 ? n1 : n1 / 64 * 64;
    if (whole_rows < m) avx512::gemm(packed, n, k, a + whole_rows * k, m - whole_rows, n0, n1, y + whole_rows * n);
    if (whole_rows == 0) return;
    if (whole_cols < n1) avx512::gemm(packed, n, k, a, whole_rows, whole_cols, n1, y);
    int32_t* offsets = (int32_t*)scratch(S_ROW, sizeof(int32_t) * (size_t)whole_rows);
    avx512::row_offsets(a, k, k, whole_rows, offsets);
    const i64 panel_bytes = 16 * k, slice = 1024;
    Tiles in_use;
    for (i64 j = n0; j < whole_cols; j += 32) {
        const i64 cols = min64(32, whole_cols - j);
        for (i64 r = 0; r < whole_rows; r++)
            for (i64 c = 0; c < cols; c += 16) _mm512_storeu_si512(y + r * n + j + c, _mm512_set1_epi32(offsets[r]));
        // A slice of weights (32 KiB) stays close while all rows pass it.
        for (i64 x = 0; x < k; x += slice) {
            const uint8_t* w = packed + j * k + x * 16;
            if (cols == 32)
                rows<2>(w, panel_bytes, a + x, k, min64(slice, k - x), y + j, n, whole_rows);
            else
                rows<1>(w, panel_bytes, a + x, k, min64(slice, k - x), y + j, n, whole_rows);
        }
    }
}

namespace {

// out[key][16 * RV] = k (count, d) . q[d / 4][16 * RV][4]. C: tiles 0, 1; A: 2, 3; B: 4..7, loaded once per page.
template <int RV, int DEPTH>
void page_scores(const int8_t* k, const int32_t* q, i64 count, int32_t* out) {
    const i64 d = 64 * DEPTH, row = 64 * RV;
    load<4>(q, row);
    if (RV == 2) load<5>(q + 16, row);
    if (DEPTH == 2) load<6>(q + 16 * 16 * RV, row);
    if (DEPTH == 2 && RV == 2) load<7>(q + 16 * 16 * RV + 16, row);
    for (i64 j = 0; j < count; j += 16) {
        load<2>(k + j * d, d);
        zero<0>();
        multiply_ss<0, 2, 4>();
        if (RV == 2) {
            zero<1>();
            multiply_ss<1, 2, 5>();
        }
        if (DEPTH == 2) {
            load<3>(k + j * d + 64, d);
            multiply_ss<0, 3, 6>();
            if (RV == 2) multiply_ss<1, 3, 7>();
        }
        store<0>(out + j * 16 * RV, row);
        if (RV == 2) store<1>(out + j * 16 * RV + 16, row);
    }
}

void scores(const int8_t* k, const int32_t* q, i64 d, i64 row_vectors, i64 count, int32_t* out) {
    Tiles in_use;
    if (d == 64)
        row_vectors == 1 ? page_scores<1, 1>(k, q, count, out) : page_scores<2, 1>(k, q, count, out);
    else
        row_vectors == 1 ? page_scores<1, 2>(k, q, count, out) : page_scores<2, 2>(k, q, count, out);
}

void attention(const AttentionArgs& s, i64 kv, i64 i0, i64 i1) {
    avx512::attention_with(s, kv, i0, i1, s.d == 64 || s.d == 128 ? scores : nullptr);
}

i64 peak(i64 rounds) {
    alignas(64) static const uint8_t zeros[1024] = {};
    Tiles in_use;
    load<0>(zeros, 64), load<1>(zeros, 64), load<2>(zeros, 64), load<3>(zeros, 64);
    load<4>(zeros, 64), load<5>(zeros, 64), load<6>(zeros, 64), load<7>(zeros, 64);
    for (i64 r = 0; r < rounds; r++) {
        multiply_su<0, 4, 6>();
        multiply_su<1, 4, 7>();
        multiply_su<2, 5, 6>();
        multiply_su<3, 5, 7>();
    }
    return rounds * 4 * 16 * 16 * 64;
}

Kernels table() {
    Kernels k = avx512_kernels;
    k.gemm = gemm;
    k.attention = attention;
    k.peak = peak;
    return k;
}

}  // namespace

bool permitted() {
    // Linux hands out the tile state on request only, and a sandbox may refuse.
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

const Kernels& kernels() {
    static const Kernels k = table();
    return k;
}

}  // namespace amx
}  // namespace va
