// A thread's place, its registers, its arithmetic, its memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(FASTATTN_WATCHDOG)
#include "cuda/ptx/watchdog.h"
#endif

namespace fastattn::cuda::ptx {

FASTATTN_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
FASTATTN_DEVICE int block_id() { return static_cast<int>(blockIdx.x); }
FASTATTN_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

// The compiler computes what depends on the value anew in each iteration of a loop, instead of
// keeping it in registers, which would spill.
FASTATTN_DEVICE int fresh(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

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
FASTATTN_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Whether it holds for any lane of the warp.
FASTATTN_DEVICE bool any(bool value) { return __any_sync(0xffffffffu, value); }

// 2^x to 2 ulp; 2^-inf = 0.
FASTATTN_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The greater; the number where one is NaN.
FASTATTN_DEVICE float max(float a, float b) { return fmaxf(a, b); }
// The greater; NaN where one is.
FASTATTN_DEVICE float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
FASTATTN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTATTN_DEVICE float of_bits(uint32_t x) { return __uint_as_float(x); }
FASTATTN_DEVICE float log(float x) { return logf(x); }
FASTATTN_DEVICE float absolute(float x) { return fabsf(x); }
// a * b, rounded whatever it is added to, and a * b + c, rounded once.
FASTATTN_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
FASTATTN_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
// Two floats rounded to T, the first in the low half.
template <class T>
FASTATTN_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// The sum of both.
template <class T>
FASTATTN_DEVICE float sum_of_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    return both.x + both.y;
  }
}

// sum plus the products of both, the first added first.
template <class T>
FASTATTN_DEVICE float add_products_of_pairs(float sum, uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    sum += __uint_as_float(a << 16) * __uint_as_float(b << 16);
    return sum + __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
  } else {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&a));
    const float2 y = __half22float2(*reinterpret_cast<const __half2*>(&b));
    sum += x.x * y.x;
    return sum + x.y * y.y;
  }
}

// Four matrices of 8 x 8 elements of 16 bits from shared memory; lane i has the address of row
// i % 8 of matrix i / 8. Thread t holds elements 2 (t % 4) and the next of row t / 4 of each, or of
// column t / 4 if transposed.
template <bool kTranspose>
FASTATTN_DEVICE void load_matrices(uint32_t* d, const void* row) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(16) Floats4 {
  float x, y, z, w;
};
// In global memory, at a multiple of V's size.
template <class V>
FASTATTN_DEVICE V load_global(const void* p) {
  return *static_cast<const V*>(p);
}
template <class V>
FASTATTN_DEVICE void store_global(void* p, const V& value) {
  *static_cast<V*>(p) = value;
}
// To shared memory; the asynchronous units see it after fence_async_proxy.
template <class V>
FASTATTN_DEVICE void store_shared(void* p, const V& value) {
  *static_cast<V*>(p) = value;
}

// Counters in global memory that blocks share. Each of them has one thread at a time.
FASTATTN_DEVICE int fetch_increment(int* counter) { return atomicAdd(counter, 1); }
FASTATTN_DEVICE int counter_value(const int* counter) {
  int now;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return now;
}
// Until the counter has come to `count`: what other blocks wrote before their last
// counter_release is then seen.
#if !defined(FASTATTN_WATCHDOG)
FASTATTN_DEVICE void counter_wait(const int* counter, int count) {
  while (counter_value(counter) != count) {
  }
}
#else
FASTATTN_DEVICE void counter_wait_at(const char* place, const int* counter, int count) {
  const uint32_t began = nanoseconds();
  for (int now; (now = counter_value(counter)) != count;) watch(began, place, count, now);
}
#define counter_wait(counter, count) counter_wait_at(FASTATTN_PLACE(counter), counter, count)
#endif
FASTATTN_DEVICE void counter_release(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
// Between the thread's own accesses to global memory and those of the asynchronous units.
FASTATTN_DEVICE void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// A value that all lanes of the warp share, so that the compiler knows it: what follows from it is
// then computed once for the warp, in the registers that wgmma takes its descriptors from.
FASTATTN_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
// What `bits` is made of is computed before what follows. Within a basic block ptxas moves waits up
// and arithmetic down, past volatile assembly too; this ends the block by a branch that depends on
// `bits`. Where a lane's top bit is set it sleeps for a nanosecond, which nothing notices.
FASTATTN_DEVICE void settle(uint32_t bits) {
  if (any(static_cast<int32_t>(bits) < 0)) __nanosleep(1);
}

}  // namespace fastattn::cuda::ptx
