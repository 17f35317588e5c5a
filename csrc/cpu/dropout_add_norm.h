// Dropout, the residual sum and the norm after it, E18, and their gradients, E19. Memory is read
// and written once: the later passes over a row find it in L1.
#pragma once

#include "common/problem.h"
#include "cpu/convert.h"
#include "cpu/dropout.h"
#include "cpu/lanes.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Columns whose keep-mask is drawn at a time, and that are summed apart before the sum of a row.
constexpr int64_t kNormColumns = 512;
// Rows whose part of the gradients of weight and bias is summed apart.
constexpr int64_t kNormRows = 32;
// Tasks of a backward, whose parts are added up at the end.
constexpr int64_t kMostNormParts = 64;
// Elements below which a task costs more than it saves.
constexpr int64_t kLeastNormTask = int64_t{1} << 13;

// The sum of body(j, count), in sums that do not wait for each other.
template <class A, class Body>
FASTATTN_INLINE Vec<A> sum_vectors(int64_t j, int64_t end, const Body& body) {
  Vec<A> sums[4] = {};
  for (; j + 4 * kWidth<A> <= end; j += 4 * kWidth<A>) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] += body(j + v * kWidth<A>, int64_t{kWidth<A>});
  }
  for (; j + kWidth<A> <= end; j += kWidth<A>) sums[0] += body(j, int64_t{kWidth<A>});
  if (j < end) sums[1] += body(j, end - j);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The threads of a kernel over m rows of n columns: one where there is little to do.
inline Parallel norm_threads(Parallel parallel, int64_t m, int64_t n) {
  if (m * n < 2 * kLeastNormTask) parallel.threads = 1;
  return parallel;
}

FASTATTN_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FASTATTN_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// A weight or bias [n] in the accumulator's type: itself, or a copy in `copy`.
template <class T>
const Acc<T>* norm_vector(const void* vector, bool is_accumulator, int64_t n, Acc<T>* copy) {
  if (vector == nullptr || is_accumulator || sizeof(T) == sizeof(Acc<T>))
    return static_cast<const Acc<T>*>(vector);
  convert(copy, static_cast<const T*>(vector), n);
  return copy;
}

template <class T>
class NormForward {
  using A = Acc<T>;

 public:
  explicit NormForward(const DropoutAddNormProblem& problem)
      : p_(problem), dropout_(p_.dropout_p, p_.seeds, p_.rows_of_seed) {}

  void run(const Parallel& threads) const {
    if (p_.n == 0) {  // the mean of no numbers is NaN
      for (int64_t i = 0; i < p_.m; ++i) store_row(i, kNaN<A>, kNaN<A>);
    }
    if (p_.m == 0 || p_.n == 0) return;
    const Parallel parallel = norm_threads(threads, p_.m, p_.n);
    const int64_t most = max64(1, p_.m * p_.n / kLeastNormTask);
    const int64_t rows = ceil_div(p_.m, min64(most, 8 * parallel.threads));
    parallel_tasks(parallel, ceil_div(p_.m, rows), [&](int64_t task) {
      A* copies = thread_scratch<A>(Scratch::kBlock, 2 * p_.n);
      const A* weight = norm_vector<T>(p_.weight, p_.weight_is_accumulator, p_.n, copies);
      const A* bias = norm_vector<T>(p_.bias, p_.bias_is_accumulator, p_.n, copies + p_.n);
      for (int64_t i = task * rows; i < min64(p_.m, (task + 1) * rows); ++i) row(i, weight, bias);
    });
  }

 private:
  // E18
  void row(int64_t i, const A* weight, const A* bias) const {
    const bool residual = p_.residual != nullptr;
    const A total = dropout_.active
                        ? (residual ? add_row<true, true>(i) : add_row<true, false>(i))
                        : (residual ? add_row<false, true>(i) : add_row<false, false>(i));
    const T* z = p_.sum == nullptr ? static_cast<const T*>(p_.x) + i * p_.x_stride
                                   : static_cast<const T*>(p_.sum) + i * p_.n;
    const int64_t n = p_.n;
    const A mean = p_.rms ? A(0) : total / static_cast<A>(n);
    const Vec<A> centre = broadcast(mean);
    Vec<A> squares{};
    for (int64_t j0 = 0; j0 < n; j0 += kNormColumns) {
      squares += sum_vectors<A>(j0, min64(n, j0 + kNormColumns),
                                [&](int64_t j, int64_t count) __attribute__((always_inline)) {
                                  const Vec<A> d =
                                      first_lanes<A>(load_lanes(z + j, count) - centre, count);
                                  return d * d;
                                });
    }
    const A variance = reduce_add(squares) / static_cast<A>(n);
    const A rstd = A(1) / square_root(variance + static_cast<A>(p_.eps));
    const Vec<A> scale = broadcast(rstd);
    T* out = static_cast<T*>(p_.out) + i * n;
    for_vectors<A>(0, n, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      Vec<A> y = (load_lanes(z + j, count) - centre) * scale;
      if (weight != nullptr) y = y * load_lanes(weight + j, count);
      if (bias != nullptr) y = y + load_lanes(bias + j, count);
      store_lanes(out + j, y, count);
    });
    store_row(i, mean, rstd);
  }

  void store_row(int64_t i, A mean, A rstd) const {
    if (!p_.rms) static_cast<A*>(p_.mean)[i] = mean;
    static_cast<A*>(p_.rstd)[i] = rstd;
  }

  // Row i of the sum; returns its total.
  template <bool kDropout, bool kResidual>
  A add_row(int64_t i) const {
    const T* x = static_cast<const T*>(p_.x) + i * p_.x_stride;
    const T* residual = nullptr;
    if constexpr (kResidual) {
      residual = static_cast<const T*>(p_.residual) + i * p_.residual_stride;
    }
    T* sum = nullptr;
    if constexpr (kDropout || kResidual) sum = static_cast<T*>(p_.sum) + i * p_.n;
    A keep[kNormColumns];
    Vec<A> total{};
    for (int64_t j0 = 0; j0 < p_.n; j0 += kNormColumns) {
      const int64_t end = min64(p_.n, j0 + kNormColumns);
      if constexpr (kDropout) dropout_.fill_row(keep, i, j0, end - j0);
      total +=
          sum_vectors<A>(j0, end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            Vec<A> z = load_lanes(x + j, count);
            if constexpr (kDropout) z = z * load(keep + (j - j0));
            if constexpr (kResidual) z = z + load_lanes(residual + j, count);
            if constexpr (kDropout || kResidual) z = store_lanes(sum + j, z, count);
            return z;
          });
    }
    return reduce_add(total);
  }

  const DropoutAddNormProblem& p_;
  Dropout dropout_;
};

template <class T>
class NormBackward {
  using A = Acc<T>;

 public:
  explicit NormBackward(const DropoutAddNormBackwardProblem& problem)
      : p_(problem),
        dropout_(p_.dropout_p, p_.seeds, p_.rows_of_seed),
        of_inputs_(p_.grad_x != nullptr || p_.grad_residual != nullptr),
        of_vectors_(p_.grad_w != nullptr || p_.grad_bias != nullptr),
        padded_(round_up(p_.n, kWidth<A>)) {}

  // The cut of the rows into tasks follows from their number alone: threads change no sum.
  void run(const Parallel& threads) const {
    if (p_.n == 0) return;
    const Parallel parallel = norm_threads(threads, p_.m, p_.n);
    const int64_t rows = max64(1, ceil_div(p_.m, kMostNormParts * kNormRows)) * kNormRows;
    const int64_t tasks = ceil_div(p_.m, rows), part = 2 * padded_;
    const bool summed = of_vectors_ && p_.grad_out != nullptr;
    // [tasks, 2, padded]
    A* parts = summed ? thread_scratch<A>(Scratch::kParts, tasks * part) : nullptr;
    if (summed || of_inputs_) {
      parallel_tasks(parallel, tasks, [&](int64_t task) {
        A* scratch = thread_scratch<A>(Scratch::kBlock, 3 * padded_);
        const A* weight = norm_vector<T>(p_.weight, p_.weight_is_accumulator, p_.n, scratch);
        const int64_t begin = task * rows, end = min64(p_.m, begin + rows);
        for (int64_t i = begin; i < end; i += kNormRows) {
          A* sums = summed ? parts + task * part : nullptr;
          block(i, min64(end, i + kNormRows), weight, scratch + padded_, sums, i == begin);
        }
      });
    }
    if (of_vectors_) add_parts(parallel, parts, summed ? tasks : 0);
  }

 private:
  // Rows [i, end). Their part of the gradients of weight and bias is added to `sums`, which the
  // first block of a task writes. `part` is scratch.
  void block(int64_t i, int64_t end, const A* weight, A* part, A* sums, bool first) const {
    if (sums == nullptr) {
      rows<false>(i, end, weight, nullptr);
    } else if (first) {
      rows<true>(i, end, weight, sums);
    } else {
      rows<true>(i, end, weight, part);
      for (int64_t j = 0; j < 2 * padded_; ++j) sums[j] += part[j];
    }
  }

  template <bool kVectors>
  void rows(int64_t i, int64_t end, const A* weight, A* part) const {
    if constexpr (kVectors) {
      for (int64_t j = 0; j < 2 * padded_; ++j) part[j] = A(0);
    }
    for (; i < end; ++i) {
      A of_g = 0, of_gz = 0;
      if (p_.grad_out != nullptr) sums_of_row<kVectors>(i, weight, part, of_g, of_gz);
      if (!of_inputs_) continue;
      if (p_.grad_out == nullptr) {
        input_row<false, true>(i, weight, of_g, of_gz);
      } else if (p_.grad_sum == nullptr) {
        input_row<true, false>(i, weight, of_g, of_gz);
      } else {
        input_row<true, true>(i, weight, of_g, of_gz);
      }
    }
  }

  A mean(int64_t i) const { return p_.rms ? A(0) : static_cast<const A*>(p_.mean)[i]; }
  A rstd(int64_t i) const { return static_cast<const A*>(p_.rstd)[i]; }
  const T* sum_row(int64_t i) const { return static_cast<const T*>(p_.sum) + i * p_.sum_stride; }
  const T* grad_row(int64_t i) const {
    return static_cast<const T*>(p_.grad_out) + i * p_.grad_out_stride;
  }

  // The means of g and g o zh over row i, zh = (z - mean) rstd; `part` [2, padded] += the row's dy
  // o zh and dy.
  template <bool kVectors>
  void sums_of_row(int64_t i, const A* weight, A* part, A& of_g, A& of_gz) const {
    const int64_t n = p_.n;
    const T *z = sum_row(i), *dy = grad_row(i);
    const Vec<A> centre = broadcast(mean(i)), scale = broadcast(rstd(i));
    Vec<A> g_total{}, gz_total{};
    for (int64_t j0 = 0; j0 < n; j0 += kNormColumns) {
      Vec<A> g_sum{}, gz_sum{};
      for_vectors<A>(j0, min64(n, j0 + kNormColumns),
                     [&](int64_t j, int64_t count) __attribute__((always_inline)) {
                       const Vec<A> y = load_lanes(dy + j, count);
                       const Vec<A> zh =
                           first_lanes<A>((load_lanes(z + j, count) - centre) * scale, count);
                       const Vec<A> g = weight != nullptr ? y * load_lanes(weight + j, count) : y;
                       g_sum += g;
                       gz_sum += g * zh;
                       if constexpr (kVectors) {
                         store(part + j, load(part + j) + y * zh);
                         store(part + padded_ + j, load(part + padded_ + j) + y);
                       }
                     });
      g_total += g_sum;
      gz_total += gz_sum;
    }
    of_g = p_.rms ? A(0) : reduce_add(g_total) / static_cast<A>(n);
    of_gz = reduce_add(gz_total) / static_cast<A>(n);
  }

  // Row i of the gradients of residual and input.  // E19
  template <bool kNorm, bool kSum>
  void input_row(int64_t i, const A* weight, A of_g, A of_gz) const {
    const int64_t n = p_.n;
    const T *z = sum_row(i), *dy = kNorm ? grad_row(i) : nullptr;
    const T* ds = kSum ? static_cast<const T*>(p_.grad_sum) + i * p_.grad_sum_stride : nullptr;
    T* dr = p_.grad_residual == nullptr ? nullptr : static_cast<T*>(p_.grad_residual) + i * n;
    T* dx = p_.grad_x == nullptr ? nullptr : static_cast<T*>(p_.grad_x) + i * n;
    const bool dropout = dropout_.active && dx != nullptr;
    const Vec<A> centre = broadcast(mean(i)), scale = broadcast(rstd(i));
    const Vec<A> g_mean = broadcast(of_g), gz_mean = broadcast(of_gz);
    A keep[kNormColumns];
    for (int64_t j0 = 0; j0 < n; j0 += kNormColumns) {
      const int64_t end = min64(n, j0 + kNormColumns);
      if (dropout) dropout_.fill_row(keep, i, j0, end - j0);
      for_vectors<A>(j0, end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        Vec<A> dz{};
        if constexpr (kNorm) {
          Vec<A> g = load_lanes(dy + j, count);
          if (weight != nullptr) g = g * load_lanes(weight + j, count);
          const Vec<A> zh = (load_lanes(z + j, count) - centre) * scale;
          dz = (g - g_mean - zh * gz_mean) * scale;
        }
        if constexpr (kSum) dz = kNorm ? dz + load_lanes(ds + j, count) : load_lanes(ds + j, count);
        if (dr != nullptr) store_lanes(dr + j, dz, count);
        if (dropout) dz = dz * load(keep + (j - j0));
        if (dx != nullptr) store_lanes(dx + j, dz, count);
      });
    }
  }

  // The gradients of weight and bias from the tasks' parts.
  void add_parts(Parallel parallel, const A* parts, int64_t tasks) const {
    if (tasks * p_.n < 2 * kLeastNormTask) parallel.threads = 1;
    const int64_t chunks = ceil_div(p_.n, kNormColumns);
    parallel_tasks(parallel, 2 * chunks, [&](int64_t task) {
      void* grad = task < chunks ? p_.grad_w : p_.grad_bias;
      if (grad == nullptr) return;
      const int64_t j0 = task % chunks * kNormColumns, count = min64(kNormColumns, p_.n - j0);
      A sums[kNormColumns] = {};
      for (int64_t t = 0; t < tasks; ++t) {
        const A* part = parts + (2 * t + task / chunks) * padded_ + j0;
        for (int64_t j = 0; j < count; ++j) sums[j] += part[j];
      }
      if (p_.grad_w_is_accumulator) {
        convert(static_cast<A*>(grad) + j0, sums, count);
      } else {
        convert(static_cast<T*>(grad) + j0, sums, count);
      }
    });
  }

  const DropoutAddNormBackwardProblem& p_;
  Dropout dropout_;
  bool of_inputs_, of_vectors_;
  int64_t padded_;
};

template <class T>
void dropout_add_norm_forward(const DropoutAddNormProblem& p, const Parallel& parallel) {
  NormForward<T>(p).run(parallel);
}

template <class T>
void dropout_add_norm_backward(const DropoutAddNormBackwardProblem& p, const Parallel& parallel) {
  NormBackward<T>(p).run(parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
