// True where a table's integer products and attention return the portable kernels' bits on a fixed sample.
#pragma once
#include "common.h"

namespace va {

bool self_test(const Kernels& k);

}  // namespace va
