#pragma once

#include <string>
#include <vector>

namespace fastattn::cpu {

// The SIMD extensions of this processor that the kernels know of.
std::vector<std::string> features();

// The kernel set in use: the best one that was built and runs here, or the one FASTATTN_CPU_ISA
// names. Throws std::runtime_error when that name is unknown, was not built, or cannot run on this
// processor.
const char* selected_isa();

}  // namespace fastattn::cpu
