#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/parallel.h"
#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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

ScratchBuffers& buffers_of_this_thread() {
  thread_local ScratchBuffers buffers;
  return buffers;
}

}  // namespace

void ScratchError::name(const char* op) {
  std::snprintf(text_, sizeof(text_), "fastattn%s%s: cannot allocate %lld bytes of scratch memory",
                *op == '\0' ? "" : "::", op, static_cast<long long>(bytes_));
}

void* thread_scratch_bytes(int slot, int64_t bytes) {
  ScratchBuffers& buffers = buffers_of_this_thread();
  if (buffers.bytes[slot] < bytes || buffers.data[slot] == nullptr) {
    std::free(buffers.data[slot]);
    buffers.bytes[slot] = 0;
    const int64_t rounded = (bytes / kAlignment + 1) * kAlignment;
    buffers.data[slot] = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
    if (buffers.data[slot] == nullptr) throw ScratchError(rounded);
    buffers.bytes[slot] = rounded;
  }
#if defined(__SANITIZE_ADDRESS__)
  // What an earlier call needed more is not this one's: its use is reported as well.
  char* data = static_cast<char*>(buffers.data[slot]);
  ASAN_UNPOISON_MEMORY_REGION(data, static_cast<size_t>(buffers.bytes[slot]));
  ASAN_POISON_MEMORY_REGION(data + bytes, static_cast<size_t>(buffers.bytes[slot] - bytes));
#endif
  return buffers.data[slot];
}

void free_thread_scratch(int slot) {
  ScratchBuffers& buffers = buffers_of_this_thread();
  std::free(buffers.data[slot]);
  buffers.data[slot] = nullptr;
  buffers.bytes[slot] = 0;
}

namespace cpu {

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

}  // namespace cpu
}  // namespace fastattn
