// Loops over a whole operation, split over the pool; shared by the bindings of single operations and of whole layers.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include <nanobind/nanobind.h>

#include "buffer.h"
#include "dispatch.h"
#include "pack.h"
#include "threads.h"

namespace va {

static const i64 MAX_IN = 131071, MAX_KEYS = 131072, MAX_DIM = (i64)1 << 31;

static inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// Rows per task: enough tasks to even out, none so small that handing it out costs more than it does.
static inline i64 rows_per_task(i64 rows, i64 row_cost) {
    const i64 even = (rows + 4 * get_threads() - 1) / (4 * get_threads()), least = 1 + 20000 / (row_cost + 1);
    return even > least ? even : least;
}

template <class F>
void over_rows(i64 rows, i64 row_cost, F&& f) {
    i64 step = rows_per_task(rows, row_cost);
    parallel_for((rows + step - 1) / step, rows * row_cost > 60000,
                 [&](i64 i) { f(i * step, min64(rows, (i + 1) * step)); });
}

template <class F>
bool all_rows(i64 rows, i64 row_cost, F&& f) {
    std::atomic<bool> ok{true};
    over_rows(rows, row_cost, [&](i64 t0, i64 t1) {
        if (!f(t0, t1)) ok = false;
    });
    return ok;
}

// --- linear ---

static inline void run_gemm(const Kernels& ks, const uint8_t* packed, i64 n, i64 k, const int8_t* a, i64 m, int32_t* y) {
    // Columns are split in multiples of 64; a task keeps its weights in cache while all rows pass.
    const i64 blocks = (n + 63) / 64, threads = get_threads();
    i64 per = blocks / (threads * 4);
    per = per < 1 ? 1 : per;
    parallel_for((blocks + per - 1) / per, m * n * k > 200000, [&](i64 i) {
        ks.gemm(packed, n, k, a, m, i * per * 64, min64(n, (i + 1) * per * 64), y);
    });
}

class PackedLinear {
  public:
    explicit PackedLinear(nanobind::handle w_) : format_(kernels().format) {
        Buffer<const int8_t> w(w_.ptr(), "w", 2);
        n_ = w.dim(0);
        k_ = w.dim(1);
        require(k_ <= MAX_IN && n_ <= MAX_DIM, "more than 131071 input features");
        bytes_ = packed_bytes(format_, n_, k_);
        data_.reset(static_cast<uint8_t*>(aligned_alloc(64, (bytes_ + 63) / 64 * 64 + 64)));
        if (!data_) throw std::bad_alloc();
        nanobind::gil_scoped_release release;
        const i64 blocks = (n_ + 63) / 64;
        parallel_for(blocks, bytes_ > 100000, [&](i64 i) {
            pack_rows(format_, w.data, n_, k_, i * 64, min64(n_, i * 64 + 64), data_.get());
        });
    }

    // y = a @ w.T for m rows of a (m, in); call without the GIL. `ready()` first.
    void multiply(const int8_t* a, i64 m, int32_t* y) const { run_gemm(kernels(), data_.get(), n_, k_, a, m, y); }

    // Refuses weights that are laid out for another instruction set than the active one.
    void ready() const { require(kernels().format == format_, "the weights were packed for another instruction set"); }

    i64 outputs() const { return n_; }
    i64 inputs() const { return k_; }
    size_t nbytes() const { return bytes_; }

  private:
    struct Free {
        void operator()(uint8_t* p) const { free(p); }
    };
    Format format_;
    i64 n_, k_;
    size_t bytes_;
    std::unique_ptr<uint8_t, Free> data_;
};

// --- attention ---

static inline void run_attention(AttentionArgs s) {
    const Kernels& ks = kernels();
    const i64 t = s.tokens, tile = ks.tile_queries(s), tiles = (t + tile - 1) / tile, used = (s.start + t + PAGE - 1) / PAGE;
    const bool big = t * s.heads * (s.start + t) * s.d > 1000000;
    const size_t prepared = ks.prepare_bytes(s);
    s.prepared = prepared ? scratch(S_PREPARE, prepared * (size_t)s.kv_heads) : nullptr;
    if (prepared) parallel_for(s.kv_heads * used, big, [&](i64 i) { ks.prepare(s, i / used, i % used, i % used + 1); });
    // The last tiles see the most keys: they go first, and the short ones fill the gaps.
    parallel_for(s.kv_heads * tiles, big, [&](i64 i) {
        const i64 at = tiles - 1 - i / s.kv_heads;
        ks.attention(s, i % s.kv_heads, at * tile, min64(t, (at + 1) * tile));
    });
}

// --- field ---

// ok[i] = whether row i of y (t, n) is a (t, k) times the weights behind r (2, n) and u (2, k), but for p**-2. Each y is
// loaded once; with `copy`, that value is stored there.
static inline void check_rows(const int32_t* y, i64 n, const uint64_t* r, const int8_t* a, i64 k, const uint64_t* u, i64 t,
                              int32_t* copy, uint8_t* ok) {
    over_rows(t, n + k, [&](i64 t0, i64 t1) {
        const i64 m = t1 - t0;
        uint64_t* left = (uint64_t*)scratch(S_ROW, sizeof(uint64_t) * (size_t)(4 * m));
        uint64_t* right = left + 2 * m;
        kernels().dot_i32(y + t0 * n, n, r, 0, m, copy ? copy + t0 * n : nullptr, left);
        kernels().dot_i8(a + t0 * k, k, k, u, 0, m, right, 2);
        for (i64 i = 0; i < m; i++)
            ok[t0 + i] = (left[2 * i] == right[2 * i]) & (left[2 * i + 1] == right[2 * i + 1]);
    });
}

}  // namespace va
