// Work distribution without torch: the caller passes its own thread pool down.
#pragma once

#include <cstdint>
#include <new>

namespace fastattn {

struct Parallel {
  using Body = void (*)(const void* context, int64_t task);

  int threads;
  // Runs body(context, task) once for every task in [0, tasks), in any order, on up to `threads`
  // threads.
  void (*run)(int64_t tasks, Body body, const void* context);
};

// Scratch memory cannot be had. The text has its place within: there may be no memory for it
// either.
class ScratchError : public std::bad_alloc {
 public:
  explicit ScratchError(int64_t bytes) : bytes_(bytes) { name(""); }
  // The op that asked for it, which the allocation does not know.
  void name(const char* op);
  const char* what() const noexcept override { return text_; }

 private:
  int64_t bytes_;
  char text_[128];
};

// Scratch memory owned by the calling thread and reused by its later calls, 64-byte aligned. Each
// slot is one buffer: a nested user takes another slot. The contents are undefined.
void* thread_scratch_bytes(int slot, int64_t bytes);
// Gives a slot's buffer back, where its size grows with the batch.
void free_thread_scratch(int slot);

}  // namespace fastattn
