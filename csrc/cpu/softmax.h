// Row pieces of the softmax: all lengths are multiples of the vector width.
#pragma once

#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.6931471805599453094;

FASTATTN_INLINE float exponential(float x) { return __builtin_expf(x); }
FASTATTN_INLINE double exponential(double x) { return __builtin_exp(x); }
FASTATTN_INLINE float natural_log(float x) { return __builtin_logf(x); }
FASTATTN_INLINE double natural_log(double x) { return __builtin_log(x); }
FASTATTN_INLINE float power_of_2(float x) { return __builtin_exp2f(x); }
FASTATTN_INLINE double power_of_2(double x) { return __builtin_exp2(x); }

template <class A>
FASTATTN_INLINE A row_max(const A* s, int64_t n) {
  Vec<A> best[4];  // one after the other they would wait for each other
  for (Vec<A>& b : best) b = broadcast(-kInf<A>);
  int64_t j = 0;
  for (; j + 4 * kWidth<A> <= n; j += 4 * kWidth<A>) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) best[u] = max(best[u], load(s + j + u * kWidth<A>));
  }
  for (; j < n; j += kWidth<A>) best[0] = max(best[0], load(s + j));
  return reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// s = 2^{(s - most) * factor}; returns the sum.  // E3
// The difference first: the power of the largest score is then exactly 1, however large it is.
template <class A>
FASTATTN_INLINE A row_exp2(A* s, int64_t n, A most, A factor) {
  const Vec<A> shifts = broadcast(most), factors = broadcast(factor);
  Vec<A> sum{};
  for (int64_t j = 0; j < n; j += kWidth<A>) {
    const Vec<A> p = exp2((load(s + j) - shifts) * factors);
    sum += p;
    store(s + j, p);
  }
  return reduce_add(sum);
}

// s = e^{scale * s - shift}; returns the sum.  // E3, E6
// The difference first: rounding then costs a share of the exponent, which is small where e^x is
// not. A shift brought to base 2 beforehand would cost its own rounding everywhere.
template <class A>
FASTATTN_INLINE A row_exp(A* s, int64_t n, A scale, A shift) {
  const Vec<A> log2_e = broadcast(static_cast<A>(kLog2E));
  const Vec<A> scales = broadcast(scale), shifts = broadcast(shift);
  Vec<A> sum{};
  for (int64_t j = 0; j < n; j += kWidth<A>) {
    const Vec<A> p = exp2((load(s + j) * scales - shifts) * log2_e);
    sum += p;
    store(s + j, p);
  }
  return reduce_add(sum);
}

template <class A>
FASTATTN_INLINE void row_multiply(A* s, const A* z, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth<A>) store(s + j, load(s + j) * load(z + j));
}

}  // namespace fastattn::cpu::FASTATTN_ISA
