// The AMX table of kernels, and the permission it needs.
#pragma once
#include "common.h"

namespace va {
namespace amx {

bool permitted();
const Kernels& kernels();

}  // namespace amx
}  // namespace va
