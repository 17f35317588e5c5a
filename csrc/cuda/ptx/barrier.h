// Barriers: of the block, named ones, and mbarriers in shared memory.
#pragma once

#include <cstdint>

#include "cuda/ptx/thread.h"

namespace fastattn::cuda::ptx {

FASTATTN_DEVICE void block_sync() { __syncthreads(); }
// Barriers 1 to 15 of the block: `threads` of it meet, or arrive without waiting.
FASTATTN_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTATTN_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

struct alignas(8) Barrier {
  uint64_t state;
};
FASTATTN_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// The inits before it are seen by the asynchronous units.
FASTATTN_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FASTATTN_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
FASTATTN_DEVICE void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
FASTATTN_DEVICE bool phase_has_ended(Barrier* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
// Until the phase of this parity has ended.
#if !defined(FASTATTN_WATCHDOG)
FASTATTN_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  while (!phase_has_ended(barrier, parity)) {
  }
}
#else
FASTATTN_DEVICE void barrier_wait_at(const char* place, Barrier* barrier, int parity) {
  for (const uint32_t began = nanoseconds(); !phase_has_ended(barrier, parity);)
    watch(began, place, parity, -1);
}
#define barrier_wait(barrier, parity) barrier_wait_at(FASTATTN_PLACE(barrier), barrier, parity)
#endif

}  // namespace fastattn::cuda::ptx
