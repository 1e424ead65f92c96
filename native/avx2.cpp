// The portable kernels, vectorised by the compiler for AVX2 (this file alone is built with -mavx2).
#include "common.h"

#define VA_NS avx2
#define VA_LANES 8
#include "elementwise.inc"
#include "generic.inc"

namespace va {

const Kernels avx2_kernels = {
    avx2::norm_quantise, avx2::quantise, avx2::qkv_epilogue, avx2::attention_epilogue,
    avx2::mlp_epilogue, avx2::dequantise, ROWS, avx2::gemm, avx2::prepare_bytes, avx2::prepare,
    avx2::tile_queries, avx2::attention, avx2::transfer, avx2::attention_weights, avx2::weighted_values, avx2::dot_i32, avx2::dot_i8,
    avx2::dot_i64, avx2::project, nullptr,
};

}  // namespace va
