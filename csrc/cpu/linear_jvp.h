// The tangent of a linear layer with a ReLU, E17: one product of twice the depth, [tX X] [W tW]^T,
// with the tangent of the bias and the bit-mask where a tile is done.
#pragma once

#include "common/problem.h"
#include "cpu/gemm.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
class LinearJvp {
  using A = Acc<T>;
  using E = Operand<T>;

  // A factor of both operands' depth: rows of x (or t_x) and of t_w (or w).
  struct Half {
    const T *x, *w;
    int64_t x_stride, w_stride;
  };

 public:
  explicit LinearJvp(const LinearJvpProblem& problem)
      : p_(problem), half_depth_(round_up(p_.k, kDepthUnit)) {
    if (p_.t_x != nullptr) halves_[count_++] = {ptr(p_.t_x), ptr(p_.w), p_.t_x_stride, p_.w_stride};
    if (p_.t_w != nullptr) halves_[count_++] = {ptr(p_.x), ptr(p_.t_w), p_.x_stride, p_.t_w_stride};
  }

  void run(const Parallel& parallel) const {
    const auto load_a = [&](int64_t i0, int64_t rows, int64_t d, int64_t depth, bool,
                            E* scratch) -> Strips<E> {
      const int64_t stride = words<E>(depth);
      for_each_part(
          d, depth,
          [&](const Half& half, int64_t at, int64_t first, int64_t length, int64_t padded) {
            for (int64_t i = 0; i < rows; ++i) {
              pack_rows(scratch + i * stride + words<E>(at), words<E>(padded),
                        half.x + (i0 + i) * half.x_stride + first, half.x_stride, 1, length);
            }
          });
      return Strips<E>::row_major(scratch, stride);
    };
    const auto load_b = [&](int64_t d, int64_t depth, int64_t j0, int64_t cols, E* dst,
                            int64_t panel_words) -> Panels<E> {
      E* staging = thread_scratch<E>(Scratch::kLinearStaging, kPanel<A> * kBlockDepth);
      for_each_part(
          d, depth,
          [&](const Half& half, int64_t at, int64_t first, int64_t length, int64_t padded) {
            for (int64_t j = 0; j < cols; j += kPanel<A>) {
              E* panel = dst + j / kPanel<A> * panel_words + words<E>(at) * kPanel<A>;
              pack_transposed_panel(panel, half.w + (j0 + j) * half.w_stride + first, half.w_stride,
                                    min64(kPanel<A>, cols - j), length, staging);
              for (int64_t e = words<E>(length) * kPanel<A>; e < words<E>(padded) * kPanel<A>; ++e)
                panel[e] = E{};
            }
          });
      return {dst, panel_words, kPanel<A>};
    };
    const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
      if (p_.t_bias != nullptr) {
        A b[kPanel<A>];
        convert(b, ptr(p_.t_bias) + j0, cols);
        for (int64_t j = 0; j < cols; ++j) row[j] += b[j];
      }
      const uint8_t* mask = p_.relu_mask + i * ceil_div(p_.n, 8) + j0 / 8;
      for (int64_t j = 0; j < cols; j += 8) {
        apply_relu_bits(mask[j / 8], row + j, row + j, static_cast<int>(min64(8, cols - j)));
      }
      convert(static_cast<T*>(p_.t_y) + i * p_.n + j0, row, cols);
    };
    gemm<E>(p_.m, p_.n, count_ * half_depth_, load_a, load_b, store_c, parallel);
  }

 private:
  static const T* ptr(const void* p) { return static_cast<const T*>(p); }

  // The parts of depth [d, d + depth): body(half, where the part begins in the block, its first
  // column of the half, how many there are, and how many with the half's padding).
  template <class Body>
  void for_each_part(int64_t d, int64_t depth, const Body& body) const {
    for (int h = 0; h < count_; ++h) {
      const int64_t begin = max64(d, h * half_depth_),
                    end = min64(d + depth, (h + 1) * half_depth_);
      if (begin >= end) continue;
      const int64_t first = begin - h * half_depth_, padded = end - begin;
      body(halves_[h], begin - d, first, max64(0, min64(padded, p_.k - first)), padded);
    }
  }

  const LinearJvpProblem& p_;
  int64_t half_depth_;
  int count_ = 0;
  Half halves_[2] = {};
};

}  // namespace fastattn::cpu::FASTATTN_ISA
