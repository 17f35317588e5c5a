// Dropout, residual sum and norm: tensors -> problems, and the only checks of shapes, dtypes and
// devices that the native ops make, for every device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "common/views.h"

namespace fastattn {

// The tensors whose memory a problem reads; copies where the caller's do not fit.
struct NormInputs {
  Tensor x;  // or the sum, of a backward
  std::optional<Tensor> residual, weight, bias, seed, grad_out, grad_sum, mean, rstd;
};

struct NormForwardInputs : NormInputs {
  DropoutAddNormProblem problem;
};

struct NormBackwardInputs : NormInputs {
  DropoutAddNormBackwardProblem problem;
};

// A tensor of first's shape and dtype as rows: its data and row stride.
inline void take_rows(const char* op, const char* argument, const std::optional<Tensor>& t,
                      const Tensor& first, int64_t m, int64_t n, std::optional<Tensor>& kept,
                      const void*& data, int64_t& stride) {
  if (!t.has_value()) return;
  check_like(op, argument, *t, first.scalar_type(), first);
  check_shape(op, argument, *t, shape_of(first));
  kept = as_rows(*t, m, n);
  data = kept->data_ptr();
  stride = kept->stride(0);
}

// A vector [n] of first's dtype or the accumulator's.
inline void take_vector(const char* op, const char* argument, const std::optional<Tensor>& t,
                        const Tensor& first, int64_t n, std::optional<Tensor>& kept,
                        const void*& data, bool& is_accumulator) {
  if (!t.has_value()) return;
  const ScalarType dtype = first.scalar_type(), wide = accumulator_type(dtype);
  is_accumulator = t->scalar_type() == wide;
  check_like(op, argument, *t, is_accumulator ? wide : dtype, first);
  check_shape(op, argument, *t, {n});
  kept = unit_last_stride(*t);
  data = kept->data_ptr();
}

// The rows of x, the dropout and its seeds: fields that both problems have.
template <class Problem>
Tensor take_norm(const char* op, const char* argument, const Tensor& x,
                 const std::optional<Tensor>& seed, double dropout_p, bool rms, NormInputs& in,
                 Problem& p) {
  p.dtype = dtype_of(op, argument, x);
  FASTATTN_CHECK(x.dim() >= 1, op, argument, "at least 1 dimension [*, features]",
                 text(shape_of(x)));
  p.n = x.size(x.dim() - 1);
  p.m = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) p.m *= x.size(d);
  p.rms = rms;
  in.seed = take_dropout(op, seed, dropout_p, x, p);
  return as_rows(x, p.m, p.n);
}

inline NormForwardInputs validate_norm(const char* op, const Tensor& input,
                                       const std::optional<Tensor>& residual,
                                       const std::optional<Tensor>& weight,
                                       const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& seed, double dropout_p,
                                       double eps, bool rms) {
  NormForwardInputs in;
  DropoutAddNormProblem& p = in.problem;
  in.x = take_norm(op, "input", input, seed, dropout_p, rms, in, p);
  p.x = in.x.data_ptr();
  p.x_stride = in.x.stride(0);
  take_rows(op, "residual", residual, input, p.m, p.n, in.residual, p.residual, p.residual_stride);
  take_vector(op, "weight", weight, input, p.n, in.weight, p.weight, p.weight_is_accumulator);
  take_vector(op, "bias", bias, input, p.n, in.bias, p.bias, p.bias_is_accumulator);
  FASTATTN_CHECK(eps >= 0.0, op, "eps", "a number of at least 0", eps);
  p.eps = eps;
  return in;
}

inline NormBackwardInputs validate_norm_backward(
    const char* op, const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_sum,
    const Tensor& sum, const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd,
    const std::optional<Tensor>& seed, double dropout_p, bool rms, const std::vector<bool>& needs) {
  NormBackwardInputs in;
  DropoutAddNormBackwardProblem& p = in.problem;
  in.x = take_norm(op, "sum", sum, seed, dropout_p, rms, in, p);
  p.sum = in.x.data_ptr();
  p.sum_stride = in.x.stride(0);
  FASTATTN_CHECK(grad_out.has_value() || grad_sum.has_value(), op, "grad_out",
                 "a tensor where grad_sum is None", "None");
  take_rows(op, "grad_out", grad_out, sum, p.m, p.n, in.grad_out, p.grad_out, p.grad_out_stride);
  take_rows(op, "grad_sum", grad_sum, sum, p.m, p.n, in.grad_sum, p.grad_sum, p.grad_sum_stride);
  take_vector(op, "weight", weight, sum, p.n, in.weight, p.weight, p.weight_is_accumulator);
  const ScalarType wide = accumulator_type(sum.scalar_type());
  check_like(op, "mean", mean, wide, sum);
  check_shape(op, "mean", mean, {rms ? 0 : p.m});
  check_like(op, "rstd", rstd, wide, sum);
  check_shape(op, "rstd", rstd, {p.m});
  in.mean = unit_last_stride(mean);
  in.rstd = unit_last_stride(rstd);
  p.mean = in.mean->data_ptr();
  p.rstd = in.rstd->data_ptr();
  FASTATTN_CHECK(needs.size() == 4, op, "needs", "4 flags (input, residual, weight, bias)",
                 needs.size());
  p.grad_w_is_accumulator = p.weight != nullptr && p.weight_is_accumulator;
  return in;
}

}  // namespace fastattn
