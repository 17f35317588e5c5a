// Scratch memory of threads, kept for their later calls.
#pragma once

#include <cstdint>
#include <new>

namespace fastattn::cpu {

// The buffers of a thread, by what they hold. Code that runs while a buffer is in use takes
// another.
enum class Scratch {
  kUnit,           // packed keys of a unit of heads; what ranges of keys leave of few queries
  kStaging,        // a panel of attention's operands before it is transposed
  kBlock,          // all that a block of rows works with
  kParts,          // sums of several tasks before they are added up
  kPackedB,        // gemm's B
  kPackedA,        // its A, or the rows of A that pass by once
  kProduct,        // its C before the epilogue
  kLinearStaging,  // a panel of B before it is transposed
  kOwnForward,     // the forward's results that derivatives compute once more
  kTraining,       // the outputs of a network's layers and their gradients
  kCount
};

// There is no memory for a buffer. The object holds its text, as there may be no memory for that
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

// A buffer of the calling thread, 64-byte aligned. Its contents are undefined.
void* thread_scratch_bytes(Scratch scratch, int64_t bytes);
// Gives a buffer back whose size grows with the batch.
void free_thread_scratch(Scratch scratch);

}  // namespace fastattn::cpu
