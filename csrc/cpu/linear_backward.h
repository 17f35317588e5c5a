// The gradients of linear layers, E16 and E22: dY is multiplied by what the forward has left while
// it is loaded, and the bias gradient is summed on the way.
#pragma once

#include "common/problem.h"
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

// dst [cols] = row i, columns [j0, j0 + cols), of G = dY o D; j0 is a multiple of 8.  // E16, E22
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
  if (p.bits != nullptr) {
    const uint8_t* bits = p.bits + i * ceil_div(p.n, 8) + j0 / 8;
    int64_t j = 0;
    for (; j + 8 <= cols; j += 8) apply_relu_bits(bits[j / 8], dst + j, src + j);
    if (j < cols) apply_relu_bits(bits[j / 8], dst + j, src + j, static_cast<int>(cols - j));
    if (p.bits_scale == 1.0) return;
    const auto scale = static_cast<A>(p.bits_scale);
    for (j = 0; j < cols; ++j) dst[j] *= scale;
    return;
  }
  if (p.derivative != nullptr) {
    const T* derivative = static_cast<const T*>(p.derivative) + i * p.n + j0;
    int64_t j = 0;
    for (; j + kWidth<A> <= cols; j += kWidth<A>)
      store(dst + j, load(src + j) * load_acc(derivative + j));
    for (; j < cols; ++j) dst[j] = src[j] * to_acc(derivative[j]);
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

// Layers on one input, of whose input gradients the sum is asked for, as one product: dX [m, k] =
// [G_1 G_2 ...] [W_1; W_2; ...]. The depth of each is padded to whole kDepthUnits.
template <class T>
class LinearInputGradient {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  LinearInputGradient(const LinearBackwardProblem* parts, int64_t count)
      : parts_(parts), count_(count) {}

  void run(const Parallel& parallel) const {
    const LinearBackwardProblem& first = parts_[0];
    const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
      if (first.grad_x_is_accumulator) {
        convert(static_cast<A*>(first.grad_x) + i * first.k + j0, row, cols);
      } else {
        convert(static_cast<T*>(first.grad_x) + i * first.k + j0, row, cols);
      }
    };
    if (count_ == 1 && passing_pays<T>(first.m)) {
      const auto load_row = [&](int64_t i, int64_t d, int64_t depth, A* dst) {
        load_masked_gradient<T>(first, i, d, depth, dst);
      };
      return passing_rows_gemm<T>(first.m, first.k, first.n, load_row, weight(first),
                                  first.w_stride, store_c,
                                  worthwhile(parallel, first.m, first.n, first.k));
    }
    int64_t depth = first.n;
    if (count_ > 1) {
      depth = 0;
      for (int64_t p = 0; p < count_; ++p) depth += round_up(parts_[p].n, kDepthUnit);
    }
    const auto load_a = [&](int64_t i0, int64_t rows, int64_t d, int64_t block, bool,
                            E* scratch) -> Strips<E> {
      return gradients(i0, rows, d, block, scratch);
    };
    const auto load_b = [&](int64_t d, int64_t block, int64_t j0, int64_t cols, E* dst,
                            int64_t panel_words) -> Panels<E> {
      return weights(d, block, j0, cols, dst, panel_words);
    };
    const auto product = [&](auto* grad_x) {
      gemm<E>(first.m, first.k, depth, load_a, load_b, store_c, parallel, PlainC{grad_x, first.k});
    };
    if (first.grad_x_is_accumulator) return product(static_cast<A*>(first.grad_x));
    product(static_cast<T*>(first.grad_x));
  }

 private:
  static const T* weight(const LinearBackwardProblem& p) { return static_cast<const T*>(p.w); }

  // The parts of depth [d, d + depth): body(part, where it begins in the block, its first column of
  // the part, how many there are, and how many with the part's padding).
  template <class Body>
  void for_each_part(int64_t d, int64_t depth, const Body& body) const {
    int64_t start = 0;
    for (int64_t p = 0; p < count_; ++p) {
      const LinearBackwardProblem& part = parts_[p];
      const int64_t end = start + (count_ == 1 ? part.n : round_up(part.n, kDepthUnit));
      const int64_t from = max64(d, start), to = min64(d + depth, end);
      if (from < to) {
        const int64_t first = from - start;
        body(part, from - d, first, max64(0, min64(to - from, part.n - first)), to - from);
      }
      start = end;
    }
  }

  Strips<E> gradients(int64_t i0, int64_t rows, int64_t d, int64_t depth, E* scratch) const {
    const int64_t padded = round_up(depth, kDepth<E> * kWidth<A>), stride = words<E>(padded);
    for (int64_t i = 0; i < rows; ++i) {
      A staged[kDepth<E> * kBlockDepth + kWidth<A>];
      A* row;
      if constexpr (kPaired<E>) {
        row = staged;
      } else {
        row = scratch + i * stride;
      }
      for_each_part(d, depth,
                    [&](const LinearBackwardProblem& part, int64_t at, int64_t first,
                        int64_t length, int64_t whole) {
                      load_masked_gradient<T>(part, i0 + i, first, length, row + at);
                      for (int64_t j = length; j < whole; ++j) row[at + j] = A(0);
                    });
      for (int64_t j = depth; j < padded; ++j) row[j] = A(0);
      round_row(scratch + i * stride, row, padded);
    }
    return Strips<E>::row_major(scratch, stride);
  }

  Panels<E> weights(int64_t d, int64_t depth, int64_t j0, int64_t cols, E* dst,
                    int64_t panel_words) const {
    Panels<E> panels{dst, panel_words, kPanel<A>};
    for_each_part(d, depth,
                  [&](const LinearBackwardProblem& part, int64_t at, int64_t first, int64_t length,
                      int64_t whole) {
                    const bool all = length == depth;
                    E* to = dst + words<E>(at) * kPanel<A>;
                    const Panels<E> packed = row_major_panels(
                        weight(part) + first * part.w_stride + j0, part.w_stride, length, cols,
                        all && in_place_pays<T>(part.m, part.w_stride, part.n), to, panel_words);
                    if (all) panels = packed;
                    for (int64_t j = 0; length < whole && j < cols; j += kPanel<A>) {
                      E* panel = to + j / kPanel<A> * panel_words;
                      for (int64_t e = words<E>(length) * kPanel<A>;
                           e < words<E>(whole) * kPanel<A>; ++e)
                        panel[e] = E{};
                    }
                  });
    return panels;
  }

  const LinearBackwardProblem* parts_;
  int64_t count_;
};

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

// dW [n, k] = G^T [n, m] X [m, k], if it is asked for, to store_c or `plain`, as gemm has them.
// Returns db [n] = column sums of G, in the calling thread's scratch memory.
template <class T, class StoreC>
const Acc<T>* weight_gradient(const LinearBackwardProblem& p, bool needs_weight,
                              const StoreC& store_c, PlainC<T> plain, const Parallel& parallel) {
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
  if (!needs_weight || p.k == 0) {
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
    gemm<E>(p.n, p.k, p.m, load_a, load_b, store_c, parallel, plain);
  }
  return sums;
}

template <class T>
void linear_weight_gradient(const LinearBackwardProblem& p, const Parallel& parallel) {
  T* grad_w = static_cast<T*>(p.grad_w);
  const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, Acc<T>* row) {
    convert(grad_w + i * p.k + j0, row, cols);
  };
  const Acc<T>* sums =
      weight_gradient<T>(p, grad_w != nullptr, store_c, PlainC<T>{grad_w, p.k}, parallel);
  if (p.grad_bias != nullptr) convert(static_cast<T*>(p.grad_bias), sums, p.n);
}

// The gradients of `count` layers on one input; the input's, if parts[0] asks for it, is the sum of
// theirs.
template <class T>
void linear_backward(const LinearBackwardProblem* parts, int64_t count, const Parallel& parallel) {
  if (parts[0].grad_x != nullptr) LinearInputGradient<T>(parts, count).run(parallel);
  for (int64_t p = 0; p < count; ++p) {
    if (parts[p].grad_w != nullptr || parts[p].grad_bias != nullptr)
      linear_weight_gradient<T>(parts[p], parallel);
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
