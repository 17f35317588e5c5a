// Linear layers with an optional ReLU, E15-E16: bias, ReLU and its bit-mask in the forward's
// epilogue; in the backward the mask is applied while dY is loaded and the bias gradient is summed
// on the way.
#pragma once

#include "common/problem.h"
#include "cpu/gemm.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
void linear_forward(const LinearProblem& p, const Parallel& parallel) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);        // [m, k]
  const T* w = static_cast<const T*>(p.w);        // [n, k]
  const T* bias = static_cast<const T*>(p.bias);  // [n]
  T* y = static_cast<T*>(p.y);                    // [m, n]
  const int64_t mask_bytes = ceil_div(p.n, 8);

  const auto load_a = [&](int64_t i0, int64_t rows, bool, A* scratch) -> Strips<A> {
    if constexpr (sizeof(T) == sizeof(A)) {
      return Strips<A>::row_major(x + i0 * p.x_stride, p.x_stride);
    } else {
      for (int64_t i = 0; i < rows; ++i) convert(scratch + i * p.k, x + (i0 + i) * p.x_stride, p.k);
      return Strips<A>::row_major(scratch, p.k);
    }
  };
  const auto load_b = [&](int64_t j0, int64_t cols, A* dst) {
    A* staging = sizeof(T) == sizeof(A) ? nullptr : thread_scratch<A>(6, kPanel<A> * p.k);
    pack_transposed_panel(dst, w + j0 * p.w_stride, p.w_stride, cols, p.k, staging);
  };
  const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {  // E15
    if (bias != nullptr) {
      A b[kPanel<A>];
      convert(b, bias + j0, cols);
      for (int64_t j = 0; j < cols; ++j) row[j] += b[j];
    }
    if (p.relu) {
      // Not max(row, 0): a NaN stays a NaN.
      for (int64_t j = 0; j < cols; ++j) row[j] = row[j] <= A(0) ? A(0) : row[j];
    }
    T* out = y + i * p.n + j0;
    convert(out, row, cols);
    if (p.relu_mask == nullptr) return;
    uint8_t* mask = p.relu_mask + i * mask_bytes + j0 / 8;
    for (int64_t j = 0; j < cols; j += 8) {
      uint8_t byte = 0;
      const int64_t count = min64(8, cols - j);
      // The stored value decides: a positive sum may round to zero in 16 bits.
      for (int64_t t = 0; t < count; ++t)
        byte |= static_cast<uint8_t>(!(to_acc(out[j + t]) <= A(0))) << t;
      mask[j / 8] = byte;
    }
  };
  gemm<A>(p.m, p.n, p.k, load_a, load_b, store_c, parallel);
}

// dst [cols] = row i, columns [j0, j0 + cols), of G = dY o R.  // E16
template <class T>
void load_masked_gradient(const LinearBackwardProblem& p, int64_t i, int64_t j0, int64_t cols,
                          Acc<T>* dst) {
  using A = Acc<T>;
  if (p.grad_y_is_accumulator) {
    convert(dst, static_cast<const A*>(p.grad_y) + i * p.grad_y_stride + j0, cols);
  } else {
    convert(dst, static_cast<const T*>(p.grad_y) + i * p.grad_y_stride + j0, cols);
  }
  if (p.relu_mask != nullptr) {
    const uint8_t* mask = p.relu_mask + i * ceil_div(p.n, 8);
    for (int64_t j = 0; j < cols; ++j) {
      const bool passes = mask[(j0 + j) / 8] >> ((j0 + j) % 8) & 1;
      dst[j] = passes ? dst[j] : A(0);
    }
  } else if (p.relu_output != nullptr) {
    const T* output = static_cast<const T*>(p.relu_output) + i * p.n + j0;
    for (int64_t j = 0; j < cols; ++j) dst[j] = to_acc(output[j]) <= A(0) ? A(0) : dst[j];
  }
}

// One panel of a row-major B [k, n]: columns [j0, j0 + cols) as dst [k, kPanel].
template <class T>
void pack_row_panel(Acc<T>* dst, const T* src, int64_t src_stride, int64_t k, int64_t cols) {
  using A = Acc<T>;
  for (int64_t i = 0; i < k; ++i) {
    convert(dst + i * kPanel<A>, src + i * src_stride, cols);
    for (int64_t j = cols; j < kPanel<A>; ++j) dst[i * kPanel<A> + j] = A(0);
  }
}

// dX [m, k] = G [m, n] W [n, k]
template <class T>
void linear_input_gradient(const LinearBackwardProblem& p, const Parallel& parallel) {
  using A = Acc<T>;
  const T* w = static_cast<const T*>(p.w);
  const auto load_a = [&](int64_t i0, int64_t rows, bool, A* scratch) -> Strips<A> {
    for (int64_t i = 0; i < rows; ++i)
      load_masked_gradient<T>(p, i0 + i, 0, p.n, scratch + i * p.n);
    return Strips<A>::row_major(scratch, p.n);
  };
  const auto load_b = [&](int64_t j0, int64_t cols, A* dst) {
    pack_row_panel(dst, w + j0, p.w_stride, p.n, cols);
  };
  const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
    if (p.grad_x_is_accumulator) {
      convert(static_cast<A*>(p.grad_x) + i * p.k + j0, row, cols);
    } else {
      convert(static_cast<T*>(p.grad_x) + i * p.k + j0, row, cols);
    }
  };
  gemm<A>(p.m, p.k, p.n, load_a, load_b, store_c, parallel);
}

// dW [n, k] = G^T [n, m] X [m, k], db [n] = column sums of G. Without dW only the sums.
template <class T>
void linear_weight_gradient(const LinearBackwardProblem& p, const Parallel& parallel) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  const auto load_a = [&](int64_t j0, int64_t count, bool first_columns, A* scratch) -> Strips<A> {
    A sums[kBlockM] = {}, row[kBlockM];
    for (int64_t i = 0; i < p.m; ++i) {
      load_masked_gradient<T>(p, i, j0, count, row);
      for (int64_t j = 0; j < count; ++j) sums[j] += row[j];
      // Strips [m][6]: the micro-kernel then reads whole cache lines.
      for (int64_t strip = 0; strip < count; strip += kRows) {
        const int64_t width = min64(kRows, count - strip);
        for (int64_t j = 0; j < width; ++j) scratch[strip * p.m + i * kRows + j] = row[strip + j];
      }
    }
    if (first_columns && p.grad_bias != nullptr)
      convert(static_cast<T*>(p.grad_bias) + j0, sums, count);
    return {scratch, kRows * p.m, 1, kRows};
  };
  if (p.grad_w == nullptr || p.k == 0) {
    for (int64_t j0 = 0; j0 < p.n; j0 += kBlockM) {
      load_a(j0, min64(kBlockM, p.n - j0), true, thread_scratch<A>(5, kBlockM * p.m));
    }
    return;
  }
  const auto load_b = [&](int64_t j0, int64_t cols, A* dst) {
    pack_row_panel(dst, x + j0, p.x_stride, p.m, cols);
  };
  const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
    convert(static_cast<T*>(p.grad_w) + i * p.k + j0, row, cols);
  };
  gemm<A>(p.n, p.k, p.m, load_a, load_b, store_c, parallel);
}

template <class T>
void linear_backward(const LinearBackwardProblem& p, const Parallel& parallel) {
  if (p.grad_x != nullptr) linear_input_gradient<T>(p, parallel);
  if (p.grad_w != nullptr || p.grad_bias != nullptr) linear_weight_gradient<T>(p, parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
