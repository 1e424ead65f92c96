// A whole decoder layer in one call, as spec/forward.py writes it: computed here (LocalLayer), or replayed over claims
// that are checked on the way (CheckedLayer). Both are the kernels of single operations, in the same order.
#include "module_layer.h"

#include <utility>
#include <vector>

#include "run.h"

namespace nb = nanobind;

namespace va {
namespace {

PyObject* item(const nb::tuple& t, size_t i, size_t count) {
    require(t.size() == count, "a tuple of another length");
    return t[i].ptr();
}

// The layer's public tensors and sizes. Holds the arrays while it lives.
class Layer {
  public:
    // tensors: qkv_scale, o_scale, gate_up_scale, down_scale, v_scale, and bias, k_center, q_norm, k_norm or None.
    Layer(i64 hidden, i64 heads, i64 kv_heads, i64 d, i64 inter, float eps, float q_const, nb::tuple tensors)
        : hidden(hidden), heads(heads), kv_heads(kv_heads), d(d), inter(inter), cols((heads + 2 * kv_heads) * d), eps(eps),
          q_const(q_const), qkv_scale(item(tensors, 0, 9), "qkv_scale", 1), o_scale(item(tensors, 1, 9), "o_scale", 1),
          gate_up_scale(item(tensors, 2, 9), "gate_up_scale", 1), down_scale(item(tensors, 3, 9), "down_scale", 1),
          v_scale(item(tensors, 4, 9), "v_scale", 1), bias(item(tensors, 5, 9), "bias", 1, true),
          k_center(item(tensors, 6, 9), "k_center", 2, true), q_norm(item(tensors, 7, 9), "q_norm", 1, true),
          k_norm(item(tensors, 8, 9), "k_norm", 1, true) {
        require(heads >= 1 && kv_heads >= 1 && heads < 65536 && kv_heads <= heads && heads % kv_heads == 0,
                "heads do not divide into groups");
        require(d >= 1 && d <= 65536 && hidden >= 1 && hidden <= MAX_IN && inter >= 1 && inter <= MAX_IN && heads * d <= MAX_IN,
                "sizes of a layer out of range");
        qkv_scale.shape({cols});
        o_scale.shape({hidden});
        gate_up_scale.shape({2 * inter});
        down_scale.shape({hidden});
        v_scale.shape({kv_heads});
        bias.shape({cols});
        k_center.shape({kv_heads, d});
        q_norm.shape({d});
        k_norm.shape({d});
        require(q_norm.given == k_norm.given, "q_norm and k_norm come together");
    }

    const i64 hidden, heads, kv_heads, d, inter, cols;
    const float eps, q_const;
    const Buffer<const float> qkv_scale, o_scale, gate_up_scale, down_scale, v_scale, bias, k_center, q_norm, k_norm;
};

// One run of new tokens of a sequence: rows [row, row + tokens) sit at positions start, start + 1, ...
struct Run {
    i64 row, start, tokens;
    const int32_t* table;
};

// What a call brings besides claims: inputs, the batch and the pages of this layer.
class Call {
  public:
    Call(const Layer& layer, nb::handle x_, nb::handle cos_, nb::handle sin_, nb::handle runs_, nb::list tables_, nb::handle k_,
         nb::handle k_scale_, nb::handle out_)
        : x(x_.ptr(), "x", 2), cos(cos_.ptr(), "cos", 2), sin(sin_.ptr(), "sin", 2), out(out_.ptr(), "out", 2),
          k(k_.ptr(), "k_pages", 4), k_scale(k_scale_.ptr(), "k_scale_pages", 3), rows(x.dim(0)), half(cos.dim(1)),
          pages(k.dim(0)) {
        const Buffer<const int64_t> batch(runs_.ptr(), "runs", 2);
        const i64 n = batch.dim(0);
        require(rows >= 1 && rows <= MAX_KEYS && n >= 1, "a batch has no tokens or too many");
        x.shape({rows, layer.hidden});
        out.shape({rows, layer.hidden});
        require(2 * half <= layer.d, "the rotary table is wider than a head");
        cos.shape({rows, half});
        sin.shape({rows, half});
        k.shape({pages, layer.kv_heads, PAGE, layer.d});
        k_scale.shape({pages, layer.kv_heads, PAGE});
        batch.shape({n, 2});
        require((i64)tables_.size() == n, "one block table for each run");
        i64 row = 0;
        for (i64 i = 0; i < n; i++) {
            const i64 start = batch.data[2 * i], tokens = batch.data[2 * i + 1];
            require(start >= 0 && start <= MAX_KEYS && tokens >= 1 && tokens <= rows - row && start + tokens <= MAX_KEYS,
                    "a run is out of range");
            tables_held.emplace_back(new Buffer<const int32_t>(tables_[(size_t)i].ptr(), "block_table", 1));
            const Buffer<const int32_t>& table = *tables_held.back();
            const i64 used = (start + tokens + PAGE - 1) / PAGE;
            require(table.dim(0) >= used, "the block table is shorter than the sequence");
            for (i64 p = 0; p < used; p++)
                require(table.data[p] >= 0 && table.data[p] < pages, "the block table points outside the cache");
            runs.push_back({row, start, tokens, table.data});
            row += tokens;
        }
        require(row == rows, "runs and rows do not match");
    }

    const Buffer<const float> x, cos, sin;
    const Buffer<float> out;
    const Buffer<int8_t> k;
    const Buffer<float> k_scale;
    const i64 rows, half, pages;
    std::vector<Run> runs;

  private:
    std::vector<std::unique_ptr<Buffer<const int32_t>>> tables_held;
};

// Activations between the operations; one block of the thread's work space.
struct Work {
    int8_t *a, *q, *k, *v;
    float *a_scale, *mlp_scale, *q_scale, *k_scale, *x;
    int32_t *qkv, *o, *gate_up, *down, *row_sum;
    int64_t* attention;
    uint64_t *g, *pg, *got;

    // With a null base only the size is computed.
    size_t place(const Layer& s, i64 t, char* base) {
        size_t at = 0;
        auto take = [&](auto*& p, i64 count) {
            p = base ? reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + at) : nullptr;
            at += ((size_t)count * sizeof(*p) + 63) / 64 * 64;
        };
        const i64 widest = s.heads * s.d > s.hidden ? s.heads * s.d : s.hidden;
        take(a, t * (widest > s.inter ? widest : s.inter));
        take(q, t * s.heads * s.d);
        take(k, t * s.kv_heads * s.d);
        take(v, t * s.kv_heads * s.d);
        take(a_scale, t);
        take(mlp_scale, t);
        take(q_scale, t * s.heads);
        take(k_scale, t * s.kv_heads);
        take(x, t * s.hidden);
        take(qkv, t * s.cols);
        take(o, t * s.hidden);
        take(gate_up, t * 2 * s.inter);
        take(down, t * s.hidden);
        take(row_sum, t * s.heads);
        take(attention, t * s.heads * s.d);
        take(g, t * s.kv_heads * 2);
        take(pg, t * s.heads * 2);
        take(got, t * s.heads * 2);
        return at;
    }

    Work(const Layer& s, i64 t) { place(s, t, static_cast<char*>(scratch(S_LAYER, place(s, t, nullptr)))); }
};

// --- elementwise, as spec/forward.py orders it; false outside the domain of the canonical function ----------------

bool norm_rows(const Layer& s, const float* x, i64 t, const Work& w) {
    return all_rows(t, s.hidden, [&](i64 t0, i64 t1) { return kernels().norm_quantise(x, t0, t1, s.hidden, s.eps, w.a, w.a_scale); });
}

bool qkv_rows(const Layer& s, const Call& c, const int32_t* y, const Work& w) {
    const QkvArgs args{y, w.a_scale, s.qkv_scale.data, s.bias.data, c.cos.data, c.sin.data, s.v_scale.data,
                       s.k_center.data, s.q_norm.data, s.k_norm.data, s.eps, s.q_const, s.heads, s.kv_heads, s.d, c.half,
                       w.q, w.q_scale, w.k, w.k_scale, w.v};
    return all_rows(c.rows, 4 * s.cols, [&](i64 t0, i64 t1) { return kernels().qkv_epilogue(args, t0, t1); });
}

bool attention_rows(const Layer& s, const int64_t* o, i64 t, const Work& w) {
    return all_rows(t, 2 * s.heads * s.d, [&](i64 t0, i64 t1) {
        return kernels().attention_epilogue(o, w.row_sum, s.v_scale.data, s.heads, s.kv_heads, s.d, t0, t1, w.a, w.a_scale);
    });
}

bool mlp_rows(const Layer& s, const int32_t* y, i64 t, const Work& w) {
    return all_rows(t, 6 * s.inter, [&](i64 t0, i64 t1) {
        return kernels().mlp_epilogue(y, w.a_scale, s.gate_up_scale.data, s.inter, t0, t1, w.a, w.mlp_scale);
    });
}

void residual_rows(const Layer& s, const float* x, const int32_t* y, const float* a_scale, const Buffer<const float>& w_scale,
                   i64 t, float* out) {
    over_rows(t, s.hidden, [&](i64 t0, i64 t1) {
        kernels().dequantise(x, y, a_scale, w_scale.data, nullptr, s.hidden, t0, t1, out);
    });
}

// Stores a run's values of one field, (tokens, kv_heads, width), in its pages.
template <class T>
void store(const Layer& s, const Run& run, const T* values, T* pages, i64 width) {
    for (i64 i = 0; i < run.tokens; i++) {
        const i64 at = run.start + i;
        for (i64 kv = 0; kv < s.kv_heads; kv++)
            memcpy(pages + (((i64)run.table[at / PAGE] * s.kv_heads + kv) * PAGE + at % PAGE) * width,
                   values + ((run.row + i) * s.kv_heads + kv) * width, sizeof(T) * (size_t)width);
    }
}

// Attention of every run over the layer's pages; with v_pages outputs O, with g_pages projections P.g.
void attention_runs(const Layer& s, const Call& c, const Work& w, const int8_t* v_pages, const uint64_t* g_pages, int64_t* o) {
    i64 scores = 0;
    for (const Run& run : c.runs) scores += run.tokens * (run.start + run.tokens) * s.heads;
    auto one = [&](i64 i) {
        const Run& r = c.runs[(size_t)i];
        const i64 row = r.row * s.heads;
        run_attention({w.q + row * s.d, w.q_scale + row, c.k.data, c.k_scale.data, v_pages, g_pages, r.table, r.tokens, s.heads,
                       s.kv_heads, s.d, r.start, v_pages ? o + row * s.d : nullptr, w.row_sum + row,
                       g_pages ? w.pg + row * 2 : nullptr, nullptr, nullptr, nullptr});
    };
    const i64 n = (i64)c.runs.size();
    if (n == 1)
        one(0);
    else
        parallel_for(n, scores * s.d > 500000, std::move(one));
}

// --- computed here ---------------------------------------------------------------------------------------------------

class LocalLayer : public Layer {
  public:
    template <class... Args>
    LocalLayer(const PackedLinear* qkv, const PackedLinear* o, const PackedLinear* gate_up, const PackedLinear* down, Args... args)
        : Layer(args...), w_qkv(qkv), w_o(o), w_gate_up(gate_up), w_down(down) {
        require(qkv->outputs() == cols && qkv->inputs() == hidden && o->outputs() == hidden && o->inputs() == heads * d &&
                    gate_up->outputs() == 2 * inter && gate_up->inputs() == hidden && down->outputs() == hidden &&
                    down->inputs() == inter,
                "the weights are not those of such a layer");
    }

    // Returns false outside the domain of the canonical function. Claims may be None each; they hold
    // what was computed even where false is returned, so that whoever checks them finds the same fault.
    bool run(nb::handle x_, nb::handle cos_, nb::handle sin_, nb::handle runs_, nb::list tables_, nb::handle k_, nb::handle k_scale_,
             nb::handle v_, nb::handle out_, nb::tuple claims) const {
        const Call c(*this, x_, cos_, sin_, runs_, tables_, k_, k_scale_, out_);
        const Buffer<int8_t> v(v_.ptr(), "v_pages", 4);
        v.shape({c.pages, kv_heads, PAGE, d});
        const i64 t = c.rows;
        const Buffer<int32_t> qkv(item(claims, 0, 5), "qkv", 2, true), o(item(claims, 2, 5), "o", 2, true),
            gate_up(item(claims, 3, 5), "gate_up", 2, true), down(item(claims, 4, 5), "down", 2, true);
        const Buffer<int64_t> attention(item(claims, 1, 5), "attention", 3, true);
        qkv.shape({t, cols});
        attention.shape({t, heads, d});
        o.shape({t, hidden});
        gate_up.shape({t, 2 * inter});
        down.shape({t, hidden});
        for (const PackedLinear* linear : {w_qkv, w_o, w_gate_up, w_down}) linear->ready();
        nb::gil_scoped_release release;
        Work w(*this, t);
        if (qkv.given) w.qkv = qkv.data;
        if (attention.given) w.attention = attention.data;
        if (o.given) w.o = o.data;
        if (gate_up.given) w.gate_up = gate_up.data;
        if (down.given) w.down = down.data;
        bool ok = norm_rows(*this, c.x.data, t, w);
        w_qkv->multiply(w.a, t, w.qkv);
        ok &= qkv_rows(*this, c, w.qkv, w);
        for (const Run& run : c.runs) {
            store(*this, run, w.k, c.k.data, d);
            store(*this, run, w.k_scale, c.k_scale.data, 1);
            store(*this, run, w.v, v.data, d);
        }
        attention_runs(*this, c, w, v.data, nullptr, w.attention);
        ok &= attention_rows(*this, w.attention, t, w);
        w_o->multiply(w.a, t, w.o);
        residual_rows(*this, c.x.data, w.o, w.a_scale, o_scale, t, w.x);
        ok &= norm_rows(*this, w.x, t, w);
        w_gate_up->multiply(w.a, t, w.gate_up);
        ok &= mlp_rows(*this, w.gate_up, t, w);
        w_down->multiply(w.a, t, w.down);
        residual_rows(*this, w.x, w.down, w.mlp_scale, down_scale, t, c.out.data);
        return ok;
    }

  private:
    const PackedLinear *const w_qkv, *const w_o, *const w_gate_up, *const w_down;
};

// --- replayed over claims ----------------------------------------------------------------------------------------------

// Challenges of one linear: r (2, out) and u = W^T r (2, in).
struct Challenge {
    Challenge(nb::handle r_, nb::handle u_, i64 outputs, i64 inputs) : r(r_.ptr(), "r", 2), u(u_.ptr(), "u", 2), n(outputs), k(inputs) {
        r.shape({2, n});
        u.shape({2, k});
    }

    // The first wrong row of claimed y (t, out), or -1.
    i64 first_wrong(const int32_t* y, const int8_t* a, i64 t, uint8_t* ok) const {
        check_rows(y, n, r.data, a, k, u.data, t, nullptr, ok);
        for (i64 i = 0; i < t; i++)
            if (!ok[i]) return i;
        return -1;
    }

    const Buffer<const uint64_t> r, u;
    const i64 n, k;
};

// What CheckedLayer::run found first; veriattn.native.layers names them.
enum Finding { RIGHT = 0, OUT_OF_DOMAIN, WRONG_QKV, WRONG_O, WRONG_GATE_UP, WRONG_DOWN, OUTPUT_TOO_LARGE, WRONG_OUTPUT };

class CheckedLayer : public Layer {
  public:
    template <class... Args>
    CheckedLayer(nb::handle r_qkv, nb::handle u_qkv, nb::handle r_o, nb::handle u_o, nb::handle r_gate_up, nb::handle u_gate_up,
                 nb::handle r_down, nb::handle u_down, nb::handle w_, Args... args)
        : Layer(args...), of_qkv(r_qkv, u_qkv, cols, hidden), of_o(r_o, u_o, hidden, heads * d),
          of_gate_up(r_gate_up, u_gate_up, 2 * inter, hidden), of_down(r_down, u_down, hidden, inter), w_values(w_.ptr(), "w", 3) {
        w_values.shape({kv_heads, 2, d});
    }

    // Claims lie in private memory, where only we write: they are checked and used from there. Returns (finding, row, head);
    // nothing after the first finding is looked at. rows_ok: which rows of the linear checked last are right.
    nb::tuple run(nb::handle x_, nb::handle cos_, nb::handle sin_, nb::handle runs_, nb::list tables_, nb::handle k_,
                  nb::handle k_scale_, nb::handle g_, nb::handle out_, nb::tuple claims, nb::handle ok_) const {
        const Call c(*this, x_, cos_, sin_, runs_, tables_, k_, k_scale_, out_);
        const i64 t = c.rows;
        const Buffer<uint64_t> g(g_.ptr(), "g_pages", 4);
        const Buffer<const int32_t> qkv(item(claims, 0, 5), "qkv", 2), o(item(claims, 2, 5), "o", 2),
            gate_up(item(claims, 3, 5), "gate_up", 2), down(item(claims, 4, 5), "down", 2);
        const Buffer<const int64_t> attention(item(claims, 1, 5), "attention", 3);
        const Buffer<uint8_t> ok(ok_.ptr(), "rows_ok", 1);
        ok.shape({t});
        g.shape({c.pages, kv_heads, PAGE, 2});
        qkv.shape({t, cols});
        attention.shape({t, heads, d});
        o.shape({t, hidden});
        gate_up.shape({t, 2 * inter});
        down.shape({t, hidden});
        Found found;
        {
            nb::gil_scoped_release release;
            found = check(c, g.data, qkv.data, attention.data, o.data, gate_up.data, down.data, ok.data);
        }
        return nb::make_tuple((int)found.what, found.row, found.head);
    }

  private:
    struct Found {
        Finding what = RIGHT;
        i64 row = 0, head = 0;
    };

    Found check(const Call& c, uint64_t* g_pages, const int32_t* qkv, const int64_t* attention, const int32_t* o,
                const int32_t* gate_up, const int32_t* down, uint8_t* ok) const {
        const i64 t = c.rows;
        const Work w(*this, t);
        i64 row;
        if (!norm_rows(*this, c.x.data, t, w)) return {OUT_OF_DOMAIN};
        if ((row = of_qkv.first_wrong(qkv, w.a, t, ok)) >= 0) return {WRONG_QKV, row};
        if (!qkv_rows(*this, c, qkv, w)) return {OUT_OF_DOMAIN};
        over_rows(t, kv_heads * d, [&](i64 t0, i64 t1) {
            for (i64 kv = 0; kv < kv_heads; kv++)
                kernels().dot_i8(w.v + kv * d, kv_heads * d, d, w_values.data + kv * 2 * d, t0, t1, w.g + kv * 2, kv_heads * 2);
        });
        for (const Run& run : c.runs) {
            store(*this, run, w.k, c.k.data, d);
            store(*this, run, w.k_scale, c.k_scale.data, 1);
            store(*this, run, w.g, g_pages, 2);
        }
        attention_runs(*this, c, w, nullptr, g_pages, nullptr);
        const Found found = check_outputs(c, w, attention);
        if (found.what != RIGHT) return found;
        if (!attention_rows(*this, attention, t, w)) return {OUT_OF_DOMAIN};
        if ((row = of_o.first_wrong(o, w.a, t, ok)) >= 0) return {WRONG_O, row};
        residual_rows(*this, c.x.data, o, w.a_scale, o_scale, t, w.x);
        if (!norm_rows(*this, w.x, t, w)) return {OUT_OF_DOMAIN};
        if ((row = of_gate_up.first_wrong(gate_up, w.a, t, ok)) >= 0) return {WRONG_GATE_UP, row};
        if (!mlp_rows(*this, gate_up, t, w)) return {OUT_OF_DOMAIN};
        if ((row = of_down.first_wrong(down, w.a, t, ok)) >= 0) return {WRONG_DOWN, row};
        residual_rows(*this, w.x, down, w.mlp_scale, down_scale, t, c.out.data);
        return {};
    }

    // O.w == P.g for every row and head; runs in order, the range of a whole run first.
    Found check_outputs(const Call& c, const Work& w, const int64_t* claimed) const {
        const i64 group = heads / kv_heads;
        for (const Run& run : c.runs) {
            const bool in_range = all_rows(run.tokens, heads * d, [&](i64 t0, i64 t1) {
                bool ok = true;
                for (i64 h = 0; h < heads; h++)
                    ok &= kernels().dot_i64(claimed + h * d, heads * d, d, w_values.data + h / group * 2 * d, run.row + t0, run.row + t1,
                                            w.got + h * 2, heads * 2);
                return ok;
            });
            if (!in_range) return {OUTPUT_TOO_LARGE, run.row};
            for (i64 i = run.row * heads; i < (run.row + run.tokens) * heads; i++)
                if (w.got[2 * i] != w.pg[2 * i] || w.got[2 * i + 1] != w.pg[2 * i + 1]) return {WRONG_OUTPUT, i / heads, i % heads};
        }
        return {};
    }

    const Challenge of_qkv, of_o, of_gate_up, of_down;
    const Buffer<const uint64_t> w_values;
};

}  // namespace

void bind_layer(nb::module_& m) {
    typedef nb::handle H;
#define VA_LAYER i64, i64, i64, i64, i64, float, float, nb::tuple
    nb::class_<LocalLayer>(m, "LocalLayer")
        .def(nb::init<const PackedLinear*, const PackedLinear*, const PackedLinear*, const PackedLinear*, VA_LAYER>(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
        .def("run", &LocalLayer::run);
    nb::class_<CheckedLayer>(m, "CheckedLayer")
        .def(nb::init<H, H, H, H, H, H, H, H, H, VA_LAYER>())
        .def("run", &CheckedLayer::run);
#undef VA_LAYER
}

}  // namespace va
