// The log-product of floating-point attention weights (veriattn.floatmode). Not canonical: nothing exact uses it.
#include "module_float.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "threads.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define VA_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VA_CLONES
#endif

namespace nb = nanobind;

namespace va {
namespace {

const i64 MAX_KEYS = 131072, MAX_COEFFICIENT = 4096, LANES = 512;
const uint32_t ONE = 0x3F800000, MANTISSA = 0x007FFFFF, TINY = 0x00800000, ABOVE = 0x7F000000;

// Of one set of equal coefficients: product of mantissas m * 2^(its exponents); `odd` is the largest bits - TINY seen.
struct Lanes {
    float m[LANES];
    int32_t exponent[LANES];
    uint32_t odd[LANES];
};

inline float mantissa(uint32_t bits) {
    const uint32_t b = (bits & MANTISSA) | ONE;
    float f;
    memcpy(&f, &b, 4);
    return f;
}

inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Four rows that every column sees.
VA_CLONES void multiply4(const uint32_t* a, const uint32_t* b, const uint32_t* c, const uint32_t* d, i64 n, Lanes& to) {
    for (i64 i = 0; i < n; i++) {
        to.m[i] *= (mantissa(a[i]) * mantissa(b[i])) * (mantissa(c[i]) * mantissa(d[i]));
        to.exponent[i] += (int32_t)(a[i] >> 23) + (int32_t)(b[i] >> 23) + (int32_t)(c[i] >> 23) + (int32_t)(d[i] >> 23);
        to.odd[i] = larger(to.odd[i], larger(larger(a[i] - TINY, b[i] - TINY), larger(c[i] - TINY, d[i] - TINY)));
    }
}

// One row; columns that do not see it take it as 1.
VA_CLONES void multiply1(const uint32_t* a, int32_t key, const int32_t* visible, i64 n, Lanes& to) {
    for (i64 i = 0; i < n; i++) {
        const uint32_t bits = key < visible[i] ? a[i] : ONE;
        to.m[i] *= mantissa(bits);
        to.exponent[i] += (int32_t)(bits >> 23);
        to.odd[i] = larger(to.odd[i], bits - TINY);
    }
}

VA_CLONES void renormalise(i64 n, Lanes& lanes) {
    for (i64 i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &lanes.m[i], 4);
        lanes.exponent[i] += (int32_t)(bits >> 23) - 127;
        lanes.m[i] = mantissa(bits);
    }
}

// A double's exponent is taken off it. Its value is normal and positive.
inline int64_t take_exponent(double& x) {
    uint64_t bits;
    memcpy(&bits, &x, 8);
    const int64_t e = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    memcpy(&x, &bits, 8);
    return e;
}

// y (keys, columns), a (keys,) in 1 .. 4096, visible (columns,): keys that a column sees -> log prod y^a (columns,).
void float_log_product(nb::handle y_, nb::handle a_, nb::handle visible_, nb::handle out_) {
    Buffer<const float> y(y_.ptr(), "y", 2);
    Buffer<const int32_t> a(a_.ptr(), "a", 1), visible(visible_.ptr(), "visible", 1);
    Buffer<double> out(out_.ptr(), "out", 1);
    const i64 keys = y.dim(0), columns = y.dim(1);
    if (keys > MAX_KEYS) throw std::invalid_argument("more than 131072 keys");
    a.shape({keys});
    visible.shape({columns});
    out.shape({columns});
    // Copied, so that a value cannot change between its check and its use as an index.
    const std::vector<int32_t> weight(a.data, a.data + keys);
    int32_t largest = 0;
    for (int32_t v : weight) {
        if (v < 1 || v > MAX_COEFFICIENT) throw std::invalid_argument("coefficients lie outside 1 .. 4096");
        largest = v > largest ? v : largest;
    }
    nb::gil_scoped_release release;
    std::vector<int32_t> first((size_t)largest + 2, 0), order((size_t)keys);
    for (int32_t v : weight) first[(size_t)v + 1]++;
    for (size_t v = 1; v < first.size(); v++) first[v] += first[v - 1];
    std::vector<int32_t> at(first);
    for (i64 j = 0; j < keys; j++) order[(size_t)at[(size_t)weight[(size_t)j]]++] = (int32_t)j;
    const uint32_t* bits = (const uint32_t*)y.data;
    const i64 width = columns > LANES ? LANES : columns > 64 ? (columns + 1) / 2 : columns, blocks = columns ? (columns + width - 1) / width : 0;
    parallel_for(blocks, keys * columns > 200000, [&](i64 block) {
        const i64 c0 = block * width, n = min64(width, columns - c0);
        const int32_t* sees = visible.data + c0;
        int32_t all_see = (int32_t)keys;
        for (i64 i = 0; i < n; i++) all_see = sees[i] < all_see ? sees[i] : all_see;
        Lanes lanes;
        // Powers from running products over falling coefficients: prod_v P_v^v = prod_v prod_{w >= v} P_w.
        std::vector<double> running((size_t)n, 1.0), result((size_t)n, 1.0);
        std::vector<int64_t> running_exponent((size_t)n, 0), result_exponent((size_t)n, 0);
        memset(lanes.odd, 0, sizeof(lanes.odd));
        for (int32_t v = largest; v >= 1; v--) {
            const i64 lo = first[(size_t)v], hi = first[(size_t)v + 1];
            if (lo < hi) {
                for (i64 i = 0; i < n; i++) lanes.m[i] = 1.0f, lanes.exponent[i] = 0;
                i64 j = lo, since = 0;
                while (j < hi) {
                    // The order within a set is that of the keys, so full rows come first.
                    if (j + 4 <= hi && order[(size_t)j + 3] < all_see) {
                        const uint32_t* r[4];
                        for (i64 k = 0; k < 4; k++) r[k] = bits + (i64)order[(size_t)(j + k)] * columns + c0;
                        multiply4(r[0], r[1], r[2], r[3], n, lanes);
                        j += 4, since += 4;
                    } else {
                        multiply1(bits + (i64)order[(size_t)j] * columns + c0, order[(size_t)j], sees, n, lanes);
                        j++, since++;
                    }
                    if (since >= 64) renormalise(n, lanes), since = 0;
                }
                for (i64 i = 0; i < n; i++) {
                    running[(size_t)i] *= (double)lanes.m[i];
                    running_exponent[(size_t)i] += lanes.exponent[i] - 127 * (hi - lo) + take_exponent(running[(size_t)i]);
                }
            }
            for (i64 i = 0; i < n; i++) {
                result[(size_t)i] *= running[(size_t)i];
                result_exponent[(size_t)i] += running_exponent[(size_t)i] + take_exponent(result[(size_t)i]);
            }
        }
        for (i64 i = 0; i < n; i++) {
            const double ln2 = 0.6931471805599453;
            out.data[c0 + i] = lanes.odd[i] < ABOVE ? std::log(result[(size_t)i]) + (double)result_exponent[(size_t)i] * ln2
                                                    : std::numeric_limits<double>::quiet_NaN();
        }
    });
}

}  // namespace

void bind_float(nb::module_& m) {
    m.def("float_log_product", &float_log_product);
}

}  // namespace va
