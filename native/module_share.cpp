// Python bindings of shares of attention: keys that lie in pages (a block table is given) or in one piece (None).
//
// A share's keys are columns [at, at + keys) of arrays (heads, rows, columns); the rows of one KV head are neighbours there.
#include "module_share.h"

#include <cstring>
#include <memory>
#include <vector>

#include "buffer.h"
#include "dispatch.h"
#include "pack.h"
#include "threads.h"

namespace nb = nanobind;

namespace va {
namespace {

const i64 MAX_KEYS = 131072, MAX_DIM = 65536;

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// Per-key values of `width` elements: pages (pages, kv_heads, PAGE[, width]) with a table, or one piece (kv_heads, keys[, width]).
template <class T>
struct Source {
    Buffer<const T> values;
    Buffer<const int32_t> table;
    i64 kv_heads, width;

    Source(nb::handle values_, nb::handle table_, const char* name, bool has_width, i64 keys)
        : values(values_.ptr(), name, (table_.is_none() ? 2 : 3) + has_width), table(table_.ptr(), "block_table", 1, true) {
        require(keys >= 0 && keys <= MAX_KEYS, "more than 131072 keys");
        kv_heads = values.dim(table.given);
        width = has_width ? values.dim(table.given ? 3 : 2) : 1;
        require(kv_heads >= 1 && width >= 1 && width <= MAX_DIM, "sizes of attention out of range");
        if (!table.given) {
            require(values.dim(1) >= keys, "fewer keys than the share has");
            return;
        }
        require(values.dim(2) == PAGE, "pages of another size");
        require(table.dim(0) >= (keys + PAGE - 1) / PAGE, "the block table is shorter than the share");
        for (i64 i = 0; i < (keys + PAGE - 1) / PAGE; i++)
            require(table.data[i] >= 0 && table.data[i] < values.dim(0), "the block table points outside the cache");
    }

    // Values of keys j, j + 1, ... of the same page.
    const T* at(i64 kv, i64 j) const {
        if (table.given) return values.data + (((i64)table.data[j / PAGE] * kv_heads + kv) * PAGE + j % PAGE) * width;
        return values.data + (kv * values.dim(1) + j) * width;
    }
};

i64 group_of(i64 heads, i64 kv_heads) {
    require(heads >= 1 && heads % kv_heads == 0, "heads do not divide into groups");
    return heads / kv_heads;
}

void check_columns(i64 columns, i64 at, i64 keys) {
    require(at >= 0 && at <= MAX_KEYS && at + keys <= columns, "the share lies outside of the columns");
}

// The heads of q are those of KV heads kv0, kv0 + 1, ..., num_kv of them.
void share_scores(nb::handle q_, nb::handle k_, nb::handle table_, i64 keys, nb::handle out_, i64 at, i64 kv0, i64 num_kv) {
    Buffer<const int8_t> q(q_.ptr(), "q", 3);
    Source<int8_t> k(k_, table_, "k", true, keys);
    Buffer<int32_t> out(out_.ptr(), "scores", 3);
    require(num_kv >= 1 && kv0 >= 0 && kv0 <= k.kv_heads - num_kv, "there are no such KV heads");
    const i64 rows = q.dim(0), heads = q.dim(1), d = q.dim(2), group = group_of(heads, num_kv), m = group * rows;
    require(k.width == d, "q and k have different dimensions");
    out.shape({heads, rows, -1});
    const i64 columns = out.dim(2);
    check_columns(columns, at, keys);
    if (rows == 0 || keys == 0) return;
    nb::gil_scoped_release release;
    const Kernels& ks = kernels();
    std::vector<int8_t> by_head((size_t)(heads * rows * d));
    for (i64 h = 0; h < heads; h++)
        for (i64 i = 0; i < rows; i++) memcpy(&by_head[(size_t)((h * rows + i) * d)], q.data + (i * heads + h) * d, (size_t)d);
    const i64 blocks = (keys + 63) / 64;
    parallel_for(num_kv * blocks, m * keys * d > 300000, [&](i64 task) {
        const i64 kv = task / blocks, j = task % blocks * 64, n = min64(64, keys - j);
        const int8_t* block = k.at(kv0 + kv, j);
        int32_t* to = out.data + kv * m * columns + at + j;
        const int8_t* next = k.at(kv0 + kv, j + 64 < keys ? j + 64 : j);
        if (ks.run_scores(&by_head[(size_t)(kv * m * d)], m, block, next, n, d, to, columns)) return;
        const uint8_t* packed = (const uint8_t*)block;
        if (ks.format != ROWS) {
            uint8_t* space = (uint8_t*)scratch(S_PACK, packed_bytes(ks.format, n, d) + 64);
            pack_rows(ks.format, block, n, d, 0, n, space);
            packed = space;
        }
        int32_t* y = (int32_t*)scratch(S_ROW2, sizeof(int32_t) * (size_t)(m * n));
        ks.gemm(packed, n, d, &by_head[(size_t)(kv * m * d)], m, 0, n, y);
        for (i64 r = 0; r < m; r++)
            memcpy(to + r * columns, y + r * n, sizeof(int32_t) * (size_t)n);
    });
}

// Row maxima are raised, so that shares can follow one another.
void share_maximum(nb::handle scores_, i64 at, i64 keys, nb::handle k_scale_, nb::handle table_, nb::handle out_) {
    Buffer<const int32_t> scores(scores_.ptr(), "scores", 3);
    Source<float> k_scale(k_scale_, table_, "k_scale", false, keys);
    Buffer<float> out(out_.ptr(), "row_max", 2);
    const i64 heads = scores.dim(0), rows = scores.dim(1), columns = scores.dim(2), group = group_of(heads, k_scale.kv_heads);
    out.shape({rows, heads});
    check_columns(columns, at, keys);
    nb::gil_scoped_release release;
    const Kernels& ks = kernels();
    parallel_for(k_scale.kv_heads, heads * rows * keys > 60000, [&](i64 kv) {
        for (i64 j = 0; j < keys; j += PAGE) {
            const i64 n = min64(PAGE, keys - j);
            const float* scale = k_scale.at(kv, j);
            for (i64 r = 0; r < group * rows; r++) {
                float* to = out.data + r % rows * heads + kv * group + r / rows;
                *to = ks.run_max(scores.data + (kv * group * rows + r) * columns + at + j, scale, n, *to);
            }
        }
    });
}

// P (or only its sums and P.g) of a share; sums are added to, so that shares can follow one another.
void share_weights(nb::handle scores_, i64 at, i64 keys, nb::handle q_scale_, nb::handle k_scale_, nb::handle g_,
                   nb::handle table_, nb::handle row_max_, nb::handle p_, nb::handle l_, nb::handle pg_) {
    Buffer<const int32_t> scores(scores_.ptr(), "scores", 3);
    Buffer<const float> q_scale(q_scale_.ptr(), "q_scale", 2), row_max(row_max_.ptr(), "row_max", 2);
    Source<float> k_scale(k_scale_, table_, "k_scale", false, keys);
    Buffer<uint16_t> p(p_.ptr(), "p", 3, true);
    Buffer<int32_t> l(l_.ptr(), "l", 2);
    Buffer<uint64_t> pg(pg_.ptr(), "pg", 3, true);
    require(g_.is_none() == !pg.given, "an output without its input");
    std::unique_ptr<Source<uint64_t>> g;
    if (pg.given) g = std::make_unique<Source<uint64_t>>(g_, table_, "g", true, keys);
    const i64 heads = scores.dim(0), rows = scores.dim(1), columns = scores.dim(2), group = group_of(heads, k_scale.kv_heads);
    q_scale.shape({rows, heads});
    row_max.shape({rows, heads});
    p.shape({heads, rows, columns});
    l.shape({rows, heads});
    pg.shape({rows, heads, 2});
    if (g) require(g->width == 2 && g->kv_heads == k_scale.kv_heads, "g has another shape");
    check_columns(columns, at, keys);
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const Kernels& ks = kernels();
    const i64 m = group * rows, step = 16, steps = (m + step - 1) / step;
    parallel_for(k_scale.kv_heads * steps, heads * rows * keys > 30000, [&](i64 task) {
        const i64 kv = task / steps, r0 = task % steps * step, r1 = min64(m, r0 + step);
        uint64_t sums[2 * 16] = {};
        uint16_t own[16 * PAGE];
        for (i64 j = 0; j < keys; j += PAGE) {
            const i64 n = min64(PAGE, keys - j);
            const float* scale = k_scale.at(kv, j);
            uint16_t* to = p.given ? p.data + (kv * m + r0) * columns + at + j : own;
            const i64 stride = p.given ? columns : PAGE;
            for (i64 r = r0; r < r1; r++) {
                const i64 row = r % rows * heads + kv * group + r / rows;
                l.data[row] += ks.run_weigh(scores.data + (kv * m + r) * columns + at + j, scale, n, row_max.data[row],
                                            q_scale.data[row], to + (r - r0) * stride);
            }
            if (g) ks.run_project(to, stride, r1 - r0, g->at(kv, j), n, sums);
        }
        for (i64 r = r0; g && r < r1; r++) {
            uint64_t* out = pg.data + (r % rows * heads + kv * group + r / rows) * 2;
            for (int rep = 0; rep < 2; rep++) out[rep] = add_mod(out[rep], sums[2 * (r - r0) + rep]);
        }
    });
}

// pg += P.g of a share.
void share_projection(nb::handle p_, i64 at, i64 keys, nb::handle g_, nb::handle table_, nb::handle pg_) {
    Buffer<const uint16_t> p(p_.ptr(), "p", 3);
    Source<uint64_t> g(g_, table_, "g", true, keys);
    Buffer<uint64_t> pg(pg_.ptr(), "pg", 3);
    const i64 heads = p.dim(0), rows = p.dim(1), columns = p.dim(2), group = group_of(heads, g.kv_heads);
    require(g.width == 2, "g has another shape");
    pg.shape({rows, heads, 2});
    check_columns(columns, at, keys);
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const i64 m = group * rows, step = 16, steps = (m + step - 1) / step;
    parallel_for(g.kv_heads * steps, heads * rows * keys > 30000, [&](i64 task) {
        const i64 kv = task / steps, r0 = task % steps * step, r1 = min64(m, r0 + step);
        uint64_t sums[2 * 16] = {};
        for (i64 j = 0; j < keys; j += PAGE) {
            const i64 n = min64(PAGE, keys - j);
            kernels().run_project(p.data + (kv * m + r0) * columns + at + j, columns, r1 - r0, g.at(kv, j), n, sums);
        }
        for (i64 r = r0; r < r1; r++) {
            uint64_t* out = pg.data + (r % rows * heads + kv * group + r / rows) * 2;
            for (int rep = 0; rep < 2; rep++) out[rep] = add_mod(out[rep], sums[2 * (r - r0) + rep]);
        }
    });
}

// o += P V of a share.
void share_outputs(nb::handle p_, i64 at, i64 keys, nb::handle v_, nb::handle table_, nb::handle o_) {
    Buffer<const uint16_t> p(p_.ptr(), "p", 3);
    Source<int8_t> v(v_, table_, "v", true, keys);
    Buffer<int64_t> o(o_.ptr(), "o", 3);
    const i64 heads = p.dim(0), rows = p.dim(1), columns = p.dim(2), d = v.width, group = group_of(heads, v.kv_heads);
    o.shape({rows, heads, d});
    check_columns(columns, at, keys);
    if (rows == 0) return;
    nb::gil_scoped_release release;
    const i64 m = group * rows, step = 64, steps = (m + step - 1) / step;
    parallel_for(v.kv_heads * steps, heads * rows * keys * d > 300000, [&](i64 task) {
        const i64 kv = task / steps, r0 = task % steps * step, count = min64(step, m - r0);
        int64_t* sums = (int64_t*)scratch(S_ROW, sizeof(int64_t) * (size_t)(count * d));
        memset(sums, 0, sizeof(int64_t) * (size_t)(count * d));
        for (i64 j = 0; j < keys; j += PAGE)
            kernels().run_values(p.data + (kv * m + r0) * columns + at + j, columns, count, v.at(kv, j),
                                 v.at(kv, j + PAGE < keys ? j + PAGE : j), min64(PAGE, keys - j), d, sums);
        for (i64 r = r0; r < r0 + count; r++) {
            int64_t* out = o.data + (r % rows * heads + kv * group + r / rows) * d;
            for (i64 c = 0; c < d; c++) out[c] += sums[(r - r0) * d + c];
        }
    });
}

}  // namespace

void bind_share(nb::module_& m) {
    m.def("share_scores", &share_scores, nb::arg("q"), nb::arg("k"), nb::arg("block_table").none(), nb::arg("keys"),
          nb::arg("scores"), nb::arg("at"), nb::arg("first_kv"), nb::arg("num_kv"));
    m.def("share_maximum", &share_maximum, nb::arg("scores"), nb::arg("at"), nb::arg("keys"), nb::arg("k_scale"),
          nb::arg("block_table").none(), nb::arg("row_max"));
    m.def("share_weights", &share_weights, nb::arg("scores"), nb::arg("at"), nb::arg("keys"), nb::arg("q_scale"),
          nb::arg("k_scale"), nb::arg("g").none(), nb::arg("block_table").none(), nb::arg("row_max"), nb::arg("p").none(),
          nb::arg("l"), nb::arg("pg").none());
    m.def("share_projection", &share_projection, nb::arg("p"), nb::arg("at"), nb::arg("keys"), nb::arg("g"),
          nb::arg("block_table").none(), nb::arg("pg"));
    m.def("share_outputs", &share_outputs, nb::arg("p"), nb::arg("at"), nb::arg("keys"), nb::arg("v"),
          nb::arg("block_table").none(), nb::arg("o"));
}

}  // namespace va
