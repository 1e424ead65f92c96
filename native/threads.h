// A pool of threads for loops whose iterations write disjoint results.
#pragma once
#include "common.h"

namespace va {

void set_threads(int n);
int get_threads();

// Runs fn(ctx, i) for i in [0, n), on the pool where that is free and worth it. Every thread computes under the
// default floating-point environment, whatever the caller's is: round to nearest even, subnormals kept.
void parallel_for_raw(i64 n, bool worth_it, void (*fn)(void*, i64), void* ctx);

template <class F>
void parallel_for(i64 n, bool worth_it, F&& f) {
    parallel_for_raw(n, worth_it, [](void* c, i64 i) { (*static_cast<F*>(c))(i); }, &f);
}

// Overwrites what all threads keep between calls. No kernel may be running.
void wipe_scratch();

}  // namespace va
