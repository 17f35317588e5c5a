// Every kernel of linear layers, forward and backward.
#pragma once

#include <vector>

#include "cpu/kernel_table.h"
#include "numbers.h"

namespace fastattn {

// A layer and the memory that its problem points to.
struct Layer {
  Layer(Dtype dtype, const Numbers& x, int64_t m, int64_t k, int64_t n, Activation activation,
        double dropout_p)
      : w(Numbers::random(dtype, n * k)),
        bias(Numbers::random(dtype, n)),
        y(dtype, m * n),
        derivative(dtype, has_slope(activation) ? m * n : 0),
        bits(static_cast<size_t>(has_slope(activation) ? 0 : m * ((n + 7) / 8))) {
    p.dtype = dtype;
    p.m = m;
    p.n = n;
    p.k = k;
    p.x = x.data();
    p.x_stride = k;
    p.w = w.data();
    p.w_stride = k;
    p.bias = bias.data();
    p.activation = activation;
    p.dropout_p = dropout_p;
    p.seeds = kSeeds;
    p.rows_of_seed = (m + 1) / 2;
    p.y = y.data();
  }

  // Whether the backward needs the activation's slope; for the others a bit is enough.
  static bool has_slope(Activation f) { return f != Activation::kNone && f != Activation::kRelu; }

  // The forward, with what the backward needs or without.
  void forward(bool save) {
    const bool slope = has_slope(p.activation);
    const bool bit = !slope && (p.activation == Activation::kRelu || p.dropout_p > 0);
    p.derivative = save && slope ? derivative.data() : nullptr;
    p.bits = save && bit ? bits.data() : nullptr;
    cpu::kernels(p.dtype).linear_forward(p, kParallel);
    y.expect_written("linear_forward");
    if (p.derivative != nullptr) derivative.expect_written("linear_forward, the derivative");
  }

  // The backward of what the last forward kept, without its gradients.
  LinearBackwardProblem backward(const Numbers& grad_y) const {
    LinearBackwardProblem b = backward_of(p);
    b.grad_y = grad_y.data();
    b.grad_y_stride = p.n;
    b.bits = p.bits;
    b.bits_scale = 1.0 / (1.0 - p.dropout_p);
    b.derivative = p.derivative;
    return b;
  }

  LinearProblem p;
  Numbers w, bias, y, derivative;
  std::vector<uint8_t> bits;
};

// The gradients of layers on one input.
inline void call_backward(std::vector<LinearBackwardProblem> parts) {
  const LinearBackwardProblem& first = parts[0];
  const Dtype of_x = first.grad_x_is_accumulator ? accumulator(first.dtype) : first.dtype;
  const Numbers grad_x(of_x, first.m * first.k);
  std::vector<Numbers> others;
  parts[0].grad_x = grad_x.data();
  for (LinearBackwardProblem& part : parts) {
    others.emplace_back(part.dtype, part.n * part.k);
    part.grad_w = others.back().data();
    others.emplace_back(part.dtype, part.n);
    part.grad_bias = others.back().data();
  }
  cpu::kernels(first.dtype)
      .linear_backward(parts.data(), static_cast<int64_t>(parts.size()), kParallel);
  grad_x.expect_written("linear_backward, the input");
  for (const Numbers& grad : others) grad.expect_written("linear_backward, the parameters");
}

// One layer with a ReLU: all its kernels, and the gradients between the layers of an MLP.
inline void call_relu(Dtype dtype, int64_t m, int64_t k, int64_t n) {
  const auto random = [&](int64_t count) { return Numbers::random(dtype, count); };
  const Numbers x = random(m * k), grad_y = random(m * n);
  Layer layer(dtype, x, m, k, n, Activation::kRelu, 0.0);
  layer.forward(true);
  call_backward({layer.backward(grad_y)});

  const Numbers wide_grad_y = Numbers::random(accumulator(dtype), m * n);
  LinearBackwardProblem between = layer.backward(wide_grad_y);
  between.bits = nullptr;
  between.relu_output = layer.y.data();
  between.grad_y_is_accumulator = between.grad_x_is_accumulator = true;
  call_backward({between});

  const Numbers t_x = random(m * k), t_w = random(n * k), t_bias = random(n), t_y(dtype, m * n);
  const LinearProblem& p = layer.p;
  cpu::kernels(dtype).linear_jvp({dtype, m, n, k, p.x, k, p.w, k, t_x.data(), k, t_w.data(), k,
                                  t_bias.data(), p.bits, t_y.data()},
                                 kParallel);
  t_y.expect_written("linear_jvp");
}

// One layer with any activation and dropout.
inline void call_layer(Dtype dtype, Activation activation, double dropout_p, int64_t m, int64_t k,
                       int64_t n) {
  const Numbers x = Numbers::random(dtype, m * k), grad_y = Numbers::random(dtype, m * n);
  Layer layer(dtype, x, m, k, n, activation, dropout_p);
  layer.forward(false);
  layer.forward(true);
  call_backward({layer.backward(grad_y)});
}

// Layers of several widths on one input, each of which keeps something else for the backward: a
// derivative, bits and nothing.
inline void call_several(Dtype dtype, int64_t m, int64_t k, const std::vector<int64_t>& widths) {
  const Numbers x = Numbers::random(dtype, m * k);
  const Activation activations[] = {Activation::kGelu, Activation::kRelu, Activation::kNone};
  std::vector<Layer> layers;
  std::vector<Numbers> grads;
  for (size_t l = 0; l < widths.size(); ++l) {
    layers.emplace_back(dtype, x, m, k, widths[l], activations[l % 3], 0.0);
    grads.push_back(Numbers::random(dtype, m * widths[l]));
  }
  std::vector<LinearBackwardProblem> parts;
  for (size_t l = 0; l < widths.size(); ++l) {
    layers[l].forward(true);
    parts.push_back(layers[l].backward(grads[l]));
  }
  call_backward(parts);
}

inline void call_gated(Dtype dtype, Activation activation, int64_t m, int64_t k, int64_t n) {
  const auto random = [&](int64_t count) { return Numbers::random(dtype, count); };
  const Numbers x = random(m * k), w_gate = random(n * k), bias_gate = random(n);
  const Numbers of_gate(dtype, m * n), of_up(dtype, m * n), grad_y = random(m * n);
  const Layer up(dtype, x, m, k, n, activation, 0.0);
  GatedLinearProblem p;
  p.up = up.p;
  p.w_gate = w_gate.data();
  p.w_gate_stride = k;
  p.bias_gate = bias_gate.data();
  cpu::kernels(dtype).gated_linear_forward(p, kParallel);
  up.y.expect_written("gated_linear_forward");
  p.up.derivative = of_gate.data();
  p.gate = of_up.data();
  cpu::kernels(dtype).gated_linear_forward(p, kParallel);
  for (const Numbers* result : {&up.y, &of_gate, &of_up})
    result->expect_written("gated_linear_forward");

  LinearBackwardProblem gate = up.backward(grad_y), other = gate;
  gate.w = w_gate.data();
  gate.derivative = of_gate.data();
  other.derivative = of_up.data();
  call_backward({gate, other});
}

}  // namespace fastattn
