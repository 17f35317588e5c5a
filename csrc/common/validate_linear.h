// Linear layers: tensors -> problems, and the only checks of shapes, dtypes and devices that the
// native ops make, for every device. A call that passes them cannot read or write out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/views.h"

namespace fastattn {

// Inputs of a linear layer: x [*, k], w [n, k]; leading dimensions are folded into m.
struct LinearInputs {
  Tensor x, w;
  std::optional<Tensor> bias;
  Shape out_shape;
  LinearProblem problem;
};

inline LinearInputs validate_linear(const char* op, const Tensor& input, const Tensor& weight,
                                    const std::optional<Tensor>& bias) {
  LinearInputs in;
  LinearProblem& p = in.problem;
  p.dtype = dtype_of(op, "input", input);
  FASTATTN_CHECK(input.dim() >= 1, op, "input", "at least 1 dimension [*, in_features]",
                 text(shape_of(input)));
  check_like(op, "weight", weight, input.scalar_type(), input);
  FASTATTN_CHECK(weight.dim() == 2, op, "weight", "2 dimensions [out_features, in_features]",
                 text(shape_of(weight)));
  p.k = input.size(input.dim() - 1);
  p.n = weight.size(0);
  FASTATTN_CHECK(weight.size(1) == p.k, op, "weight",
                 "in_features " + std::to_string(p.k) + " as input's last extent",
                 text(shape_of(weight)));
  in.out_shape = shape_of(input);
  in.out_shape.back() = p.n;
  p.m = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) p.m *= input.size(d);

  const Tensor contiguous = unit_last_stride(input);
  const int64_t folded[] = {p.m, p.k};
  in.x = contiguous.dim() == 2 ? contiguous : torch::stable::reshape(contiguous, {folded, 2});
  in.w = unit_last_stride(weight);
  p.x = in.x.data_ptr();
  p.x_stride = in.x.stride(0);
  p.w = in.w.data_ptr();
  p.w_stride = in.w.stride(0);
  if (bias.has_value()) {
    check_like(op, "bias", *bias, input.scalar_type(), input);
    check_shape(op, "bias", *bias, {p.n});
    in.bias = unit_last_stride(*bias);
    p.bias = in.bias->data_ptr();
  }
  return in;
}

// The activation of that number, one of ops.ACTIVATIONS.
inline Activation activation_of(const char* op, int64_t number) {
  FASTATTN_CHECK(number >= 0 && number < kActivations, op, "activation",
                 "a number below " + std::to_string(kActivations), number);
  return static_cast<Activation>(number);
}

// Whether the tensor stands for no bias: of shape [0] beside a weight with rows.
inline bool is_absent_bias(const Tensor& bias, const Tensor& weight) {
  return bias.dim() == 1 && bias.numel() == 0 && weight.dim() == 2 && weight.size(0) != 0;
}

// Layers on one input.
inline std::vector<LinearInputs> validate_parallel_layers(const char* op, const Tensor& input,
                                                          const std::vector<Tensor>& weights,
                                                          const std::vector<Tensor>& biases) {
  std::vector<LinearInputs> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    std::optional<Tensor> bias;
    if (!is_absent_bias(biases[l], weights[l])) bias = biases[l];
    layers.push_back(validate_linear(op, input, weights[l], bias));
  }
  return layers;
}

// The layers of an MLP: layer l takes hidden[l - 1] (input for l = 0) and has a ReLU unless it is
// the last.
inline std::vector<LinearInputs> validate_layers(const char* op, const Tensor& input,
                                                 const std::vector<Tensor>& weights,
                                                 const std::vector<Tensor>* biases,
                                                 const std::vector<Tensor>& activations) {
  std::vector<LinearInputs> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    std::optional<Tensor> bias;
    if (biases != nullptr && !is_absent_bias((*biases)[l], weights[l])) bias = (*biases)[l];
    layers.push_back(validate_linear(op, l == 0 ? input : activations[l - 1], weights[l], bias));
  }
  return layers;
}

inline void check_layers(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                         const std::vector<Tensor>& biases) {
  FASTATTN_CHECK(!weights.empty(), op, "weights", "at least 1 layer", 0);
  FASTATTN_CHECK(biases.size() == weights.size(), op, "biases",
                 std::to_string(weights.size()) + " tensors", biases.size());
  FASTATTN_CHECK(input.dim() >= 1, op, "input", "at least 1 dimension [*, in_features]",
                 text(shape_of(input)));
  for (const Tensor& weight : weights) {
    FASTATTN_CHECK(weight.dim() == 2, op, "weights", "2 dimensions [out_features, in_features]",
                   text(shape_of(weight)));
  }
}

}  // namespace fastattn
