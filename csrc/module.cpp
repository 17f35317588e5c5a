// The Python module _C: facts about the build and the processor. Never on the hot path.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/cpu_features.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
#if defined(__clang__)
      {"compiler", "clang " __clang_version__},
#elif defined(__GNUC__)
      {"compiler", "gcc " __VERSION__},
#endif
      {"cplusplus", std::to_string(__cplusplus)},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and processor facts of fastattn's native library.";
  m.def("build_info", &build_info, "Compiler and language version of the native library.");
  m.def("cpu_features", &fastattn::cpu::features,
        "SIMD extensions of this processor that the kernels know of.");
  m.def("cpu_isa", &fastattn::cpu::selected_isa, "The kernel set in use on this processor.");
}
