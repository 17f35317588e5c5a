// C [m, n] = A [m, k] B [k, n], B row-major, for an A of few rows: nothing is packed. B's rows pass
// by once, kPassing at a time and in the order of memory; their sum, each row times its element of
// A, is added to C, which stays in L1. 16-bit rows are converted in registers.
#pragma once

#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int kPassing = 8;
constexpr int64_t kPassingDepth = 256;  // of A at a time, converted
constexpr int64_t kPassedWords = 4096;  // of C at a time: 16 KB of L1

// c [m, cols] += a [m, kD] b [kD, cols]
template <class T, int kD>
FASTATTN_INLINE void add_rows(int64_t m, int64_t cols, const Acc<T>* a, int64_t a_stride,
                              const T* b, int64_t b_stride, Acc<T>* c) {
  using A = Acc<T>;
  int64_t j = 0;
  for (; j + kWidth<A> <= cols; j += kWidth<A>) {
    Vec<A> b_rows[kD];
#pragma GCC unroll 8
    for (int r = 0; r < kD; ++r) b_rows[r] = load_acc(b + r * b_stride + j);
    for (int64_t i = 0; i < m; ++i) {
      const A* factors = a + i * a_stride;
      Vec<A> sum = broadcast(factors[0]) * b_rows[0];
#pragma GCC unroll 8
      for (int r = 1; r < kD; ++r) sum += broadcast(factors[r]) * b_rows[r];
      store(c + i * cols + j, load(c + i * cols + j) + sum);
    }
  }
  for (; j < cols; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      A sum = a[i * a_stride] * to_acc(b[j]);
      for (int r = 1; r < kD; ++r) sum += a[i * a_stride + r] * to_acc(b[r * b_stride + j]);
      c[i * cols + j] += sum;
    }
  }
}

// load_a(i, d, depth, dst) brings row i of A, columns [d, d + depth), d a multiple of
// kPassingDepth; store_c is as in gemm.h.
template <class T, class LoadA, class StoreC>
void passing_rows_gemm(int64_t m, int64_t n, int64_t k, const LoadA& load_a, const T* b,
                       int64_t b_stride, const StoreC& store_c, const Parallel& parallel) {
  using A = Acc<T>;
  if (m == 0 || n == 0) return;
  constexpr int64_t kUnit = kPanel<A>;  // no thread's columns end within a line or a vector
  const int64_t share = round_up(ceil_div(n, max64(1, parallel.threads)), kUnit);
  const int64_t chunk = min64(share, max64(kUnit, kPassedWords / m / kUnit * kUnit));
  parallel_tasks(parallel, ceil_div(n, chunk), [&](int64_t task) {
    const int64_t j0 = task * chunk, cols = min64(chunk, n - j0);
    A* a = thread_scratch<A>(Scratch::kPackedA, m * kPassingDepth);  // [m, kPassingDepth]
    A* c = thread_scratch<A>(Scratch::kProduct, m * cols);           // [m, cols]
    for (int64_t e = 0; e < m * cols; ++e) c[e] = A(0);
    for (int64_t d = 0; d < k; d += kPassingDepth) {
      const int64_t depth = min64(kPassingDepth, k - d);
      for (int64_t i = 0; i < m; ++i) load_a(i, d, depth, a + i * kPassingDepth);
      const T* rows = b + d * b_stride + j0;
      int64_t r = 0;
      for (; r + kPassing <= depth; r += kPassing)
        add_rows<T, kPassing>(m, cols, a + r, kPassingDepth, rows + r * b_stride, b_stride, c);
      for (; r < depth; ++r)
        add_rows<T, 1>(m, cols, a + r, kPassingDepth, rows + r * b_stride, b_stride, c);
    }
    for (int64_t i = 0; i < m; ++i) store_c(i, j0, cols, c + i * cols);
  });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
