// Matrix products of a warpgroup: 64 rows, kN columns, 16 deep, 16-bit operands, float sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/thread.h"

namespace fastattn::cuda::ptx {

// Registers that products read or write may have been touched before it.
FASTATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTATTN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
FASTATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The registers of d: as operands, and their names in the instruction.
#define FASTATTN_D16(d, i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]),        \
      "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])
#define FASTATTN_D64(d) FASTATTN_D16(d, 0), FASTATTN_D16(d, 16)
#define FASTATTN_D128(d) FASTATTN_D64(d), FASTATTN_D16(d, 32), FASTATTN_D16(d, 48)
#define FASTATTN_D256(d)                                                           \
  FASTATTN_D128(d), FASTATTN_D16(d, 64), FASTATTN_D16(d, 80), FASTATTN_D16(d, 96), \
      FASTATTN_D16(d, 112)
#define FASTATTN_NAMES_64                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_NAMES_128                                                           \
  FASTATTN_NAMES_64                                                                  \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_NAMES_256                                                                     \
  FASTATTN_NAMES_128                                                                           \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
  "%111, "                                                                                     \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

// N, the type, and the numbers of the operands behind d.
#define FASTATTN_WGMMA_SS(n, type, a, b, p, ta, tb)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p                                          \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type                  \
               " {" FASTATTN_NAMES_##n "}, %" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb ";\n}\n" \
               : FASTATTN_D##n(d)                                                               \
               : "l"(a_smem), "l"(b_smem), "r"(static_cast<int>(accumulate)),                   \
                 "n"(int{kTransposeA}), "n"(int{kTransposeB}))
#define FASTATTN_WGMMA_RS(n, type, a0, a1, a2, a3, b, p, tb)                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p                                     \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type             \
               " {" FASTATTN_NAMES_##n "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b \
                                       ", p, 1, 1, %" #tb ";\n}\n"                         \
               : FASTATTN_D##n(d)                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_smem),                  \
                 "r"(static_cast<int>(accumulate)), "n"(int{kTransposeB}))

#define FASTATTN_WGMMA_SS_ANY(type)                                                 \
  do {                                                                              \
    if constexpr (kN == 64) FASTATTN_WGMMA_SS(64, type, 32, 33, 34, 35, 36);        \
    if constexpr (kN == 128) FASTATTN_WGMMA_SS(128, type, 64, 65, 66, 67, 68);      \
    if constexpr (kN == 256) FASTATTN_WGMMA_SS(256, type, 128, 129, 130, 131, 132); \
  } while (false)
#define FASTATTN_WGMMA_RS_ANY(type)                                                           \
  do {                                                                                        \
    if constexpr (kN == 64) FASTATTN_WGMMA_RS(64, type, 32, 33, 34, 35, 36, 37, 38);          \
    if constexpr (kN == 128) FASTATTN_WGMMA_RS(128, type, 64, 65, 66, 67, 68, 69, 70);        \
    if constexpr (kN == 256) FASTATTN_WGMMA_RS(256, type, 128, 129, 130, 131, 132, 133, 134); \
  } while (false)

// d [64, kN] (+)= A [64, 16] B [16, kN] of T = __nv_bfloat16 or __half, both in shared memory.
template <class T, int kN, bool kTransposeA = false, bool kTransposeB = false>
FASTATTN_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a_smem, uint64_t b_smem,
                              bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "add its width above");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    FASTATTN_WGMMA_SS_ANY("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    FASTATTN_WGMMA_SS_ANY("f16");
  }
}
// A in registers: thread t holds rows t / 32 * 16 + t % 32 / 4 and 8 below, by turns, of columns
// 2 (t % 4) and the next, then of those 8 further.
template <class T, int kN, bool kTransposeB = false>
FASTATTN_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b_smem,
                              bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256, "add its width above");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    FASTATTN_WGMMA_RS_ANY("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    FASTATTN_WGMMA_RS_ANY("f16");
  }
}

}  // namespace fastattn::cuda::ptx
