// C [rows, cols] (+)= A [rows, depth] B [depth, cols]: the one inner loop of every product, rows <=
// 6, cols <= kPanel. Depth is counted in words of the operands, strides in their elements. C is of
// the accumulator's type, or of an io type, to which the sums are then rounded.
#pragma once

#include "cpu/operand.h"

namespace fastattn::cpu::FASTATTN_ISA {

// An operand read one element at a time: element (i, k) is data[i * row + k * depth].
template <class E>
struct Strided {
  const E* data;
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

template <class E, int kR, int kV, Start kStart, class C>
void micro_kernel_tile(int64_t depth, const E* a, int64_t a_row, int64_t a_depth, const E* b,
                       int64_t b_stride, C* c, int64_t c_stride, const Acc<E>* row_scale) {
  using A = Acc<E>;
  Vec<A> acc[kR][kV];
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) acc[i][j] = Vec<A>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    typename Multiply<E>::Vector b_row[kV];
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) b_row[j] = Multiply<E>::load_words(b + j * kWidth<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kR; ++i) {
      const auto a_word = Multiply<E>::word(a + i * a_row);
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) Multiply<E>::add(acc[i][j], a_word, b_row[j]);
    }
    a += a_depth;
    b += b_stride;
  }
  // C is added last: a long sum is then a sum of short ones, with their smaller rounding errors.
#pragma GCC unroll 8
  for (int i = 0; i < kR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kV; ++j) {
      if constexpr (kStart == Start::kAdd) acc[i][j] += load_acc(c + j * kWidth<A>);
      if constexpr (kStart == Start::kScale)
        acc[i][j] += broadcast(row_scale[i]) * load_acc(c + j * kWidth<A>);
      store_acc(c + j * kWidth<A>, acc[i][j]);
    }
    c += c_stride;
    one_row_at_a_time(c);
  }
}

template <class E, int kV, Start kStart, class C>
FASTATTN_INLINE void micro_kernel_rows(int rows, int64_t depth, Strided<E> a, const E* b,
                                       int64_t b_stride, C* c, int64_t c_stride,
                                       const Acc<E>* row_scale) {
  switch (rows) {
    case 1:
      return micro_kernel_tile<E, 1, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 2:
      return micro_kernel_tile<E, 2, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 3:
      return micro_kernel_tile<E, 3, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 4:
      return micro_kernel_tile<E, 4, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    case 5:
      return micro_kernel_tile<E, 5, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
    default:
      return micro_kernel_tile<E, 6, kV, kStart>(depth, a.data, a.row, a.depth, b, b_stride, c,
                                                 c_stride, row_scale);
  }
}

// `vecs` (1..kPanelVecs) vectors of columns; B's and C's rows must be padded to that width.
template <Start kStart, class E, class C>
FASTATTN_INLINE void micro_kernel(int rows, int vecs, int64_t depth, Strided<E> a, const E* b,
                                  int64_t b_stride, C* c, int64_t c_stride,
                                  const Acc<E>* row_scale = nullptr) {
  if constexpr (kPanelVecs == 4) {
    if (vecs == 4)
      return micro_kernel_rows<E, 4, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
    if (vecs == 3)
      return micro_kernel_rows<E, 3, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
  }
  if (vecs == 2)
    return micro_kernel_rows<E, 2, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
  micro_kernel_rows<E, 1, kStart>(rows, depth, a, b, b_stride, c, c_stride, row_scale);
}

// C [rows, cols] (+)= A [rows, depth] B [depth, cols] for cols of any number of vectors, with
// row-major B and C.
template <Start kStart, class E>
FASTATTN_INLINE void micro_kernel_wide(int rows, int64_t cols, int64_t depth, Strided<E> a,
                                       const E* b, int64_t b_stride, Acc<E>* c, int64_t c_stride) {
  for (int64_t j = 0; j < cols; j += kPanel<Acc<E>>) {
    const int vecs = static_cast<int>(ceil_div(min64(kPanel<Acc<E>>, cols - j), kWidth<Acc<E>>));
    micro_kernel<kStart>(rows, vecs, depth, a, b + j, b_stride, c + j, c_stride);
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
