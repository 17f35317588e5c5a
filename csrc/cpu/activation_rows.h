// An activation and dropout by themselves, and their gradient, E21 and E22 without the product: for
// a product that another library computes.
#pragma once

#include "cpu/activation.h"
#include "cpu/convert.h"
#include "cpu/dropout.h"
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

  void run(Parallel parallel) const {
    if (p_.m == 0 || p_.n == 0) return;
    const int64_t elements = p_.m * p_.n;
    if (elements < 2 * kLeastTask) parallel.threads = 1;
    const int64_t tasks = min64(max64(1, elements / kLeastTask), 8 * parallel.threads);
    const int64_t rows = ceil_div(p_.m, tasks);
    parallel_tasks(parallel, ceil_div(p_.m, rows), [&](int64_t task) {
      for (int64_t i = task * rows; i < min64(p_.m, (task + 1) * rows); ++i) {
        for (int64_t j = 0; j < p_.n; j += kColumns) columns(i, j, min64(kColumns, p_.n - j));
      }
    });
  }

 private:
  // Row i, columns [j0, j0 + count).
  void columns(int64_t i, int64_t j0, int64_t count) const {
    A row[kColumns], derivative[kColumns], kept[kColumns];
    const bool gradient = p_.grad_y != nullptr;
    if (gradient) {
      convert(row, static_cast<const T*>(p_.grad_y) + i * p_.grad_y_stride + j0, count);
      if (p_.activation != Activation::kNone) {
        A x[kColumns];
        convert(x, static_cast<const T*>(p_.x) + i * p_.x_stride + j0, count);
        activate_row(p_.activation, x, derivative, count);
        for (int64_t j = 0; j < count; ++j) row[j] *= derivative[j];
      }
    } else {
      convert(row, static_cast<const T*>(p_.x) + i * p_.x_stride + j0, count);
      activate_row(p_.activation, row, static_cast<A*>(nullptr), count);
    }
    if (dropout_.active) {
      dropout_.fill_row(kept, i, j0, count);
      for (int64_t j = 0; j < count; ++j) row[j] *= kept[j];
    }
    convert(static_cast<T*>(p_.y) + i * p_.n + j0, row, count);
  }

  const ActivationProblem& p_;
  const Dropout dropout_;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
