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

// What makes probabilities of a row's scores: the LSE in two parts, as one number would not do. For
// large scores its rounding changes every e^{s - LSE} of the row by as much, and beside a score of
// -1e9 the logarithm of the sum is gone.
template <class A>
struct SoftmaxRow {
  A max, log_sum;
  FASTATTN_INLINE bool sees_nothing() const { return max == -kInf<A>; }
};

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

// s = 2^{(s - max) * factor} e^{-log_sum}  // E6
template <class A>
FASTATTN_INLINE void row_weights(A* s, int64_t n, A factor, const SoftmaxRow<A>& row) {
  const Vec<A> maxima = broadcast(row.max), factors = broadcast(factor);
  const Vec<A> sums = broadcast(row.log_sum * static_cast<A>(kLog2E));
  for (int64_t j = 0; j < n; j += kWidth<A>)
    store(s + j, exp2((load(s + j) - maxima) * factors - sums));
}

template <class A>
FASTATTN_INLINE void row_multiply(A* s, const A* z, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth<A>) store(s + j, load(s + j) * load(z + j));
}

}  // namespace fastattn::cpu::FASTATTN_ISA
