// The threads' buffers of scratch memory.
#include "cpu/scratch.h"

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastattn::cpu {
namespace {

constexpr int kSlots = static_cast<int>(Scratch::kCount);
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

void* thread_scratch_bytes(Scratch scratch, int64_t bytes) {
  const int slot = static_cast<int>(scratch);
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

void free_thread_scratch(Scratch scratch) {
  const int slot = static_cast<int>(scratch);
  ScratchBuffers& buffers = buffers_of_this_thread();
  std::free(buffers.data[slot]);
  buffers.data[slot] = nullptr;
  buffers.bytes[slot] = 0;
}

}  // namespace fastattn::cpu
