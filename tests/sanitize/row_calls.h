// The kernels that take a row at a time: an activation with dropout, a norm of a sum.
#pragma once

#include "cpu/kernel_table.h"
#include "numbers.h"

namespace fastattn {

inline void call_activation(Dtype dtype, Activation activation, double dropout_p, int64_t m,
                            int64_t n) {
  const Numbers x = Numbers::random(dtype, m * n), grad_y = Numbers::random(dtype, m * n);
  for (const bool gradient : {false, true}) {
    const Numbers y(dtype, m * n);
    ActivationProblem p;
    p.dtype = dtype;
    p.m = m;
    p.n = n;
    if (!gradient || activation != Activation::kNone) p.x = x.data();
    p.x_stride = n;
    if (gradient) p.grad_y = grad_y.data();
    p.grad_y_stride = n;
    p.activation = activation;
    p.dropout_p = dropout_p;
    p.seeds = kSeeds;
    p.rows_of_seed = (m + 1) / 2;
    p.y = y.data();
    cpu::kernels(dtype).activation(p, kParallel);
    y.expect_written(gradient ? "activation, the gradient" : "activation");
  }
}

// With weight and bias in the problem's dtype or in the accumulator's.
inline void call_norm(Dtype dtype, bool rms, double dropout_p, bool wide, int64_t m, int64_t n) {
  const Dtype of_weight = wide ? accumulator(dtype) : dtype;
  const Numbers x = Numbers::random(dtype, m * n), residual = Numbers::random(dtype, m * n);
  const Numbers weight = Numbers::random(of_weight, n), bias = Numbers::random(of_weight, n);
  const Numbers out(dtype, m * n), sum(dtype, m * n);
  const Numbers mean(accumulator(dtype), m), rstd(accumulator(dtype), m);
  DropoutAddNormProblem p;
  p.dtype = dtype;
  p.m = m;
  p.n = n;
  p.x = x.data();
  p.x_stride = n;
  p.residual = residual.data();
  p.residual_stride = n;
  p.weight = weight.data();
  p.bias = bias.data();
  p.weight_is_accumulator = p.bias_is_accumulator = wide;
  p.dropout_p = dropout_p;
  p.seeds = kSeeds;
  p.rows_of_seed = (m + 1) / 2;
  p.eps = 1e-5;
  p.rms = rms;
  p.out = out.data();
  p.sum = sum.data();
  if (!rms) p.mean = mean.data();
  p.rstd = rstd.data();
  cpu::kernels(dtype).dropout_add_norm_forward(p, kParallel);
  for (const Numbers* result : {&out, &sum, &rstd})
    result->expect_written("dropout_add_norm_forward");
  if (!rms) mean.expect_written("dropout_add_norm_forward, the mean");

  const Numbers grad_out = Numbers::random(dtype, m * n), grad_sum = Numbers::random(dtype, m * n);
  const Numbers grad_x(dtype, m * n), grad_residual(dtype, m * n);
  const Numbers grad_w(of_weight, n), grad_bias(of_weight, n);
  DropoutAddNormBackwardProblem b;
  b.dtype = dtype;
  b.m = m;
  b.n = n;
  b.grad_out = grad_out.data();
  b.grad_sum = grad_sum.data();
  b.sum = sum.data();
  b.grad_out_stride = b.grad_sum_stride = b.sum_stride = n;
  b.weight = weight.data();
  b.weight_is_accumulator = b.grad_w_is_accumulator = wide;
  b.mean = p.mean;
  b.rstd = rstd.data();
  b.dropout_p = dropout_p;
  b.seeds = kSeeds;
  b.rows_of_seed = p.rows_of_seed;
  b.rms = rms;
  b.grad_x = grad_x.data();
  b.grad_residual = grad_residual.data();
  b.grad_w = grad_w.data();
  b.grad_bias = grad_bias.data();
  cpu::kernels(dtype).dropout_add_norm_backward(b, kParallel);
  for (const Numbers* grad : {&grad_x, &grad_residual, &grad_w, &grad_bias})
    grad->expect_written("dropout_add_norm_backward");
}

}  // namespace fastattn
