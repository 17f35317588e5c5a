// Linear layers with an optional ReLU, E15-E16: bias, ReLU and its bit-mask in the forward's
// epilogue; in the backward the mask is applied while dY is loaded and the bias gradient is summed
// on the way.
#pragma once

#include "common/problem.h"
#include "cpu/dot_kernel.h"
#include "cpu/gemm.h"
#include "cpu/row_kernel.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Whether a row-major B is better read in place by a product of `rows` rows: it reads B once every
// kRows rows, and packing B would cost more unless the lines of a panel push each other out of L1.
template <class T>
bool in_place_pays(int64_t rows, int64_t stride, int64_t depth) {
  if (rows <= 2 * kRows) return true;
  constexpr int64_t kLine = 64, kSets = 64, kWays = 8;
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(T)), lines = bytes / kLine;
  const int64_t step = bytes % kLine != 0 ? 1 : min64(kSets, lines & -lines);
  return rows <= 128 && min64(depth, kBlockDepth) * step <= kSets * kWays / 2;
}

// Whether x's rows are so few that packing W would cost more than the dot products' foldings, and
// stay in L2 while W passes by (512 KB of floats).
template <class T>
bool unpacked_pays(int64_t m, int64_t k) {
  if (kConvertsSlowly<T> && m > kDotRows) return false;
  return 2 * m <= k && m * k <= int64_t{1} << 17;
}

// Whether dY's rows are so few that W is better read once, row by row, as it lies in memory. Pairs
// of bf16 multiply four times as fast as what is converted, if they are packed.
template <class T>
bool passing_pays(int64_t m) {
  return m <= (kPaired<Operand<T>> ? 3 : kPanelVecs == 4 ? 32 : 15);
}

// Panels of a row-major B: rows and columns from `src` on.
template <class T, class E = Operand<T>>
FASTATTN_INLINE Panels<E> row_major_panels(const T* src, int64_t stride, int64_t depth,
                                           int64_t cols, bool in_place, E* dst,
                                           int64_t panel_words) {
  constexpr int64_t kCols = kPanel<Acc<T>>;
  if constexpr (sizeof(T) == sizeof(E)) {
    if (in_place && cols % kWidth<E> == 0) return {src, kCols, stride};
  }
  // A few rows at a time, each as far as it goes: whole pages are read, and panels written, in
  // order.
  constexpr int64_t kRowsAtOnce = 8;
  for (int64_t i = 0; i < depth; i += kRowsAtOnce) {
    const int64_t rows = min64(kRowsAtOnce, depth - i);
    for (int64_t j = 0; j < cols; j += kCols) {
      pack_depth_rows(dst + j / kCols * panel_words + i / kDepth<E> * kCols, kCols,
                      src + i * stride + j, stride, rows, min64(kCols, cols - j));
    }
  }
  return {dst, panel_words, kCols};
}

// Row i, columns [j0, j0 + cols), of y from its sums in `row`, which may change.  // E15
template <class T>
FASTATTN_INLINE void store_linear_row(const LinearProblem& p, int64_t i, int64_t j0, int64_t cols,
                                      Acc<T>* row) {
  using A = Acc<T>;
  if (p.bias != nullptr) {
    constexpr int64_t kMost = kPanel<A> > kDotChunk ? kPanel<A> : kDotChunk;
    A b[kMost];
    convert(b, static_cast<const T*>(p.bias) + j0, cols);
    for (int64_t j = 0; j < cols; ++j) row[j] += b[j];
  }
  T* out = static_cast<T*>(p.y) + i * p.n + j0;
  if (!p.relu) return convert(out, row, cols);
  for (int64_t j = 0; j < cols; j += kWidth<A>) store(row + j, relu<A>(load(row + j)));
  convert(out, row, cols);
  if (p.relu_mask == nullptr) return;
  // The stored value decides: a positive sum may round to zero in 16 bits.
  if constexpr (sizeof(T) != sizeof(A)) convert(row, out, cols);
  for (int64_t j = cols; j < round_up(cols, 8); ++j) row[j] = A(0);
  uint8_t* mask = p.relu_mask + i * ceil_div(p.n, 8) + j0 / 8;
  for (int64_t j = 0; j < cols; j += 8) mask[j / 8] = relu_bits(row + j);
}

template <class T>
void linear_forward(const LinearProblem& p, const Parallel& parallel) {
  using A = Acc<T>;
  using E = Operand<T>;
  const T* x = static_cast<const T*>(p.x);  // [m, k]
  const T* w = static_cast<const T*>(p.w);  // [n, k]

  const auto load_a = [&](int64_t i0, int64_t rows, int64_t d, int64_t depth, bool,
                          E* scratch) -> Strips<E> {
    const T* src = x + i0 * p.x_stride + d;
    if constexpr (sizeof(T) == sizeof(E)) return Strips<E>::row_major(src, p.x_stride);
    if constexpr (kPaired<E>) {
      if (p.x_stride % 2 == 0 && depth % 2 == 0)
        return Strips<E>::row_major(reinterpret_cast<const E*>(src), p.x_stride / 2);
    }
    pack_rows(scratch, words<E>(depth), src, p.x_stride, rows, depth);
    return Strips<E>::row_major(scratch, words<E>(depth));
  };
  const auto load_b = [&](int64_t d, int64_t depth, int64_t j0, int64_t cols, E* dst,
                          int64_t panel_words) -> Panels<E> {
    E* staging = sizeof(T) == sizeof(E)
                     ? nullptr
                     : thread_scratch<E>(Scratch::kLinearStaging, kPanel<A> * kBlockDepth);
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

// dst [cols] = row i, columns [j0, j0 + cols), of G = dY o R; j0 is a multiple of 8.  // E16
template <class T>
FASTATTN_INLINE void load_masked_gradient(const LinearBackwardProblem& p, int64_t i, int64_t j0,
                                          int64_t cols, Acc<T>* dst) {
  using A = Acc<T>;
  const int64_t offset = i * p.grad_y_stride + j0;
  const A* src = dst;
  if (p.grad_y_is_accumulator || sizeof(T) == sizeof(A)) {
    src = static_cast<const A*>(p.grad_y) + offset;
  } else {
    convert(dst, static_cast<const T*>(p.grad_y) + offset, cols);
  }
  if (p.relu_mask != nullptr) {
    const uint8_t* mask = p.relu_mask + i * ceil_div(p.n, 8) + j0 / 8;
    int64_t j = 0;
    for (; j + 8 <= cols; j += 8) apply_relu_bits(mask[j / 8], dst + j, src + j);
    if (j < cols) apply_relu_bits(mask[j / 8], dst + j, src + j, static_cast<int>(cols - j));
    return;
  }
  if (src != dst) convert(dst, src, cols);
  if (p.relu_output != nullptr) {
    const T* output = static_cast<const T*>(p.relu_output) + i * p.n + j0;
    for (int64_t j = 0; j < cols; ++j) dst[j] = to_acc(output[j]) <= A(0) ? A(0) : dst[j];
  }
}

// A part of a row of dY, a page or more behind the row before it, which the processor does not
// foresee.
template <class T>
FASTATTN_INLINE void prefetch_gradient(const LinearBackwardProblem& p, int64_t i, int64_t j0,
                                       int64_t cols) {
  const int64_t bytes = p.grad_y_is_accumulator ? static_cast<int64_t>(sizeof(Acc<T>))
                                                : static_cast<int64_t>(sizeof(T));
  prefetch_bytes(static_cast<const char*>(p.grad_y) + (i * p.grad_y_stride + j0) * bytes,
                 cols * bytes);
}

// dX [m, k] = G [m, n] W [n, k]
template <class T>
void linear_input_gradient(const LinearBackwardProblem& p, const Parallel& parallel) {
  using A = Acc<T>;
  using E = Operand<T>;
  const T* w = static_cast<const T*>(p.w);
  const auto load_a = [&](int64_t i0, int64_t rows, int64_t d, int64_t depth, bool,
                          E* scratch) -> Strips<E> {
    const int64_t stride = round_up(words<E>(depth), kWidth<A>);
    for (int64_t i = 0; i < rows; ++i) {
      if constexpr (kPaired<E>) {
        A row[kDepth<E> * kBlockDepth];
        load_masked_gradient<T>(p, i0 + i, d, depth, row);
        for (int64_t j = depth; j < round_up(depth, kWidth<A>); ++j) row[j] = A(0);
        round_row(scratch + i * stride, row, round_up(depth, kWidth<A>));
      } else {
        load_masked_gradient<T>(p, i0 + i, d, depth, scratch + i * stride);
      }
    }
    return Strips<E>::row_major(scratch, stride);
  };
  const auto load_b = [&](int64_t d, int64_t depth, int64_t j0, int64_t cols, E* dst,
                          int64_t panel_words) -> Panels<E> {
    return row_major_panels(w + d * p.w_stride + j0, p.w_stride, depth, cols,
                            in_place_pays<T>(p.m, p.w_stride, p.n), dst, panel_words);
  };
  const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
    if (p.grad_x_is_accumulator) {
      convert(static_cast<A*>(p.grad_x) + i * p.k + j0, row, cols);
    } else {
      convert(static_cast<T*>(p.grad_x) + i * p.k + j0, row, cols);
    }
  };
  if (passing_pays<T>(p.m)) {
    const auto load_row = [&](int64_t i, int64_t d, int64_t depth, A* dst) {
      load_masked_gradient<T>(p, i, d, depth, dst);
    };
    return passing_rows_gemm<T>(p.m, p.k, p.n, load_row, w, p.w_stride, store_c,
                                worthwhile(parallel, p.m, p.n, p.k));
  }
  const auto product = [&](auto* grad_x) {
    gemm<E>(p.m, p.k, p.n, load_a, load_b, store_c, parallel, PlainC{grad_x, p.k});
  };
  if (p.grad_x_is_accumulator) return product(static_cast<A*>(p.grad_x));
  product(static_cast<T*>(p.grad_x));
}

// Rows of G that are summed apart before the sum of all: one sum of 1024 floats would be off by
// more than torch's, which adds in pairs.
constexpr int64_t kSummedRows = 32;

// sums += part, and part = 0.
template <class A>
FASTATTN_INLINE void add_part(A* sums, A* part, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    sums[j] += part[j];
    part[j] = A(0);
  }
}

// dW [n, k] = G^T [n, m] X [m, k], db [n] = column sums of G. Without dW only the sums.
template <class T>
void linear_weight_gradient(const LinearBackwardProblem& p, const Parallel& parallel) {
  using A = Acc<T>;
  using E = Operand<T>;
  const T* x = static_cast<const T*>(p.x);
  A* sums = thread_scratch<A>(Scratch::kParts, p.n);  // [n] db
  for (int64_t j = 0; j < p.n; ++j) sums[j] = A(0);
  // Rows of G^T are columns of G, in strips [words(depth)][6].
  const auto load_a = [&](int64_t j0, int64_t count, int64_t d, int64_t depth, bool first_columns,
                          E* scratch) -> Strips<E> {
    A part[kBlockM] = {};
    const auto load_row = [&](int64_t i, A* row) {
      prefetch_gradient<T>(p, min64(d + i + kRowsAhead, p.m - 1), j0, count);
      load_masked_gradient<T>(p, d + i, j0, count, row);
      if (!first_columns) return;
      for (int64_t j = 0; j < count; ++j) part[j] += row[j];
      if ((i + 1) % kSummedRows == 0 || i + 1 == depth) add_part(sums + j0, part, count);
    };
    A row[kBlockM + 64], next_row[kBlockM + 64];
    const int64_t depth_words = words<E>(depth);
    for (int64_t i = 0; i < depth_words; ++i) {
      const E* column_words;
      load_row(kDepth<E> * i, row);
      if constexpr (kPaired<E>) {
        const int64_t padded = round_up(count, kWidth<A>);
        for (int64_t j = count; j < padded; ++j) row[j] = next_row[j] = A(0);
        if (2 * i + 1 < depth) {
          load_row(2 * i + 1, next_row);
        } else {
          for (int64_t j = 0; j < count; ++j) next_row[j] = A(0);
        }
        column_words = reinterpret_cast<const E*>(row);
        round_two_rows(reinterpret_cast<E*>(row), row, next_row, padded);
      } else {
        column_words = row;
      }
      // 8 at a time is faster: the next row overwrites the last two. The last row has no next.
      const bool last = i + 1 == depth_words;
      for (int64_t strip = 0; strip < count; strip += kRows) {
        E* dst = scratch + strip * depth_words + i * kRows;
        if (last) {
          __builtin_memcpy(dst, column_words + strip, kRows * sizeof(E));
        } else {
          __builtin_memcpy(dst, column_words + strip, 8 * sizeof(E));
        }
      }
    }
    return {scratch, kRows * depth_words, 1, kRows};
  };
  if (p.grad_w == nullptr || p.k == 0) {
    A part[kBlockM] = {}, row[kBlockM];
    for (int64_t i0 = 0; i0 < p.m; i0 += kSummedRows) {
      for (int64_t j0 = 0; j0 < p.n; j0 += kBlockM) {
        const int64_t count = min64(kBlockM, p.n - j0);
        for (int64_t i = i0; i < min64(i0 + kSummedRows, p.m); ++i) {
          load_masked_gradient<T>(p, i, j0, count, row);
          for (int64_t j = 0; j < count; ++j) part[j] += row[j];
        }
        add_part(sums + j0, part, count);
      }
    }
  } else {
    const auto load_b = [&](int64_t d, int64_t depth, int64_t j0, int64_t cols, E* dst,
                            int64_t panel_words) -> Panels<E> {
      return row_major_panels(x + d * p.x_stride + j0, p.x_stride, depth, cols,
                              in_place_pays<T>(p.n, p.x_stride, p.m), dst, panel_words);
    };
    const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
      convert(static_cast<T*>(p.grad_w) + i * p.k + j0, row, cols);
    };
    gemm<E>(p.n, p.k, p.m, load_a, load_b, store_c, parallel,
            PlainC<T>{static_cast<T*>(p.grad_w), p.k});
  }
  if (p.grad_bias != nullptr) convert(static_cast<T*>(p.grad_bias), sums, p.n);
}

template <class T>
void linear_backward(const LinearBackwardProblem& p, const Parallel& parallel) {
  if (p.grad_x != nullptr) linear_input_gradient<T>(p, parallel);
  if (p.grad_w != nullptr || p.grad_bias != nullptr) linear_weight_gradient<T>(p, parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
