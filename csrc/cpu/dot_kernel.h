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
constexpr int kDotCols = 4;
constexpr int64_t kDotDepth = 1024;  // 4 + 3 rows of floats: 28 KB of L1
constexpr int64_t kDotChunk = 64;    // columns of C whose sums are kept, whole bytes of a bit-mask

// dst[j] = the sum of v[j]'s lanes.
template <class A>
FASTATTN_INLINE void fold_lanes(const Vec<A> (&v)[kDotCols], A* dst) {
  for (int j = 0; j < kDotCols; ++j) dst[j] = reduce_add(v[j]);
}
#if defined(FASTATTN_AVX2)
FASTATTN_INLINE void fold_lanes(const Vec<float> (&v)[kDotCols], float* dst) {
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

// c [kR, kDotCols] (+)= a [kR, depth] b [cols, depth]^T; columns past `cols`
// are not meaningful.
template <class A, int kR>
void dot_tile(int64_t depth, const A* a, int64_t a_stride, const A* b, int64_t b_stride,
              int64_t cols, bool add, A* c, int64_t c_stride) {
  Vec<A> acc[kR][kDotCols];
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kDotCols; ++j) acc[i][j] = Vec<A>{};
  }
  // A column past the last one reads the last one again.
  const A* b_rows[kDotCols];
  for (int64_t j = 0; j < kDotCols; ++j) b_rows[j] = b + min64(j, cols - 1) * b_stride;
  int64_t k = 0;
  for (; k + kWidth<A> <= depth; k += kWidth<A>) {
    Vec<A> a_rows[kR];
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) a_rows[i] = load(a + i * a_stride + k);
#pragma GCC unroll 8
    for (int j = 0; j < kDotCols; ++j) {
      const Vec<A> b_row = load(b_rows[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < kR; ++i) acc[i][j] += a_rows[i] * b_row;
    }
  }
  typedef A Sums __attribute__((vector_size(kDotCols * sizeof(A))));
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
    Sums sums, before;
    fold_lanes(acc[i], reinterpret_cast<A*>(&sums));
    for (int64_t rest = k; rest < depth; ++rest) {
      const A value = a[i * a_stride + rest];
      sums += value * Sums{b_rows[0][rest], b_rows[1][rest], b_rows[2][rest], b_rows[3][rest]};
    }
    if (add) {
      __builtin_memcpy(&before, c + i * c_stride, sizeof(Sums));
      sums += before;
    }
    __builtin_memcpy(c + i * c_stride, &sums, sizeof(Sums));
  }
}

template <class A, int kR = kDotRows>
FASTATTN_INLINE void dot_rows(int64_t rows, int64_t depth, const A* a, int64_t a_stride, const A* b,
                              int64_t b_stride, int64_t cols, bool add, A* c, int64_t c_stride) {
  if constexpr (kR > 1) {
    if (rows < kR)
      return dot_rows<A, kR - 1>(rows, depth, a, a_stride, b, b_stride, cols, add, c, c_stride);
  }
  dot_tile<A, kR>(depth, a, a_stride, b, b_stride, cols, add, c, c_stride);
}

// store_c as in gemm.h.
template <class A, class StoreC>
void dot_product_gemm(int64_t m, int64_t n, int64_t k, const A* a, int64_t a_stride, const A* b,
                      int64_t b_stride, const StoreC& store_c, const Parallel& parallel) {
  const int64_t share = ceil_div(n, max64(1, parallel.threads));
  const int64_t chunk = min64(kDotChunk, round_up(share, 8));
  parallel_tasks(parallel, ceil_div(n, chunk), [&](int64_t task) {
    const int64_t j0 = task * chunk, cols = min64(chunk, n - j0);
    A* c = thread_scratch<A>(6, m * kDotChunk);  // [m, kDotChunk]
    for (int64_t d = 0; d == 0 || d < k; d += kDotDepth) {
      const int64_t depth = min64(kDotDepth, k - d);
      for (int64_t j = 0; j < cols; j += kDotCols) {
        for (int64_t i = 0; i < m; i += kDotRows) {
          dot_rows<A>(min64(kDotRows, m - i), depth, a + i * a_stride + d, a_stride,
                      b + (j0 + j) * b_stride + d, b_stride, min64(kDotCols, cols - j), d > 0,
                      c + i * kDotChunk + j, kDotChunk);
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) store_c(i, j0, cols, c + i * kDotChunk);
  });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
