// Types, constants and the table of kernels that every instruction set fills in.
//
// Files that are compiled for more than one instruction set include only this header and intrinsics: a function
// template or inline function of the standard library would be merged by the linker across files, and the copy that
// survives might use instructions that the machine lacks. Everything here is `static` for the same reason.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#define VA_X86 1
#elif defined(__aarch64__)
#define VA_X86 0
#else
#error "veriattn builds on Linux x86-64 and aarch64 only"
#endif
#if !defined(__linux__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "veriattn builds on little-endian Linux only"
#endif

namespace va {

typedef int64_t i64;
typedef unsigned __int128 u128;
typedef __int128 i128;

// --- field p = 2^50 - 27 -------------------------------------------------------------------------------------------

static const uint64_t P = (1ull << 50) - 27;

// Any 128-bit number to [0, p). Each fold replaces 2^50 by 27: < 2^128 -> < 2^83 -> < 2^51 -> < 2^50 + 54 -> done.
static inline uint64_t reduce(u128 x) {
    const u128 mask = ((u128)1 << 50) - 1;
    x = (x & mask) + (x >> 50) * 27;
    x = (x & mask) + (x >> 50) * 27;
    uint64_t y = (uint64_t)x;
    y = (y & (uint64_t)mask) + (y >> 50) * 27;
    return y >= P ? y - P : y;
}

static inline uint64_t reduce_signed(i128 x) {
    if (x >= 0) return reduce((u128)x);
    uint64_t r = reduce(-(u128)x);
    return r ? P - r : 0;
}

static inline uint64_t add_mod(uint64_t a, uint64_t b) {
    uint64_t s = a + b;
    return s >= P ? s - P : s;
}

static inline uint64_t sub_mod(uint64_t a, uint64_t b) { return a >= b ? a - b : a + P - b; }

// --- constants of the canonical function (spec/constants.py) -----------------------------------------------------

static const float ABSMAX_FLOOR = 0x1p-20f;
static const uint32_t ABSMAX_LIMIT_BITS = 0x53800000u;  // 2^40
static const float XI_MAX = 960.0f;
static const i64 PAGE = 256;

extern const int32_t LUT15[64];

// --- arguments -----------------------------------------------------------------------------------------------------

struct QkvArgs {
    const int32_t* y;
    const float *a_scale, *w_scale, *bias, *cos, *sin, *v_scale, *k_center, *q_norm, *k_norm;
    float eps, q_const;
    i64 heads, kv_heads, d, half;
    int8_t* q;
    float* q_scale;
    int8_t* k;
    float* k_scale;
    int8_t* v;
};

struct AttentionArgs {
    const int8_t* q;            // (tokens, heads, d)
    const float* q_scale;       // (tokens, heads)
    const int8_t* k_pages;      // (pages, kv_heads, PAGE, d)
    const float* k_scale;       // (pages, kv_heads, PAGE)
    const int8_t* v_pages;      // (pages, kv_heads, PAGE, d) or null
    const uint64_t* g_pages;    // (pages, kv_heads, PAGE, 2) or null
    const int32_t* table;       // pages of the sequence in order
    i64 tokens, heads, kv_heads, d, start;
    int64_t* o;                 // (tokens, heads, d) where v_pages is given
    int32_t* l;                 // (tokens, heads)
    uint64_t* pg;               // (tokens, heads, 2) where g_pages is given
    void* prepared;             // per-call work space of the kernels, prepare_bytes() long
    const float* row_max;       // (tokens, heads) to use in place of the rows' own maxima, or null
    float* own_max;             // (tokens, heads): where given, row maxima are all that is computed
};

struct TransferArgs {
    const int32_t* scores;      // (heads, tokens, start + tokens) claimed; what a row does not see is not read
    const int8_t* q;            // (tokens, heads, d)
    const float* q_scale;       // (tokens, heads)
    const int8_t* k;            // (tokens, kv_heads, d): the chunk's own keys
    const uint64_t* c;          // (kv_heads, 2, d): sum of r_j k_j over the keys before the chunk
    const uint64_t* r;          // (2, r_stride)
    i64 r_stride;
    const float* k_scale;
    const uint64_t* g_pages;
    const int32_t* table;
    i64 tokens, heads, kv_heads, d, start;
    uint8_t* ok;                // (tokens, heads)
    int32_t* l;
    uint64_t* pg;
};

// P of given scores (the baseline that has softmax on one side and products on the other).
struct WeightsArgs {
    const int32_t* scores;  // (heads, tokens, keys)
    const float* q_scale;   // (tokens, heads)
    const float* k_scale;   // (pages, kv_heads, PAGE)
    const int32_t* table;
    i64 tokens, heads, kv_heads, keys, start;
    uint16_t* p;  // (heads, tokens, keys), 0 where a key is not visible
};

// --- one instruction set -------------------------------------------------------------------------------------------

// How PackedLinear stores its weights.
enum Format { ROWS = 0, VNNI = 1 };

// Ranges are half open. Functions over rows return false where the canonical function is not defined
// (spec.reference.absmax); they never stop early, so that results do not depend on the split.
struct Kernels {
    bool (*norm_quantise)(const float* x, i64 t0, i64 t1, i64 n, float eps, int8_t* a, float* scale);
    bool (*quantise)(const float* x, i64 t0, i64 t1, i64 n, int8_t* a, float* scale);
    bool (*qkv_epilogue)(const QkvArgs& s, i64 t0, i64 t1);
    bool (*attention_epilogue)(const int64_t* o, const int32_t* l, const float* v_scale, i64 heads, i64 kv_heads,
                               i64 d, i64 t0, i64 t1, int8_t* a, float* scale);
    bool (*mlp_epilogue)(const int32_t* y, const float* a_scale, const float* w_scale, i64 n, i64 t0, i64 t1,
                         int8_t* a, float* scale);
    // out = (x +) y * w_scale * a_scale (+ bias); x and bias may be null.
    void (*dequantise)(const float* x, const int32_t* y, const float* a_scale, const float* w_scale,
                       const float* bias, i64 cols, i64 t0, i64 t1, float* out);

    Format format;
    // y[:, n0:n1] of a (m, k) @ w (n, k).T; n0 is a multiple of 64.
    void (*gemm)(const uint8_t* packed, i64 n, i64 k, const int8_t* a, i64 m, i64 n0, i64 n1, int32_t* y);

    // Work space of attention() and the step that fills it for pages [p0, p1) of the table.
    size_t (*prepare_bytes)(const AttentionArgs& s);
    void (*prepare)(const AttentionArgs& s, i64 kv, i64 p0, i64 p1);
    i64 (*tile_queries)(const AttentionArgs& s);
    void (*attention)(const AttentionArgs& s, i64 kv, i64 i0, i64 i1);
    void (*transfer)(const TransferArgs& s, i64 kv);
    void (*weights)(const WeightsArgs& s, i64 head, i64 i0, i64 i1);

    // Shares of attention (spec/partial.py), n <= PAGE keys at a time.
    // next: what comes after these keys, of the same size, to be fetched meanwhile; or the keys themselves.
    // out[r * out_stride + j] = q[r * d ...] . k[j * d ...]; false, and nothing done, where gemm() is the better way.
    bool (*run_scores)(const int8_t* q, i64 rows, const int8_t* k, const int8_t* next, i64 n, i64 d, int32_t* out, i64 out_stride);
    float (*run_max)(const int32_t* scores, const float* k_scale, i64 n, float m);
    // P of one row; returns its sum.
    int32_t (*run_weigh)(const int32_t* scores, const float* k_scale, i64 n, float m, float q_scale, uint16_t* p);
    // pg[row, rep] += sum_j p[row * p_stride + j] * g[2 * j + rep] mod p.
    void (*run_project)(const uint16_t* p, i64 p_stride, i64 rows, const uint64_t* g, i64 n, uint64_t* pg);
    // o[row * d + c] += sum_j p[row * p_stride + j] * v[j * d + c], p <= 16384.
    void (*run_values)(const uint16_t* p, i64 p_stride, i64 rows, const int8_t* v, const int8_t* next, i64 n, i64 d, int64_t* o);

    // out[t, rep] = sum_n y[t, n] * r[rep, n] mod p; each y is read from memory once, and stored to copy unless null.
    void (*dot_i32)(const int32_t* y, i64 n, const uint64_t* r, i64 t0, i64 t1, int32_t* copy, uint64_t* out);
    // out[t, rep] = sum_k a[t * stride + k] * u[rep, k] mod p.
    void (*dot_i8)(const int8_t* a, i64 stride, i64 k, const uint64_t* u, i64 t0, i64 t1, uint64_t* out,
                   i64 out_stride);
    // The same for |o| < 2^39; returns false where an element is outside that range.
    bool (*dot_i64)(const int64_t* o, i64 stride, i64 k, const uint64_t* u, i64 t0, i64 t1, uint64_t* out,
                    i64 out_stride);
    // u[rep, k0:k1] += sum_n w[n, k0:k1] * r[rep, n] mod p.
    void (*project)(const int8_t* w, i64 n, i64 k, const uint64_t* r, i64 reps, i64 k0, i64 k1, uint64_t* u);

    // For the benchmark: the machine's int8 multiplier alone, on registers. Returns multiply-adds; null where unknown.
    i64 (*peak)(i64 rounds);
};

// Grow-only work space of the calling thread, 64-byte aligned; `slot` keeps the users apart.
enum Slot { S_ROW = 0, S_ROW2, S_GEMM, S_T, S_FIELD, S_PREPARE, S_PACK, S_LAYER, S_SLOTS };
void* scratch(Slot slot, size_t bytes);

extern const Kernels portable_kernels;
#if VA_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

static inline i64 min64(i64 a, i64 b) { return a < b ? a : b; }

}  // namespace va
