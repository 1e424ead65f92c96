// How weights lie in memory, per format.
#pragma once
#include "common.h"

namespace va {

size_t packed_bytes(Format format, i64 n, i64 k);

// Packs rows [n0, n1) of w (n, k); n0 is a multiple of 64, and n1 too unless it is n.
void pack_rows(Format format, const int8_t* w, i64 n, i64 k, i64 n0, i64 n1, uint8_t* out);

}  // namespace va
