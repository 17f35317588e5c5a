// What the vector units can do: independent multiply-adds in registers, as many as a micro-kernel
// tile has.
#pragma once

#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Runs `iterations` rounds and returns their floating-point operations.
template <class A>
int64_t fma_probe(int64_t iterations) {
  constexpr int kAccumulators = kRows * kPanelVecs;
  Vec<A> acc[kAccumulators];
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) acc[j] = broadcast(static_cast<A>(iterations + j));
  const Vec<A> factor = broadcast(A(0.999)), term = broadcast(A(0.001));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kAccumulators; ++j) {
      acc[j] = acc[j] * factor + term;
    }
  }
  Vec<A> sum{};
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) sum += acc[j];
  volatile A keep = reduce_add(sum);
  static_cast<void>(keep);
  return 2 * iterations * kAccumulators * kWidth<A>;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
