// Dropout, residual sum and norm on the CPU: validate, allocate, call the kernels of the chosen
// ISA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/validate_norm.h"
#include "cpu/register_cpu.h"

namespace fastattn::cpu {
namespace {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors dropout_add_norm_forward(const Tensor& input, const OptionalTensor& residual,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& seed, double dropout_p, double eps,
                                     bool rms) {
  const char* op = "dropout_add_norm_forward";
  NormForwardInputs in =
      validate_norm(op, input, residual, weight, bias, seed, dropout_p, eps, rms);
  DropoutAddNormProblem& p = in.problem;
  const ScalarType dtype = input.scalar_type(), wide = accumulator_type(dtype);
  const bool is_input = !residual.has_value() && dropout_p == 0.0;
  Tensor out = empty_like_device(input, shape_of(input), dtype);
  Tensor sum = is_input ? absent(input) : empty_like_device(input, shape_of(input), dtype);
  Tensor mean = empty_like_device(input, {rms ? 0 : p.m}, wide);
  Tensor rstd = empty_like_device(input, {p.m}, wide);
  p.out = out.data_ptr();
  if (!is_input) p.sum = sum.data_ptr();
  if (!rms) p.mean = mean.data_ptr();
  p.rstd = rstd.data_ptr();
  run_kernel(op, [&] { kernels(p.dtype).dropout_add_norm_forward(p, parallel()); });
  return {out, sum, mean, rstd};
}

FourTensors dropout_add_norm_backward(const OptionalTensor& grad_out,
                                      const OptionalTensor& grad_sum, const Tensor& sum,
                                      const OptionalTensor& weight, const Tensor& mean,
                                      const Tensor& rstd, const OptionalTensor& seed,
                                      double dropout_p, bool rms, const std::vector<bool>& needs) {
  const char* op = "dropout_add_norm_backward";
  NormBackwardInputs in = validate_norm_backward(op, grad_out, grad_sum, sum, weight, mean, rstd,
                                                 seed, dropout_p, rms, needs);
  DropoutAddNormBackwardProblem& p = in.problem;
  const ScalarType dtype = sum.scalar_type();
  const ScalarType of_weight = weight.has_value() ? weight->scalar_type() : dtype;
  const auto gradient = [&](size_t number, const Shape& shape, ScalarType kind, void*& data) {
    const Tensor grad = empty_like_device(sum, needs[number] ? shape : Shape{0}, kind);
    if (needs[number]) data = grad.data_ptr();
    return grad;
  };
  const Tensor grad_input = gradient(0, shape_of(sum), dtype, p.grad_x);
  const Tensor grad_residual = gradient(1, shape_of(sum), dtype, p.grad_residual);
  const Tensor grad_weight = gradient(2, {p.n}, of_weight, p.grad_w);
  const Tensor grad_bias = gradient(3, {p.n}, of_weight, p.grad_bias);
  run_kernel(op, [&] { kernels(p.dtype).dropout_add_norm_backward(p, parallel()); });
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastattn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("dropout_add_norm_forward", TORCH_BOX(&fastattn::cpu::dropout_add_norm_forward));
  m.impl("dropout_add_norm_backward", TORCH_BOX(&fastattn::cpu::dropout_add_norm_backward));
}
