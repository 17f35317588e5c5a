// C [rows, cols] (+)= A [rows, depth] B [depth, cols]: the one inner loop of every product, rows <=
// 6, cols <= kPanel.
#pragma once

#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

// An operand read one element at a time: element (i, k) is data[i * row + k * depth].
template <class A>
struct Strided {
  const A* data;
  int64_t row;
  int64_t depth;
};

enum class Start { kZero, kAdd, kScale };  // C = AB; C + AB; row_scale * C + AB

// Keeps the compiler from holding the addresses of all rows at once: it would spill them around the
// inner loop.
template <class P>
FASTATTN_INLINE void one_row_at_a_time(P*& p) {
  __asm__("" : "+r"(p));
}

template <class A, int kR, int kV, Start kStart>
void micro_kernel_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_depth, const A* b,
                       int64_t b_stride, A* c, int64_t c_stride, const A* row_scale) {
  Vec<A> acc[kR][kV];
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) acc[i][j] = Vec<A>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> b_row[kV];
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) b_row[j] = load(b + j * kWidth<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) {
      const Vec<A> a_value = broadcast(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) acc[i][j] += a_value * b_row[j];
    }
    a += a_depth;
    b += b_stride;
  }
  // C is added last: a long sum is then a sum of short ones, with their smaller rounding errors.
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) {
      if constexpr (kStart == Start::kAdd) acc[i][j] += load(c + j * kWidth<A>);
      if constexpr (kStart == Start::kScale)
        acc[i][j] += broadcast(row_scale[i]) * load(c + j * kWidth<A>);
      store(c + j * kWidth<A>, acc[i][j]);
    }
    c += c_stride;
    one_row_at_a_time(c);
  }
}

template <class A, int kV, Start kStart>
FASTATTN_INLINE void micro_kernel_rows(int rows, int64_t depth, Strided<A> a, const A* b,
                                       int64_t b_stride, A* c, int64_t c_stride,
                                       const A* row_scale) {
  switch (rows) {
    case 1:
      return micro_kernel_tile<A, 1, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 2:
      return micro_kernel_tile<A, 2, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 3:
      return micro_kernel_tile<A, 3, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 4:
      return micro_kernel_tile<A, 4, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 5:
      return micro_kernel_tile<A, 5, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    default:
      return micro_kernel_tile<A, 6, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
  }
}

// `vecs` (1..kPanelVecs) vectors of columns; B's and C's rows must be padded to that width.
template <Start kStart, class A>
FASTATTN_INLINE void micro_kernel(int rows, int vecs, int64_t depth, Strided<A> a, const A* b,
                                  int64_t b_stride, A* c, int64_t c_stride,
                                  const A* row_scale = nullptr) {
  if constexpr (kPanelVecs == 4) {
    if (vecs == 4)
      return micro_kernel_rows<A, 4, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
    if (vecs == 3)
      return micro_kernel_rows<A, 3, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
  }
  if (vecs == 2)
    return micro_kernel_rows<A, 2, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
  micro_kernel_rows<A, 1, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
}

// C [rows, cols] (+)= A [rows, depth] B [depth, cols] for cols of any number of vectors, with
// row-major B and C.
template <Start kStart, class A>
FASTATTN_INLINE void micro_kernel_wide(int rows, int64_t cols, int64_t depth, Strided<A> a,
                                       const A* b, int64_t b_stride, A* c, int64_t c_stride) {
  for (int64_t j = 0; j < cols; j += kPanel<A>) {
    const int vecs = static_cast<int>(ceil_div(min64(kPanel<A>, cols - j), kWidth<A>));
    micro_kernel<kStart>(rows, vecs, depth, a, b + j, b_stride, c + j, c_stride);
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
