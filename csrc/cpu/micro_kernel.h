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

enum class Start { kZero, kAdd };  // C = AB; C = row_scale * C + AB, without row_scale C += AB

template <class A, int kR, int kV>
void micro_kernel_tile(int64_t depth, Strided<A> a, const A* b, int64_t b_stride, A* c,
                       int64_t c_stride, Start start, const A* row_scale) {
  Vec<A> acc[kR][kV];
  if (start == Start::kZero) {
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) acc[i][j] = Vec<A>{};
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) {
      const Vec<A> factor = broadcast(row_scale != nullptr ? row_scale[i] : A(1));
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) acc[i][j] = factor * load(c + i * c_stride + j * kWidth<A>);
    }
  }
  const A* a_data = a.data;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> b_row[kV];
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) b_row[j] = load(b + j * kWidth<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) {
      const Vec<A> a_value = broadcast(a_data[i * a.row]);
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) acc[i][j] += a_value * b_row[j];
    }
    a_data += a.depth;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) store(c + i * c_stride + j * kWidth<A>, acc[i][j]);
  }
}

template <class A, int kV>
FASTATTN_INLINE void micro_kernel_rows(int rows, int64_t depth, Strided<A> a, const A* b,
                                       int64_t b_stride, A* c, int64_t c_stride, Start start,
                                       const A* row_scale) {
  switch (rows) {
    case 1:
      return micro_kernel_tile<A, 1, kV>(depth, a, b, b_stride, c, c_stride, start, row_scale);
    case 2:
      return micro_kernel_tile<A, 2, kV>(depth, a, b, b_stride, c, c_stride, start, row_scale);
    case 3:
      return micro_kernel_tile<A, 3, kV>(depth, a, b, b_stride, c, c_stride, start, row_scale);
    case 4:
      return micro_kernel_tile<A, 4, kV>(depth, a, b, b_stride, c, c_stride, start, row_scale);
    case 5:
      return micro_kernel_tile<A, 5, kV>(depth, a, b, b_stride, c, c_stride, start, row_scale);
    default:
      return micro_kernel_tile<A, 6, kV>(depth, a, b, b_stride, c, c_stride, start, row_scale);
  }
}

// `vecs` (1..kPanelVecs) vectors of columns; B's and C's rows must be padded to that width.
template <class A>
FASTATTN_INLINE void micro_kernel(int rows, int vecs, int64_t depth, Strided<A> a, const A* b,
                                  int64_t b_stride, A* c, int64_t c_stride, Start start,
                                  const A* row_scale = nullptr) {
  if (vecs == kPanelVecs) {
    return micro_kernel_rows<A, kPanelVecs>(rows, depth, a, b, b_stride, c, c_stride, start,
                                            row_scale);
  }
  if constexpr (kPanelVecs == 4) {
    if (vecs == 3)
      return micro_kernel_rows<A, 3>(rows, depth, a, b, b_stride, c, c_stride, start, row_scale);
    if (vecs == 2)
      return micro_kernel_rows<A, 2>(rows, depth, a, b, b_stride, c, c_stride, start, row_scale);
  }
  micro_kernel_rows<A, 1>(rows, depth, a, b, b_stride, c, c_stride, start, row_scale);
}

// C [rows, cols] (+)= A [rows, depth] B [depth, cols] for cols of any number of vectors, with
// row-major B and C.
template <class A>
FASTATTN_INLINE void micro_kernel_wide(int rows, int64_t cols, int64_t depth, Strided<A> a,
                                       const A* b, int64_t b_stride, A* c, int64_t c_stride,
                                       Start start, const A* row_scale = nullptr) {
  for (int64_t j = 0; j < cols; j += kPanel<A>) {
    const int vecs = static_cast<int>(ceil_div(min64(kPanel<A>, cols - j), kWidth<A>));
    micro_kernel(rows, vecs, depth, a, b + j, b_stride, c + j, c_stride, start, row_scale);
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
