// Python bindings: every argument is checked here, then the GIL is released and the work split over the pool.
//
// Outputs are allocated by the caller (veriattn.native.kernels). Rejected arguments raise ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "buffer.h"
#include "module_float.h"
#include "module_layer.h"
#include "module_ring.h"
#include "module_share.h"
#include "pack.h"
#include "run.h"
#include "wipe.h"

namespace nb = nanobind;

namespace va {
namespace {

// --- elementwise ---------------------------------------------------------------------------------------------------

bool norm_quantise(nb::handle x_, float eps, nb::handle a_, nb::handle scale_) {
    Buffer<const float> x(x_.ptr(), "x", 2);
    Buffer<int8_t> a(a_.ptr(), "a", 2);
    Buffer<float> scale(scale_.ptr(), "a_scale", 1);
    const i64 t = x.dim(0), n = x.dim(1);
    require(n >= 1 && n <= MAX_DIM, "x has no columns");
    a.shape({t, n});
    scale.shape({t});
    nb::gil_scoped_release release;
    return all_rows(t, n, [&](i64 t0, i64 t1) { return kernels().norm_quantise(x.data, t0, t1, n, eps, a.data, scale.data); });
}

bool quantise(nb::handle x_, nb::handle a_, nb::handle scale_) {
    Buffer<const float> x(x_.ptr(), "x", 2);
    Buffer<int8_t> a(a_.ptr(), "a", 2);
    Buffer<float> scale(scale_.ptr(), "a_scale", 1);
    const i64 t = x.dim(0), n = x.dim(1);
    require(n >= 1, "x has no columns");
    a.shape({t, n});
    scale.shape({t});
    nb::gil_scoped_release release;
    return all_rows(t, n, [&](i64 t0, i64 t1) { return kernels().quantise(x.data, t0, t1, n, a.data, scale.data); });
}

bool qkv_epilogue(nb::handle y_, nb::handle a_scale_, nb::handle w_scale_, nb::handle bias_, nb::handle cos_,
                  nb::handle sin_, nb::handle v_scale_, i64 heads, i64 kv_heads, i64 d, nb::handle k_center_,
                  nb::handle q_norm_, nb::handle k_norm_, float eps, float q_const, nb::handle q_, nb::handle q_scale_,
                  nb::handle k_, nb::handle k_scale_, nb::handle v_) {
    require(heads >= 1 && kv_heads >= 1 && d >= 1 && heads < 65536 && kv_heads <= heads && d <= 65536,
            "sizes of attention out of range");
    const i64 cols = (heads + 2 * kv_heads) * d;
    Buffer<const int32_t> y(y_.ptr(), "y", 2);
    const i64 t = y.dim(0);
    y.shape({t, cols});
    Buffer<const float> a_scale(a_scale_.ptr(), "a_scale", 1), w_scale(w_scale_.ptr(), "w_scale", 1),
        bias(bias_.ptr(), "bias", 1, true), cos(cos_.ptr(), "cos", 2), sin(sin_.ptr(), "sin", 2),
        v_scale(v_scale_.ptr(), "v_scale", 1), k_center(k_center_.ptr(), "k_center", 2, true),
        q_norm(q_norm_.ptr(), "q_norm", 1, true), k_norm(k_norm_.ptr(), "k_norm", 1, true);
    a_scale.shape({t});
    w_scale.shape({cols});
    bias.shape({cols});
    const i64 half = cos.dim(1);
    require(2 * half <= d, "the rotary table is wider than a head");
    cos.shape({t, half});
    sin.shape({t, half});
    v_scale.shape({kv_heads});
    k_center.shape({kv_heads, d});
    q_norm.shape({d});
    k_norm.shape({d});
    require(q_norm.given == k_norm.given, "q_norm and k_norm come together");
    Buffer<int8_t> q(q_.ptr(), "q", 3), k(k_.ptr(), "k", 3), v(v_.ptr(), "v", 3);
    Buffer<float> q_scale(q_scale_.ptr(), "q_scale", 2), k_scale(k_scale_.ptr(), "k_scale", 2);
    q.shape({t, heads, d});
    k.shape({t, kv_heads, d});
    v.shape({t, kv_heads, d});
    q_scale.shape({t, heads});
    k_scale.shape({t, kv_heads});
    const QkvArgs s{y.data, a_scale.data, w_scale.data, bias.data, cos.data, sin.data, v_scale.data, k_center.data,
                    q_norm.data, k_norm.data, eps, q_const, heads, kv_heads, d, half, q.data, q_scale.data, k.data,
                    k_scale.data, v.data};
    nb::gil_scoped_release release;
    return all_rows(t, 4 * cols, [&](i64 t0, i64 t1) { return kernels().qkv_epilogue(s, t0, t1); });
}

bool attention_epilogue(nb::handle o_, nb::handle l_, nb::handle v_scale_, nb::handle a_, nb::handle scale_) {
    Buffer<const int64_t> o(o_.ptr(), "o", 3);
    Buffer<const int32_t> l(l_.ptr(), "l", 2);
    Buffer<const float> v_scale(v_scale_.ptr(), "v_scale", 1);
    Buffer<int8_t> a(a_.ptr(), "a", 2);
    Buffer<float> scale(scale_.ptr(), "a_scale", 1);
    const i64 t = o.dim(0), heads = o.dim(1), d = o.dim(2), kv_heads = v_scale.dim(0);
    require(heads >= 1 && d >= 1 && kv_heads >= 1 && heads % kv_heads == 0, "heads do not divide into groups");
    l.shape({t, heads});
    a.shape({t, heads * d});
    scale.shape({t});
    nb::gil_scoped_release release;
    return all_rows(t, 2 * heads * d, [&](i64 t0, i64 t1) {
        return kernels().attention_epilogue(o.data, l.data, v_scale.data, heads, kv_heads, d, t0, t1, a.data, scale.data);
    });
}

bool mlp_epilogue(nb::handle y_, nb::handle a_scale_, nb::handle w_scale_, nb::handle a_, nb::handle scale_) {
    Buffer<const int32_t> y(y_.ptr(), "y", 2);
    Buffer<const float> a_scale(a_scale_.ptr(), "a_scale", 1), w_scale(w_scale_.ptr(), "w_scale", 1);
    Buffer<int8_t> a(a_.ptr(), "a", 2);
    Buffer<float> scale(scale_.ptr(), "scale", 1);
    const i64 t = y.dim(0), n = y.dim(1) / 2;
    require(n >= 1 && y.dim(1) == 2 * n, "y has an odd number of columns");
    a_scale.shape({t});
    w_scale.shape({2 * n});
    a.shape({t, n});
    scale.shape({t});
    nb::gil_scoped_release release;
    return all_rows(t, 6 * n, [&](i64 t0, i64 t1) {
        return kernels().mlp_epilogue(y.data, a_scale.data, w_scale.data, n, t0, t1, a.data, scale.data);
    });
}

void dequantise(nb::handle x_, nb::handle y_, nb::handle a_scale_, nb::handle w_scale_, nb::handle bias_,
                nb::handle out_) {
    Buffer<const int32_t> y(y_.ptr(), "y", 2);
    const i64 t = y.dim(0), n = y.dim(1);
    Buffer<const float> x(x_.ptr(), "x", 2, true), a_scale(a_scale_.ptr(), "a_scale", 1),
        w_scale(w_scale_.ptr(), "w_scale", 1), bias(bias_.ptr(), "bias", 1, true);
    Buffer<float> out(out_.ptr(), "out", 2);
    x.shape({t, n});
    a_scale.shape({t});
    w_scale.shape({n});
    bias.shape({n});
    out.shape({t, n});
    nb::gil_scoped_release release;
    over_rows(t, n, [&](i64 t0, i64 t1) {
        kernels().dequantise(x.data, y.data, a_scale.data, w_scale.data, bias.data, n, t0, t1, out.data);
    });
}

// --- gemm ----------------------------------------------------------------------------------------------------------

void multiply(const PackedLinear& w, nb::handle a_, nb::handle y_) {
    Buffer<const int8_t> a(a_.ptr(), "a", 2);
    Buffer<int32_t> y(y_.ptr(), "y", 2);
    const i64 m = a.dim(0);
    a.shape({m, w.inputs()});
    y.shape({m, w.outputs()});
    w.ready();
    nb::gil_scoped_release release;
    w.multiply(a.data, m, y.data);
}

void gemm_i8(nb::handle a_, nb::handle w_, nb::handle y_) {
    Buffer<const int8_t> a(a_.ptr(), "a", 2), w(w_.ptr(), "w", 2);
    Buffer<int32_t> y(y_.ptr(), "y", 2);
    const i64 m = a.dim(0), k = a.dim(1), n = w.dim(0);
    require(k <= MAX_IN, "more than 131071 input features");
    w.shape({n, k});
    y.shape({m, n});
    nb::gil_scoped_release release;
    const Kernels& ks = kernels();
    if (ks.format == ROWS) {
        run_gemm(ks, (const uint8_t*)w.data, n, k, a.data, m, y.data);
        return;
    }
    parallel_for((n + 63) / 64, m * n * k > 200000, [&](i64 i) {
        // Each task packs its 64 columns into its own work space.
        const i64 n0 = i * 64, cols = min64(64, n - n0);
        uint8_t* packed = (uint8_t*)scratch(S_PACK, packed_bytes(ks.format, cols, k) + 64);
        int32_t* out = (int32_t*)scratch(S_ROW2, sizeof(int32_t) * (size_t)(cols * m));
        pack_rows(ks.format, w.data + n0 * k, cols, k, 0, cols, packed);
        ks.gemm(packed, cols, k, a.data, m, 0, cols, out);
        for (i64 r = 0; r < m; r++) memcpy(y.data + r * n + n0, out + r * cols, sizeof(int32_t) * (size_t)cols);
    });
}

// --- attention -----------------------------------------------------------------------------------------------------

void check_table(const Buffer<const int32_t>& table, i64 keys, i64 pages) {
    require(keys <= MAX_KEYS, "more than 131072 keys");
    const i64 used = (keys + PAGE - 1) / PAGE;
    require(table.dim(0) >= used, "the block table is shorter than the sequence");
    for (i64 i = 0; i < used; i++) require(table.data[i] >= 0 && table.data[i] < pages, "the block table points outside the cache");
}

void attention(nb::handle q_, nb::handle q_scale_, nb::handle k_, nb::handle k_scale_, nb::handle v_, nb::handle g_,
               nb::handle table_, i64 start, nb::handle o_, nb::handle l_, nb::handle pg_, nb::handle row_max_, nb::handle own_max_) {
    Buffer<const int8_t> q(q_.ptr(), "q", 3), k(k_.ptr(), "k_pages", 4), v(v_.ptr(), "v_pages", 4, true);
    Buffer<const float> q_scale(q_scale_.ptr(), "q_scale", 2), k_scale(k_scale_.ptr(), "k_scale_pages", 3);
    Buffer<const uint64_t> g(g_.ptr(), "g_pages", 4, true);
    Buffer<const int32_t> table(table_.ptr(), "block_table", 1);
    Buffer<int64_t> o(o_.ptr(), "o", 3, true);
    Buffer<int32_t> l(l_.ptr(), "l", 2, true);
    Buffer<uint64_t> pg(pg_.ptr(), "pg", 3, true);
    Buffer<const float> row_max(row_max_.ptr(), "row_max", 2, true);
    Buffer<float> own_max(own_max_.ptr(), "own_max", 2, true);
    const i64 t = q.dim(0), heads = q.dim(1), d = q.dim(2), pages = k.dim(0), kv_heads = k.dim(1);
    require(heads >= 1 && kv_heads >= 1 && d >= 1 && d <= 65536 && heads % kv_heads == 0, "heads do not divide into groups");
    require(start >= 0 && start <= MAX_KEYS && t <= MAX_KEYS, "more than 131072 keys");
    require(v.given == o.given && g.given == pg.given, "an output without its input");
    require(own_max.given != l.given && !(own_max.given && (o.given || pg.given)), "either the maxima or the sums");
    row_max.shape({t, heads});
    own_max.shape({t, heads});
    k.shape({pages, kv_heads, PAGE, d});
    q_scale.shape({t, heads});
    k_scale.shape({pages, kv_heads, PAGE});
    v.shape({pages, kv_heads, PAGE, d});
    g.shape({pages, kv_heads, PAGE, 2});
    check_table(table, start + t, pages);
    o.shape({t, heads, d});
    l.shape({t, heads});
    pg.shape({t, heads, 2});
    if (t == 0) return;
    AttentionArgs s{q.data, q_scale.data, k.data, k_scale.data, v.data, g.data, table.data, t, heads, kv_heads, d,
                    start, o.data, l.data, pg.data, nullptr, row_max.data, own_max.data};
    nb::gil_scoped_release release;
    run_attention(s);
}

void attention_transfer(nb::handle scores_, nb::handle q_, nb::handle q_scale_, nb::handle k_, nb::handle c_,
                        nb::handle r_, nb::handle k_scale_, nb::handle g_, nb::handle table_, i64 start,
                        nb::handle ok_, nb::handle l_, nb::handle pg_) {
    Buffer<const int32_t> scores(scores_.ptr(), "scores", 3), table(table_.ptr(), "block_table", 1);
    Buffer<const int8_t> q(q_.ptr(), "q", 3), k(k_.ptr(), "k", 3);
    Buffer<const float> q_scale(q_scale_.ptr(), "q_scale", 2), k_scale(k_scale_.ptr(), "k_scale_pages", 3);
    Buffer<const uint64_t> c(c_.ptr(), "c", 3), r(r_.ptr(), "r", 2), g(g_.ptr(), "g_pages", 4);
    Buffer<uint8_t> ok(ok_.ptr(), "ok", 2);
    Buffer<int32_t> l(l_.ptr(), "l", 2);
    Buffer<uint64_t> pg(pg_.ptr(), "pg", 3);
    const i64 t = q.dim(0), heads = q.dim(1), d = q.dim(2), pages = k_scale.dim(0), kv_heads = k.dim(1);
    require(heads >= 1 && kv_heads >= 1 && d >= 1 && d <= 65536 && heads % kv_heads == 0, "heads do not divide into groups");
    require(start >= 0 && start <= MAX_KEYS && t <= MAX_KEYS, "more than 131072 keys");
    scores.shape({heads, t, start + t});
    q_scale.shape({t, heads});
    k.shape({t, kv_heads, d});
    c.shape({kv_heads, 2, d});
    r.shape({2, -1});
    require(r.dim(1) >= start + t, "fewer challenges than keys");
    k_scale.shape({pages, kv_heads, PAGE});
    g.shape({pages, kv_heads, PAGE, 2});
    check_table(table, start + t, pages);
    ok.shape({t, heads});
    l.shape({t, heads});
    pg.shape({t, heads, 2});
    const TransferArgs s{scores.data, q.data, q_scale.data, k.data, c.data, r.data, r.dim(1), k_scale.data, g.data,
                         table.data, t, heads, kv_heads, d, start, ok.data, l.data, pg.data};
    nb::gil_scoped_release release;
    parallel_for(kv_heads, t * heads * (start + t) > 30000, [&](i64 kv) { kernels().transfer(s, kv); });
}

void attention_weights(nb::handle scores_, nb::handle q_scale_, nb::handle k_scale_, nb::handle table_, i64 start,
                       nb::handle p_) {
    Buffer<const int32_t> scores(scores_.ptr(), "scores", 3), table(table_.ptr(), "block_table", 1);
    Buffer<const float> q_scale(q_scale_.ptr(), "q_scale", 2), k_scale(k_scale_.ptr(), "k_scale_pages", 3);
    Buffer<uint16_t> p(p_.ptr(), "p", 3);
    const i64 heads = scores.dim(0), t = scores.dim(1), keys = scores.dim(2), pages = k_scale.dim(0), kv_heads = k_scale.dim(1);
    require(heads >= 1 && kv_heads >= 1 && heads % kv_heads == 0, "heads do not divide into groups");
    require(start >= 0 && start <= MAX_KEYS, "more than 131072 keys");
    q_scale.shape({t, heads});
    k_scale.shape({pages, kv_heads, PAGE});
    check_table(table, keys, pages);
    p.shape({heads, t, keys});
    if (t == 0 || keys == 0) return;
    const WeightsArgs s{scores.data, q_scale.data, k_scale.data, table.data, t, heads, kv_heads, keys, start, p.data};
    nb::gil_scoped_release release;
    const i64 step = 16, steps = (t + step - 1) / step;
    parallel_for(heads * steps, t * heads * keys > 30000,
                 [&](i64 i) { kernels().weights(s, i / steps, i % steps * step, min64(t, (i % steps + 1) * step)); });
}

// --- field ---------------------------------------------------------------------------------------------------------

void linear_check(nb::handle y_, nb::handle r_, nb::handle a_, nb::handle u_, nb::handle copy_, nb::handle ok_) {
    Buffer<const int32_t> y(y_.ptr(), "y", 2);
    Buffer<const int8_t> a(a_.ptr(), "a", 2);
    Buffer<const uint64_t> r(r_.ptr(), "r", 2), u(u_.ptr(), "u", 2);
    Buffer<int32_t> copy(copy_.ptr(), "out", 2, true);
    Buffer<uint8_t> ok(ok_.ptr(), "ok", 1);
    const i64 t = y.dim(0), n = y.dim(1), k = a.dim(1);
    require(k <= MAX_IN, "more than 131071 input features");
    a.shape({t, k});
    r.shape({2, n});
    u.shape({2, k});
    copy.shape({t, n});
    ok.shape({t});
    nb::gil_scoped_release release;
    check_rows(y.data, n, r.data, a.data, k, u.data, t, copy.data, ok.data);
}

void project_weights(nb::handle w_, nb::handle r_, nb::handle u_) {
    Buffer<const int8_t> w(w_.ptr(), "w", 2);
    Buffer<const uint64_t> r(r_.ptr(), "r", 2);
    Buffer<uint64_t> u(u_.ptr(), "u", 2);
    const i64 n = w.dim(0), k = w.dim(1), reps = r.dim(0);
    require(n < (i64)1 << 24 && reps <= 64, "too many rows in a chunk");
    r.shape({reps, n});
    u.shape({reps, k});
    nb::gil_scoped_release release;
    i64 step = (k / (get_threads() * 2) + 63) / 64 * 64;
    step = step < 64 ? 64 : step > 1024 ? 1024 : step;
    parallel_for((k + step - 1) / step, n * k > 60000,
                 [&](i64 i) { kernels().project(w.data, n, k, r.data, reps, i * step, min64(k, (i + 1) * step), u.data); });
}

void value_projection(nb::handle v_, nb::handle w_, nb::handle g_) {
    Buffer<const int8_t> v(v_.ptr(), "v", 3);
    Buffer<const uint64_t> w(w_.ptr(), "w", 3);
    Buffer<uint64_t> g(g_.ptr(), "g", 3);
    const i64 t = v.dim(0), kv_heads = v.dim(1), d = v.dim(2);
    w.shape({kv_heads, 2, d});
    g.shape({t, kv_heads, 2});
    nb::gil_scoped_release release;
    over_rows(t, kv_heads * d, [&](i64 t0, i64 t1) {
        for (i64 kv = 0; kv < kv_heads; kv++)
            kernels().dot_i8(v.data + kv * d, kv_heads * d, d, w.data + kv * 2 * d, t0, t1, g.data + kv * 2, kv_heads * 2);
    });
}

bool project_outputs(nb::handle o_, nb::handle w_, nb::handle out_) {
    Buffer<const int64_t> o(o_.ptr(), "o", 3);
    Buffer<const uint64_t> w(w_.ptr(), "w", 3);
    Buffer<uint64_t> out(out_.ptr(), "out", 3);
    const i64 t = o.dim(0), heads = o.dim(1), d = o.dim(2), kv_heads = w.dim(0);
    require(kv_heads >= 1 && heads % kv_heads == 0, "heads do not divide into groups");
    require(d <= 65536, "head_dim out of range");
    w.shape({kv_heads, 2, d});
    out.shape({t, heads, 2});
    const i64 group = heads / kv_heads;
    nb::gil_scoped_release release;
    return all_rows(t, heads * d, [&](i64 t0, i64 t1) {
        bool ok = true;
        for (i64 h = 0; h < heads; h++)
            ok &= kernels().dot_i64(o.data + h * d, heads * d, d, w.data + h / group * 2 * d, t0, t1, out.data + h * 2,
                                    heads * 2);
        return ok;
    });
}

void key_projection(nb::handle k_, nb::handle r_, i64 start, nb::handle c_) {
    Buffer<const int8_t> k(k_.ptr(), "k", 3);
    Buffer<const uint64_t> r(r_.ptr(), "r", 2);
    Buffer<uint64_t> c(c_.ptr(), "c", 3);
    const i64 t = k.dim(0), kv_heads = k.dim(1), d = k.dim(2);
    r.shape({2, -1});
    c.shape({kv_heads, 2, d});
    require(start >= 0 && start <= MAX_KEYS && t <= MAX_KEYS && r.dim(1) >= start + t, "fewer challenges than keys");
    nb::gil_scoped_release release;
    // The keys of a token are one row of kv_heads * d columns: the same sum as a projection of weights.
    const i64 cols = kv_heads * d;
    parallel_for(1, false, [&](i64) {
        uint64_t* work = (uint64_t*)scratch(S_PREPARE, sizeof(uint64_t) * (size_t)(2 * t + 2 * cols));
        uint64_t* sums = work + 2 * t;
        for (int rep = 0; rep < 2; rep++)
            for (i64 i = 0; i < t; i++) work[rep * t + i] = r.data[rep * r.dim(1) + start + i];
        memset(sums, 0, sizeof(uint64_t) * (size_t)(2 * cols));
        kernels().project(k.data, t, cols, work, 2, 0, cols, sums);
        for (i64 kv = 0; kv < kv_heads; kv++)
            for (int rep = 0; rep < 2; rep++)
                for (i64 x = 0; x < d; x++) {
                    uint64_t* at = c.data + (kv * 2 + rep) * d + x;
                    *at = add_mod(*at, sums[rep * cols + kv * d + x]);
                }
    });
}

// --- words shared with another process -----------------------------------------------------------------------------

class RawBuffer {
  public:
    RawBuffer(PyObject* object, i64 offset, bool writable) {
        if (PyObject_GetBuffer(object, &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
            PyErr_Clear();
            throw std::invalid_argument("a contiguous buffer is needed");
        }
        bool ok = offset >= 0 && offset % 8 == 0 && offset + 8 <= view_.len &&
                  ((uintptr_t)view_.buf + (uintptr_t)offset) % 8 == 0;
        if (!ok) {
            PyBuffer_Release(&view_);
            throw std::invalid_argument("the word is misaligned or outside the buffer");
        }
        word = reinterpret_cast<uint64_t*>(static_cast<char*>(view_.buf) + offset);
    }
    ~RawBuffer() { PyBuffer_Release(&view_); }
    RawBuffer(const RawBuffer&) = delete;
    RawBuffer& operator=(const RawBuffer&) = delete;
    uint64_t* word;

  private:
    Py_buffer view_;
};

uint64_t load_acquire_u64(nb::handle buffer, i64 offset) {
    RawBuffer b(buffer.ptr(), offset, false);
    return __atomic_load_n(b.word, __ATOMIC_ACQUIRE);
}

void store_release_u64(nb::handle buffer, i64 offset, uint64_t value) {
    RawBuffer b(buffer.ptr(), offset, true);
    __atomic_store_n(b.word, value, __ATOMIC_RELEASE);
}

// --- the machine's limits, for the benchmark -------------------------------------------------------------------------

i64 peak_products(i64 rounds) {
    require(rounds >= 1 && rounds <= (i64)1 << 32, "rounds out of range");
    nb::gil_scoped_release release;
    const Kernels& ks = kernels();
    return ks.peak ? ks.peak(rounds) : 0;
}

uint64_t read_words(nb::handle words_) {
    Buffer<const uint64_t> words(words_.ptr(), "words", 1);
    nb::gil_scoped_release release;
    uint64_t sum[8] = {};
    const i64 n = words.dim(0) / 8 * 8;
    for (i64 i = 0; i < n; i += 8) {
        // A hint only: the address may lie behind the array.
        __builtin_prefetch((const void*)((uintptr_t)(words.data + i) + 4096));
        for (i64 x = 0; x < 8; x++) sum[x] += words.data[i + x];
    }
    uint64_t all = 0;
    for (uint64_t x : sum) all += x;
    return all;
}

}  // namespace
}  // namespace va

NB_MODULE(_native, m) {
    using namespace va;
    m.def("norm_quantise", &norm_quantise);
    m.def("quantise", &quantise);
    m.def("qkv_epilogue", &qkv_epilogue, nb::arg("y"), nb::arg("a_scale"), nb::arg("w_scale"), nb::arg("bias").none(),
          nb::arg("cos"), nb::arg("sin"), nb::arg("v_scale"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("d"),
          nb::arg("k_center").none(), nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"),
          nb::arg("q_const"), nb::arg("q"), nb::arg("q_scale"), nb::arg("k"), nb::arg("k_scale"), nb::arg("v"));
    m.def("attention_epilogue", &attention_epilogue);
    m.def("mlp_epilogue", &mlp_epilogue);
    m.def("dequantise", &dequantise, nb::arg("x").none(), nb::arg("y"), nb::arg("a_scale"), nb::arg("w_scale"),
          nb::arg("bias").none(), nb::arg("out"));
    m.def("gemm_i8", &gemm_i8);
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def(nb::init<nb::handle>())
        .def("multiply", &multiply)
        .def_prop_ro("shape", [](const PackedLinear& w) { return nb::make_tuple(w.outputs(), w.inputs()); })
        .def_prop_ro("nbytes", &PackedLinear::nbytes);
    m.def("attention", &attention, nb::arg("q"), nb::arg("q_scale"), nb::arg("k_pages"), nb::arg("k_scale_pages"),
          nb::arg("v_pages").none(), nb::arg("g_pages").none(), nb::arg("block_table"), nb::arg("start"),
          nb::arg("o").none(), nb::arg("l").none(), nb::arg("pg").none(), nb::arg("row_max").none() = nb::none(),
          nb::arg("own_max").none() = nb::none());
    m.def("attention_transfer", &attention_transfer);
    m.def("attention_weights", &attention_weights);
    bind_share(m);
    bind_float(m);
    bind_layer(m);
    bind_ring(m);
    m.def("linear_check", &linear_check, nb::arg("y"), nb::arg("r"), nb::arg("a"), nb::arg("u"), nb::arg("out").none(),
          nb::arg("ok"));
    m.def("project_weights", &project_weights);
    m.def("value_projection", &value_projection);
    m.def("project_outputs", &project_outputs);
    m.def("key_projection", &key_projection);
    m.def("load_acquire_u64", &load_acquire_u64);
    m.def("store_release_u64", &store_release_u64);
    m.def("peak_products", &peak_products);
    m.def("read_words", &read_words);
    m.def("cpu_features", &cpu_features);
    m.def("available_isas", &available_isas);
    m.def("active_isa", &active_isa);
    m.def("set_isa", [](const std::string& name) {
        require(set_isa(name), "this machine cannot run that instruction set");
    });
    m.def("set_threads", [](int n) {
        require(n >= 1 && n <= 256, "threads must be between 1 and 256");
        set_threads(n);
    });
    m.def("get_threads", &get_threads);
    m.def("wipe_free_memory", &wipe_free_memory);
    m.def("wipe_blocks", [](nb::list blocks) {
        for (nb::handle block : blocks) {
            Py_buffer view;
            require(PyObject_GetBuffer(block.ptr(), &view, PyBUF_WRITABLE) == 0, "not a writable block");
            wipe_block(view.buf, (size_t)view.len);
            PyBuffer_Release(&view);
        }
    });
}
