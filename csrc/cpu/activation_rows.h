// An activation and dropout by themselves, and their gradient, E21 and E22 without the product: for
// a product that another library computes.
#pragma once

#include "cpu/activation.h"
#include "cpu/dropout.h"
#include "cpu/lanes.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
class ActivationRows {
  using A = Acc<T>;
  static constexpr int64_t kColumns = 512;  // at a time
  static constexpr int64_t kLeastTask = int64_t{1}
                                        << 13;  // elements; less costs more than it saves

 public:
  explicit ActivationRows(const ActivationProblem& problem)
      : p_(problem), dropout_(p_.dropout_p, p_.seeds, p_.rows_of_seed) {}

  void run(const Parallel& parallel) const {
    with_activation(p_.activation, [&](auto f) {
      if (p_.grad_y != nullptr) return run<f.value, true>(parallel);
      run<f.value, false>(parallel);
    });
  }

 private:
  template <Activation kActivation, bool kGradient>
  void run(Parallel parallel) const {
    if (p_.m == 0 || p_.n == 0) return;
    const int64_t elements = p_.m * p_.n;
    if (elements < 2 * kLeastTask) parallel.threads = 1;
    const int64_t tasks = min64(max64(1, elements / kLeastTask), 8 * parallel.threads);
    const int64_t rows = ceil_div(p_.m, tasks);
    parallel_tasks(parallel, ceil_div(p_.m, rows), [&](int64_t task) {
      for (int64_t i = task * rows; i < min64(p_.m, (task + 1) * rows); ++i) {
        for (int64_t j0 = 0; j0 < p_.n; j0 += kColumns) {
          const int64_t count = min64(kColumns, p_.n - j0);
          if (!dropout_.active) {
            columns<kActivation, kGradient, false>(i, j0, count, nullptr);
          } else {
            A kept[kColumns];
            dropout_.fill_row(kept, i, j0, count);
            columns<kActivation, kGradient, true>(i, j0, count, kept);
          }
        }
      }
    });
  }

  // Row i, columns [j0, j0 + count).
  template <Activation kActivation, bool kGradient, bool kDropout>
  void columns(int64_t i, int64_t j0, int64_t count, const A* kept) const {
    const T* x = static_cast<const T*>(p_.x) + i * p_.x_stride + j0;
    const T* grad_y = static_cast<const T*>(p_.grad_y) + i * p_.grad_y_stride + j0;
    T* y = static_cast<T*>(p_.y) + i * p_.n + j0;
    for_vectors<A>(0, count, [&](int64_t j, int64_t lanes) __attribute__((always_inline)) {
      Vec<A> result;
      if constexpr (!kGradient) {
        result = activate<kActivation, A>(load_lanes(x + j, lanes)).value;
      } else {
        result = load_lanes(grad_y + j, lanes);
        if constexpr (kActivation != Activation::kNone)
          result *= activate<kActivation, A>(load_lanes(x + j, lanes)).derivative;
      }
      if constexpr (kDropout) result *= load(kept + j);
      store_lanes(y + j, result, lanes);
    });
  }

  const ActivationProblem& p_;
  const Dropout dropout_;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
