// The kernels in portable C++: the baseline of every machine, and what the others are tested against.
#include "common.h"

#define VA_NS portable
#define VA_LANES 4
#include "elementwise.inc"
#include "generic.inc"

namespace va {

const int32_t LUT15[64] = {
    32672, 32320, 31972, 31628, 31287, 30950, 30617, 30287, 29961, 29638, 29319, 29003, 28690, 28381, 28076, 27773,
    27474, 27178, 26885, 26596, 26309, 26026, 25745, 25468, 25194, 24922, 24654, 24388, 24126, 23866, 23609, 23354,
    23103, 22854, 22608, 22364, 22123, 21885, 21649, 21416, 21185, 20957, 20731, 20508, 20287, 20069, 19852, 19639,
    19427, 19218, 19011, 18806, 18603, 18403, 18205, 18009, 17815, 17623, 17433, 17245, 17059, 16876, 16694, 16514,
};

const Kernels portable_kernels = {
    portable::norm_quantise, portable::quantise, portable::qkv_epilogue, portable::attention_epilogue,
    portable::mlp_epilogue, portable::dequantise, ROWS, portable::gemm, portable::prepare_bytes, portable::prepare,
    portable::tile_queries, portable::attention, portable::transfer, portable::attention_weights, portable::run_scores, portable::run_max, portable::run_weigh,
    portable::run_project, portable::run_values, portable::dot_i32, portable::dot_i8,
    portable::dot_i64, portable::project, nullptr,
};

}  // namespace va
