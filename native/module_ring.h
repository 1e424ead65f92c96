// Bindings of the shared rings' fast path.
#pragma once
#include <nanobind/nanobind.h>

namespace va {
void bind_ring(nanobind::module_& m);
}  // namespace va
