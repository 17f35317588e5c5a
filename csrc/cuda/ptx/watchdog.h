// For builds that look for deadlocks (FASTATTN_WATCHDOG): a thread that has waited for 2 s says for
// what, in memory of the host, which prints it (launch/watchdog.cuh), and ends the kernel. It uses
// neither printf nor a trap: ptxas would ignore setmaxnreg for the one and run one matrix product
// at a time for the other.
#pragma once

#include <cstdint>

namespace fastattn::cuda::ptx {

struct Report {
  char text[240];  // where in the source, and what is waited for in its words
  int block, thread;
  int awaited, seen;  // a parity and -1, or two values of a counter
  int ready;          // set last
};
constexpr int kReports = 32;
static __device__ Report* watchdog_reports;  // kReports of the host's
static __device__ int watchdog_count;

#define FASTATTN_TEXT(x) #x
#define FASTATTN_LINE(x) FASTATTN_TEXT(x)
#define FASTATTN_PLACE(name) __FILE__ ":" FASTATTN_LINE(__LINE__) " waits for \"" #name "\""

FASTATTN_DEVICE uint32_t nanoseconds() {  // modulo 2^32, which is 4.3 s
  uint32_t now;
  asm volatile("mov.u32 %0, %globaltimer_lo;" : "=r"(now));
  return now;
}
// A poll has been in vain, the first was at `began`. One lane of a warp reports, and who began to
// wait first comes first; half a second later, when others have reported and the host has read,
// a store to nowhere ends the kernel.
FASTATTN_DEVICE void watch(uint32_t began, const char* place, int awaited, int seen) {
  if (nanoseconds() - began < 2'000'000'000u) return;
  const int first = __ffs(static_cast<int>(__activemask())) - 1;
  if (static_cast<int>(threadIdx.x) % 32 == first) {
    const int number = atomicAdd(&watchdog_count, 1);
    if (number < kReports) {
      volatile Report* to = watchdog_reports + number;
#pragma unroll 1
      for (size_t i = 0; i + 1 < sizeof(to->text) && place[i] != '\0'; ++i) to->text[i] = place[i];
      to->block = static_cast<int>(blockIdx.x);
      to->thread = static_cast<int>(threadIdx.x);
      to->awaited = awaited;
      to->seen = seen;
      __threadfence_system();
      to->ready = 1;
    }
  }
  while (nanoseconds() - began < 2'500'000'000u) {
  }
  asm volatile("st.global.u32 [%0], 0;" ::"l"(uint64_t{0}) : "memory");
}

}  // namespace fastattn::cuda::ptx
