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

// Sixteen of the registers that hold d.
#define FASTATTN_D16(d, i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]),        \
      "+f"(d[i + 11]), "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])

#define FASTATTN_WGMMA_128(type)                                                          \
  asm volatile(                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
      " {"                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"    \
      "}, %64, %65, p, 1, 1, %67, %68;\n}\n"                                              \
      : FASTATTN_D16(d, 0), FASTATTN_D16(d, 16), FASTATTN_D16(d, 32), FASTATTN_D16(d, 48) \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kTransposeA}),         \
        "n"(int{kTransposeB}))

#define FASTATTN_WGMMA_256(type)                                                                   \
  asm volatile(                                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, "                                                                                     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
      "%127"                                                                                       \
      "}, %128, %129, p, 1, 1, %131, %132;\n}\n"                                                   \
      : FASTATTN_D16(d, 0), FASTATTN_D16(d, 16), FASTATTN_D16(d, 32), FASTATTN_D16(d, 48),         \
        FASTATTN_D16(d, 64), FASTATTN_D16(d, 80), FASTATTN_D16(d, 96), FASTATTN_D16(d, 112)        \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int{kTransposeA}),                  \
        "n"(int{kTransposeB}))

// d [64, kN] (+)= A [64, 16] B [16, kN], both in shared memory, of T = __nv_bfloat16 or __half.
template <class T, int kN, bool kTransposeA = false, bool kTransposeB = false>
FASTATTN_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN == 128 || kN == 256, "add its width above");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (kN == 128) FASTATTN_WGMMA_128("bf16");
    if constexpr (kN == 256) FASTATTN_WGMMA_256("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    if constexpr (kN == 128) FASTATTN_WGMMA_128("f16");
    if constexpr (kN == 256) FASTATTN_WGMMA_256("f16");
  }
}

}  // namespace fastattn::cuda::ptx
