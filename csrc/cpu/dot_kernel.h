// C [m, n] = A [m, k] B [n, k]^T, both row-major, for an A of few rows: nothing is packed, which
// for a B that is read once or twice would cost as much as the product. Sums run along the vectors
// and are folded at the end.
#pragma once

#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {

// A tile's accumulators, the rows of A and one row of B fill the registers.
#if defined(FASTATTN_AVX512)
constexpr int kDotRows = 6;
#else
constexpr int kDotRows = 3;
#endif
constexpr int kDotCols = 4;          // whose sums are folded together
constexpr int kDotColsOfOne = 8;     // of a single row: as many sums as hide the latency of one
constexpr int64_t kDotDepth = 1024;  // 4 + 3 rows of floats: 28 KB of L1
constexpr int64_t kDotChunk = 64;    // columns of C whose sums are kept, whole bytes of a bit-mask

// dst[j] = the sum of v[j]'s lanes.
template <class A>
FASTATTN_INLINE void fold_lanes(const Vec<A>* v, A* dst) {
  for (int j = 0; j < kDotCols; ++j) dst[j] = reduce_add(v[j]);
}
#if defined(FASTATTN_AVX2)
FASTATTN_INLINE void fold_lanes(const Vec<float>* v, float* dst) {
  __m256 x[kDotCols];
  for (int j = 0; j < kDotCols; ++j) {
#if defined(FASTATTN_AVX512)
    const __m512 whole = (__m512)v[j];
    x[j] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
    x[j] = (__m256)v[j];
#endif
  }
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#endif

// c [kR, kC] (+)= a [kR, depth] b [cols, depth]^T; columns past `cols` are not meaningful.
template <class T, int kR, int kC>
void dot_tile(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
              int64_t cols, bool add, Acc<T>* c, int64_t c_stride) {
  using A = Acc<T>;
  using Factors = Multiply<Operand<T>>;
  Vec<A> acc[kR][kC];
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) acc[i][j] = Vec<A>{};
  }
  // A column past the last one reads the last one again.
  const T* b_rows[kC];
  for (int64_t j = 0; j < kC; ++j) b_rows[j] = b + min64(j, cols - 1) * b_stride;
  int64_t k = 0;
  for (; k + kDotStep<T> <= depth; k += kDotStep<T>) {
    typename Factors::Vector a_rows[kR];
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) a_rows[i] = load_factors(a + i * a_stride + k);
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) {
      const auto b_row = load_factors(b_rows[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < kR; ++i) Factors::add(acc[i][j], a_rows[i], b_row);
    }
  }
  typedef A Sums __attribute__((vector_size(kDotCols * sizeof(A))));
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kC; j += kDotCols) {
      Sums sums, before;
      fold_lanes(acc[i] + j, reinterpret_cast<A*>(&sums));
      for (int64_t rest = k; rest < depth; ++rest) {
        const Sums column = {to_acc(b_rows[j][rest]), to_acc(b_rows[j + 1][rest]),
                             to_acc(b_rows[j + 2][rest]), to_acc(b_rows[j + 3][rest])};
        sums += to_acc(a[i * a_stride + rest]) * column;
      }
      A* sums_before = c + i * c_stride + j;
      if (add) {
        __builtin_memcpy(&before, sums_before, sizeof(Sums));
        sums += before;
      }
      __builtin_memcpy(sums_before, &sums, sizeof(Sums));
    }
  }
}

template <class T, int kR = kDotRows>
FASTATTN_INLINE void dot_rows(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b,
                              int64_t b_stride, int64_t cols, bool add, Acc<T>* c,
                              int64_t c_stride) {
  if constexpr (kR > 1) {
    if (rows < kR)
      return dot_rows<T, kR - 1>(rows, depth, a, a_stride, b, b_stride, cols, add, c, c_stride);
  }
  dot_tile<T, kR, kDotCols>(depth, a, a_stride, b, b_stride, cols, add, c, c_stride);
}

// store_c as in gemm.h.
template <class T, class StoreC>
void dot_product_gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, const T* b,
                      int64_t b_stride, const StoreC& store_c, const Parallel& parallel) {
  using A = Acc<T>;
  if (m == 0 || n == 0) return;
  const int64_t share = ceil_div(n, max64(1, parallel.threads));
  const int64_t chunk = min64(kDotChunk, round_up(share, 8));
  parallel_tasks(parallel, ceil_div(n, chunk), [&](int64_t task) {
    const int64_t j0 = task * chunk, cols = min64(chunk, n - j0);
    A* c = thread_scratch<A>(Scratch::kProduct, m * kDotChunk);  // [m, kDotChunk]
    for (int64_t d = 0; d == 0 || d < k; d += kDotDepth) {
      const int64_t depth = min64(kDotDepth, k - d);
      const T* b_part = b + j0 * b_stride + d;
      for (int64_t j = 0; m == 1 && j < cols; j += kDotColsOfOne) {
        dot_tile<T, 1, kDotColsOfOne>(depth, a + d, a_stride, b_part + j * b_stride, b_stride,
                                      min64(kDotColsOfOne, cols - j), d > 0, c + j, kDotChunk);
      }
      for (int64_t j = 0; m > 1 && j < cols; j += kDotCols) {
        for (int64_t i = 0; i < m; i += kDotRows) {
          dot_rows<T>(min64(kDotRows, m - i), depth, a + i * a_stride + d, a_stride,
                      b_part + j * b_stride, b_stride, min64(kDotCols, cols - j), d > 0,
                      c + i * kDotChunk + j, kDotChunk);
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) store_c(i, j0, cols, c + i * kDotChunk);
  });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
