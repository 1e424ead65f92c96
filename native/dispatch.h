// Which instruction sets this CPU offers, and the table of kernels in use.
#pragma once
#include <string>
#include <vector>

#include "common.h"

namespace va {

// Names of CPU and operating-system features that kernels depend on, for people.
std::vector<std::string> cpu_features();

// Usable here, slowest first; "portable" is always there.
std::vector<std::string> available_isas();

const Kernels& kernels();
const char* active_isa();

// False where the name is unknown or this machine cannot run it.
bool set_isa(const std::string& name);

}  // namespace va
