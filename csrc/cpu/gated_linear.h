// f(x W_gate^T + b) o (x W_up^T + c) as one product, E23: panels of the two weights take turns, and
// the epilogue of one of W_up finds the gate in the panel before.
#pragma once

#include "cpu/linear_forward.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
class GatedLinear {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kPanelCols = kPanel<A>;

 public:
  explicit GatedLinear(const GatedLinearProblem& problem) : p_(problem) {}

  void run(const Parallel& parallel) const {
    const LinearProblem& up = p_.up;
    if (unpacked_pays<T>(up.m, up.k)) return run_unpacked(worthwhile(parallel, up.m, up.n, up.k));
    const auto load_a = [&](int64_t i0, int64_t rows, int64_t d, int64_t depth, bool,
                            E* scratch) -> Strips<E> {
      return input_rows<T>(up, i0, rows, d, depth, scratch);
    };
    const auto load_b = [&](int64_t d, int64_t depth, int64_t j0, int64_t cols, E* dst,
                            int64_t panel_words) -> Panels<E> {
      E* staging = transposed_staging<T>();
      for (int64_t j = 0; j < cols; j += kPanelCols) {
        const int64_t panel = (j0 + j) / kPanelCols, from = panel / 2 * kPanelCols;
        const bool gate = panel % 2 == 0;
        const int64_t stride = gate ? p_.w_gate_stride : up.w_stride;
        pack_transposed_panel(dst + j / kPanelCols * panel_words,
                              static_cast<const T*>(gate ? p_.w_gate : up.w) + from * stride + d,
                              stride, min64(kPanelCols, up.n - from), depth, staging);
      }
      return {dst, panel_words, kPanelCols};
    };
    const auto store_c = [&](int64_t i, int64_t j0, int64_t, A* row, const A* gate) {
      const int64_t panel = j0 / kPanelCols, from = panel / 2 * kPanelCols;
      if (panel % 2 == 1) store_row(i, from, min64(kPanelCols, up.n - from), row, gate);
    };
    gemm<E>(up.m, 2 * round_up(up.n, kPanelCols), up.k, load_a, load_b, store_c, parallel);
  }

 private:
  // For few rows of x: the sums of the gate are kept until those of W_up are there.
  void run_unpacked(const Parallel& parallel) const {
    const LinearProblem& up = p_.up;
    const int64_t stride = round_up(up.n, kDotChunk);
    A* gates = thread_scratch<A>(Scratch::kParts, up.m * stride);  // [m, stride]
    const auto keep = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
      convert(gates + i * stride + j0, row, cols);
    };
    const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
      store_row(i, j0, cols, row, gates + i * stride + j0);
    };
    const T* x = static_cast<const T*>(up.x);
    dot_product_gemm<T>(up.m, up.n, up.k, x, up.x_stride, static_cast<const T*>(p_.w_gate),
                        p_.w_gate_stride, keep, parallel);
    dot_product_gemm<T>(up.m, up.n, up.k, x, up.x_stride, static_cast<const T*>(up.w), up.w_stride,
                        store_c, parallel);
  }

  // Row i, columns [j0, j0 + cols), from the sums of both products.
  void store_row(int64_t i, int64_t j0, int64_t cols, A* row, const A* gate_sums) const {
    const LinearProblem& up = p_.up;
    A gate[kEpilogueColumns<A>], derivative[kEpilogueColumns<A>];
    convert(gate, gate_sums, cols);
    add_bias<T>(p_.bias_gate, j0, cols, gate);
    add_bias<T>(up.bias, j0, cols, row);
    activate_row(up.activation, gate, up.derivative == nullptr ? nullptr : derivative, cols);
    const int64_t at = i * up.n + j0;
    if (up.derivative != nullptr) {
      for (int64_t j = 0; j < cols; ++j) derivative[j] *= row[j];
      convert(static_cast<T*>(up.derivative) + at, derivative, cols);
      convert(static_cast<T*>(p_.gate) + at, gate, cols);
    }
    for (int64_t j = 0; j < cols; ++j) row[j] *= gate[j];
    convert(static_cast<T*>(up.y) + at, row, cols);
  }

  const GatedLinearProblem& p_;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
