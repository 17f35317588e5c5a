// Activations with dropout on the CPU: validate, allocate, call the kernels of the chosen ISA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/validate_linear.h"
#include "cpu/register_cpu.h"

namespace fastattn::cpu {
namespace {

// Z o f(input), or for a gradient grad_out o Z o f'(input).
Tensor activation(const char* op, const OptionalTensor& grad_out, const Tensor& input,
                  int64_t activation, double dropout_p, const OptionalTensor& seed) {
  ActivationProblem p;
  p.dtype = dtype_of(op, "input", input);
  FASTATTN_CHECK(input.dim() >= 1, op, "input", "at least 1 dimension [*, features]",
                 text(shape_of(input)));
  p.n = input.size(input.dim() - 1);
  p.m = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) p.m *= input.size(d);
  p.activation = activation_of(op, activation);
  const OptionalTensor seeds = take_dropout(op, seed, dropout_p, input, p);
  OptionalTensor rows, grad_rows;
  if (!grad_out.has_value() || p.activation != Activation::kNone) {
    rows = as_rows(input, p.m, p.n);
    p.x = rows->data_ptr();
    p.x_stride = rows->stride(0);
  }
  if (grad_out.has_value()) {
    check_like(op, "grad_out", *grad_out, input.scalar_type(), input);
    check_shape(op, "grad_out", *grad_out, shape_of(input));
    grad_rows = as_rows(*grad_out, p.m, p.n);
    p.grad_y = grad_rows->data_ptr();
    p.grad_y_stride = grad_rows->stride(0);
  }
  const Tensor out = empty_like_device(input, shape_of(input), input.scalar_type());
  p.y = out.data_ptr();
  run_kernel(op, [&] { kernels(p.dtype).activation(p, parallel()); });
  return out;
}

Tensor activation_forward(const Tensor& input, int64_t number, double dropout_p,
                          const OptionalTensor& seed) {
  return activation("activation_forward", std::nullopt, input, number, dropout_p, seed);
}

Tensor activation_backward(const Tensor& grad_out, const Tensor& input, int64_t number,
                           double dropout_p, const OptionalTensor& seed) {
  return activation("activation_backward", grad_out, input, number, dropout_p, seed);
}

}  // namespace
}  // namespace fastattn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("activation_forward", TORCH_BOX(&fastattn::cpu::activation_forward));
  m.impl("activation_backward", TORCH_BOX(&fastattn::cpu::activation_backward));
}
