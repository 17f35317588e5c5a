#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

namespace fastattn {
namespace {

constexpr int kSlots = 16;
constexpr int64_t kAlignment = 64;

struct ScratchBuffers {
  void* data[kSlots] = {};
  int64_t bytes[kSlots] = {};

  ~ScratchBuffers() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void* thread_scratch_bytes(int slot, int64_t bytes) {
  thread_local ScratchBuffers buffers;
  if (buffers.bytes[slot] < bytes || buffers.data[slot] == nullptr) {
    std::free(buffers.data[slot]);
    buffers.bytes[slot] = 0;
    const int64_t rounded = (bytes / kAlignment + 1) * kAlignment;
    buffers.data[slot] = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
    if (buffers.data[slot] == nullptr) throw std::bad_alloc();
    buffers.bytes[slot] = rounded;
  }
  return buffers.data[slot];
}

namespace cpu {

const KernelTable& kernels() {
  static const KernelTable& table = []() -> const KernelTable& {
    const char* isa = selected_isa();
#ifdef FASTATTN_HAVE_AVX512
    if (std::strcmp(isa, "avx512") == 0) return avx512::kTable;
#endif
#ifdef FASTATTN_HAVE_AVX2
    if (std::strcmp(isa, "avx2") == 0) return avx2::kTable;
#endif
    return generic::kTable;
  }();
  return table;
}

}  // namespace cpu
}  // namespace fastattn
