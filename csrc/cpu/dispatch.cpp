// Which kernels run here: one table for each dtype, picked once.
#include <cstring>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

namespace fastattn::cpu {
namespace {

const KernelTable& table_of(const char* isa, Dtype dtype) {
#ifdef FASTATTN_HAVE_AVX512BF16
  if (std::strcmp(isa, "avx512bf16") == 0 && dtype == Dtype::kBFloat16) return avx512bf16::kTable;
#endif
#ifdef FASTATTN_HAVE_AVX512
  if (std::strncmp(isa, "avx512", 6) == 0) return avx512::kTable;
#endif
#ifdef FASTATTN_HAVE_AVX2
  if (std::strcmp(isa, "avx2") == 0) return avx2::kTable;
#endif
#ifdef FASTATTN_HAVE_EMULATED
  if (std::strcmp(isa, "emulated") == 0) return emulated::kTable;
#endif
  static_cast<void>(isa);
  static_cast<void>(dtype);
  return generic::kTable;
}

}  // namespace

const KernelTable& kernels(Dtype dtype) {
  static const KernelTable& for_bf16 = table_of(selected_isa(), Dtype::kBFloat16);
  static const KernelTable& for_others = table_of(selected_isa(), Dtype::kFloat32);
  return dtype == Dtype::kBFloat16 ? for_bf16 : for_others;
}

}  // namespace fastattn::cpu
