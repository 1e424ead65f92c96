// Bindings of the kernels for shares of attention.
#pragma once
#include <nanobind/nanobind.h>

namespace va {
void bind_share(nanobind::module_& m);
}  // namespace va
