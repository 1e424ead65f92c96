// The AVX-512 table: elementwise kernels vectorised by the compiler, the others written by hand.
#include "avx512.h"

#define VA_NS avx512
#define VA_LANES 16
#include "elementwise.inc"

namespace va {

const Kernels avx512_kernels = {
    avx512::norm_quantise, avx512::quantise, avx512::qkv_epilogue, avx512::attention_epilogue,
    avx512::mlp_epilogue, avx512::dequantise, VNNI, avx512::gemm, avx512::prepare_bytes, avx512::prepare,
    avx512::tile_queries, avx512::attention, avx512::transfer, avx512::attention_weights, avx512::run_scores, avx512::run_max, avx512::run_weigh,
    avx512::run_project, avx512::run_values, avx512::dot_i32, avx512::dot_i8,
    avx512::dot_i64, avx512::project, avx512::peak,
};

}  // namespace va
