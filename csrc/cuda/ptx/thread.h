// A thread's place, its registers, its arithmetic.
#pragma once

#include <cstdint>

namespace fastattn::cuda::ptx {

FASTATTN_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
FASTATTN_DEVICE int block_id() { return static_cast<int>(blockIdx.x); }
FASTATTN_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

FASTATTN_DEVICE char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) char fastattn_shared[];
  return fastattn_shared;
}
FASTATTN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <int kCount>
FASTATTN_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
FASTATTN_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

FASTATTN_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

}  // namespace fastattn::cuda::ptx
