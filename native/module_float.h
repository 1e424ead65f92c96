// Binding of the floating-point log-product.
#pragma once
#include <nanobind/nanobind.h>

namespace va {
void bind_float(nanobind::module_& m);
}  // namespace va
