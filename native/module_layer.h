// Bindings of whole decoder layers.
#pragma once
#include <nanobind/nanobind.h>

namespace va {
void bind_layer(nanobind::module_& m);
}  // namespace va
