// What the vector units can do: independent multiply-adds in registers, as many as a micro-kernel
// tile has.
#pragma once

#include "cpu/operand.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Runs `iterations` rounds and returns their floating-point operations.
template <class E>
int64_t fma_probe(int64_t iterations) {
  using A = Acc<E>;
  constexpr int kAccumulators = kRows * kPanelVecs;
  Vec<A> acc[kAccumulators];
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) acc[j] = broadcast(static_cast<A>(iterations + j));
  using Vector = typename Multiply<E>::Vector;
  Vector factor, other;
  if constexpr (kPaired<E>) {
    factor = other = broadcast_word(0x3a803a80u);  // 2^-10 twice
  } else {
    factor = broadcast(A(0.999));
    other = broadcast(A(0.001));
  }
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kAccumulators; ++j) {
      if constexpr (kPaired<E>) {
        Multiply<E>::add(acc[j], factor, other);
      } else {
        acc[j] = acc[j] * factor + other;
      }
    }
  }
  Vec<A> sum{};
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) sum += acc[j];
  volatile A keep = reduce_add(sum);
  static_cast<void>(keep);
  return 2 * iterations * kAccumulators * kWidth<A> * kDepth<E>;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
