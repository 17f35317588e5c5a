#include "cpu/cpu_features.h"

#include <cstdlib>
#include <stdexcept>

namespace fastattn::cpu {
namespace {

struct Isa {
  const char* name;
  bool built;
  bool (*runs)();
};

#if defined(__x86_64__) || defined(_M_X64)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool runs_avx512bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
bool runs_avx512bf16() { return false; }
#endif

#ifdef FASTATTN_HAVE_AVX512BF16
constexpr bool kBuiltAvx512Bf16 = true;
#else
constexpr bool kBuiltAvx512Bf16 = false;
#endif
#ifdef FASTATTN_HAVE_AVX512
constexpr bool kBuiltAvx512 = true;
#else
constexpr bool kBuiltAvx512 = false;
#endif
#ifdef FASTATTN_HAVE_AVX2
constexpr bool kBuiltAvx2 = true;
#else
constexpr bool kBuiltAvx2 = false;
#endif
#ifdef FASTATTN_HAVE_EMULATED
constexpr bool kBuiltEmulated = true;
#else
constexpr bool kBuiltEmulated = false;
#endif

// Best first. The emulated one, of tests, comes after one that runs everywhere: only its name
// chooses it.
const Isa kIsas[] = {
    {"avx512bf16", kBuiltAvx512Bf16, runs_avx512bf16},
    {"avx512", kBuiltAvx512, runs_avx512},
    {"avx2", kBuiltAvx2, runs_avx2},
    {"generic", true, [] { return true; }},
    {"emulated", kBuiltEmulated, runs_avx2},
};

const char* choose() {
  const char* forced = std::getenv("FASTATTN_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    for (const Isa& isa : kIsas) {
      if (isa.built && isa.runs()) return isa.name;
    }
  }
  for (const Isa& isa : kIsas) {
    if (std::string(forced) != isa.name) continue;
    if (!isa.built)
      throw std::runtime_error("FASTATTN_CPU_ISA: '" + std::string(forced) +
                               "' is not in this build");
    if (!isa.runs()) {
      throw std::runtime_error("FASTATTN_CPU_ISA: this processor cannot run '" +
                               std::string(forced) + "'");
    }
    return isa.name;
  }
  throw std::runtime_error(
      "FASTATTN_CPU_ISA: expected one of avx512bf16, avx512, avx2, generic, got '" +
      std::string(forced) + "'");
}

}  // namespace

std::vector<std::string> features() {
  std::vector<std::string> found;
  if (runs_avx2()) found.insert(found.end(), {"avx2", "fma", "f16c"});
  if (runs_avx512()) found.insert(found.end(), {"avx512f", "avx512bw", "avx512dq", "avx512vl"});
  if (runs_avx512bf16()) found.push_back("avx512bf16");
  return found;
}

const char* selected_isa() {
  static const char* const isa = choose();
  return isa;
}

}  // namespace fastattn::cpu
