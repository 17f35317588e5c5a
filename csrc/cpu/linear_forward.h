// Linear layers with an activation and dropout, E15 and E21: the epilogue adds the bias, applies
// both and leaves what the backward multiplies dY by.
#pragma once

#include "common/problem.h"
#include "cpu/activation.h"
#include "cpu/dot_kernel.h"
#include "cpu/dropout.h"
#include "cpu/gemm.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Whether x's rows are so few that packing W would cost more than the dot products' foldings, and
// stay in L2 while W passes by (512 KB of floats).
template <class T>
bool unpacked_pays(int64_t m, int64_t k) {
  if (kConvertsSlowly<T> && m > kDotRows) return false;
  return 2 * m <= k && m * k <= int64_t{1} << 17;
}

// The columns of a row that an epilogue takes at a time.
template <class A>
constexpr int64_t kEpilogueColumns = kPanel<A> > kDotChunk ? kPanel<A> : kDotChunk;

// row [cols] += bias[j0, j0 + cols), if there is one.
template <class T>
FASTATTN_INLINE void add_bias(const void* bias, int64_t j0, int64_t cols, Acc<T>* row) {
  if (bias == nullptr) return;
  Acc<T> b[kEpilogueColumns<Acc<T>>];
  convert(b, static_cast<const T*>(bias) + j0, cols);
  for (int64_t j = 0; j < cols; ++j) row[j] += b[j];
}

// The bits of columns [j0, j0 + cols) of row i, set where `row` is not <= 0; `row` may change.
template <class A>
FASTATTN_INLINE void store_bits(const LinearProblem& p, int64_t i, int64_t j0, int64_t cols,
                                A* row) {
  for (int64_t j = cols; j < round_up(cols, 8); ++j) row[j] = A(0);
  uint8_t* bits = p.bits + i * ceil_div(p.n, 8) + j0 / 8;
  for (int64_t j = 0; j < cols; j += 8) bits[j / 8] = relu_bits(row + j);
}

// Row i, columns [j0, j0 + cols), of y from its sums in `row`, which may change.  // E15, E21
template <class T>
FASTATTN_INLINE void store_linear_row(const LinearProblem& p, int64_t i, int64_t j0, int64_t cols,
                                      Acc<T>* row) {
  using A = Acc<T>;
  constexpr int64_t kMost = kEpilogueColumns<A>;
  add_bias<T>(p.bias, j0, cols, row);
  A derivative[kMost], kept[round_up(kMost, 64)];
  activate_row(p.activation, row, p.derivative == nullptr ? nullptr : derivative, cols);
  if (p.dropout_p > 0) {
    Dropout(p.dropout_p, p.seeds, p.rows_of_seed).fill_row(kept, i, j0, cols);
    for (int64_t j = 0; j < cols; ++j) row[j] *= kept[j];
    if (p.derivative != nullptr) {
      for (int64_t j = 0; j < cols; ++j) derivative[j] *= kept[j];
    }
  }
  T* out = static_cast<T*>(p.y) + i * p.n + j0;
  convert(out, row, cols);
  if (p.derivative != nullptr)
    convert(static_cast<T*>(p.derivative) + i * p.n + j0, derivative, cols);
  if (p.bits == nullptr) return;
  if (p.activation == Activation::kNone) return store_bits(p, i, j0, cols, kept);
  // The stored value decides: a positive sum may round to zero in 16 bits.
  if constexpr (sizeof(T) != sizeof(A)) convert(row, out, cols);
  store_bits(p, i, j0, cols, row);
}

// Rows [i0, i0 + rows) of x, columns [d, d + depth), as gemm's A.
template <class T, class E = Operand<T>>
FASTATTN_INLINE Strips<E> input_rows(const LinearProblem& p, int64_t i0, int64_t rows, int64_t d,
                                     int64_t depth, E* scratch) {
  const T* src = static_cast<const T*>(p.x) + i0 * p.x_stride + d;
  if constexpr (sizeof(T) == sizeof(E)) return Strips<E>::row_major(src, p.x_stride);
  if constexpr (kPaired<E>) {
    if (p.x_stride % 2 == 0 && depth % 2 == 0)
      return Strips<E>::row_major(reinterpret_cast<const E*>(src), p.x_stride / 2);
  }
  pack_rows(scratch, words<E>(depth), src, p.x_stride, rows, depth);
  return Strips<E>::row_major(scratch, words<E>(depth));
}

// The staging of pack_transposed_panel, where it needs one.
template <class T, class E = Operand<T>>
FASTATTN_INLINE E* transposed_staging() {
  if constexpr (sizeof(T) == sizeof(E)) return nullptr;
  return thread_scratch<E>(Scratch::kLinearStaging, kPanel<Acc<T>> * kBlockDepth);
}

// All of w's panels as gemm asks for them: [depth blocks][panels][words(block)][kPanel].
template <class T>
struct PackedWeight {
  using A = Acc<T>;
  using E = Operand<T>;
  DepthBlocks blocks;
  int64_t panels, panel_words;

  PackedWeight(int64_t n, int64_t k)
      : blocks(cut_depth<E>(k)),
        panels(ceil_div(n, kPanel<A>)),
        panel_words(words<E>(blocks.depth) * kPanel<A>) {}

  int64_t size() const { return blocks.count * panels * panel_words; }  // words
  int64_t at(int64_t d, int64_t j) const {
    return (d / blocks.depth * panels + j / kPanel<A>)*panel_words;
  }
};

template <class T>
void pack_weight(const LinearProblem& p, Operand<T>* packed, const Parallel& parallel) {
  const PackedWeight<T> to(p.n, p.k);
  parallel_tasks(parallel, to.panels, [&](int64_t panel) {
    const int64_t j = panel * kPanel<Acc<T>>;
    for (int64_t d = 0; d < p.k; d += to.blocks.depth) {
      pack_transposed_panel(packed + to.at(d, j), static_cast<const T*>(p.w) + j * p.w_stride + d,
                            p.w_stride, min64(kPanel<Acc<T>>, p.n - j),
                            min64(to.blocks.depth, p.k - d), transposed_staging<T>());
    }
  });
}

template <class T>
void linear_forward(const LinearProblem& p, const Parallel& parallel) {
  using A = Acc<T>;
  using E = Operand<T>;
  const T* x = static_cast<const T*>(p.x);  // [m, k]
  const T* w = static_cast<const T*>(p.w);  // [n, k]

  const auto load_a = [&](int64_t i0, int64_t rows, int64_t d, int64_t depth, bool,
                          E* scratch) -> Strips<E> {
    return input_rows<T>(p, i0, rows, d, depth, scratch);
  };
  const auto load_b = [&](int64_t d, int64_t depth, int64_t j0, int64_t cols, E* dst,
                          int64_t panel_words) -> Panels<E> {
    if (p.packed_w != nullptr) {
      const E* packed = static_cast<const E*>(p.packed_w);
      return {packed + PackedWeight<T>(p.n, p.k).at(d, j0), panel_words, kPanel<A>};
    }
    E* staging = transposed_staging<T>();
    for (int64_t j = 0; j < cols; j += kPanel<A>) {
      pack_transposed_panel(dst + j / kPanel<A> * panel_words, w + (j0 + j) * p.w_stride + d,
                            p.w_stride, min64(kPanel<A>, cols - j), depth, staging);
    }
    return {dst, panel_words, kPanel<A>};
  };
  const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
    if (cols == kPanel<A>) {
      store_linear_row<T>(p, i, j0, kPanel<A>, row);  // loops of a known length
    } else {
      store_linear_row<T>(p, i, j0, cols, row);
    }
  };
  if (unpacked_pays<T>(p.m, p.k)) {
    return dot_product_gemm<T>(p.m, p.n, p.k, x, p.x_stride, w, p.w_stride, store_c,
                               worthwhile(parallel, p.m, p.n, p.k));
  }
  gemm<E>(p.m, p.n, p.k, load_a, load_b, store_c, parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
