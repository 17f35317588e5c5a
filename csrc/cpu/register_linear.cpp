// Linear layers on the CPU: validate, allocate, call the kernels of the chosen ISA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/validate_linear.h"
#include "cpu/register_cpu.h"

namespace fastattn::cpu {
namespace {

std::tuple<Tensor, Tensor> linear_relu_forward(const Tensor& input, const Tensor& weight,
                                               const OptionalTensor& bias) {
  const char* op = "linear_relu_forward";
  LinearInputs in = validate_linear(op, input, weight, bias);
  LinearProblem& p = in.problem;
  Tensor out = empty_like_device(input, in.out_shape, input.scalar_type());
  Tensor mask = empty_like_device(input, {p.m, (p.n + 7) / 8}, ScalarType::Byte);
  p.activation = Activation::kRelu;
  p.y = out.data_ptr();
  p.bits = static_cast<uint8_t*>(mask.data_ptr());
  run_kernel(op, [&] { kernels(p.dtype).linear_forward(p, parallel()); });
  return {out, mask};
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_out, const Tensor& input,
                                                        const Tensor& weight, const Tensor& mask,
                                                        const std::vector<bool>& needs) {
  const char* op = "linear_relu_backward";
  const LinearInputs in = validate_linear(op, input, weight, std::nullopt);
  FASTATTN_CHECK(needs.size() == 3, op, "needs", "3 flags (input, weight, bias)", needs.size());
  LinearBackwardProblem b = backward_of(in.problem);
  const ScalarType dtype = input.scalar_type();
  check_like(op, "grad_out", grad_out, dtype, input);
  check_shape(op, "grad_out", grad_out, in.out_shape);
  check_like(op, "mask", mask, ScalarType::Byte, input);
  check_shape(op, "mask", mask, {b.m, (b.n + 7) / 8});
  const Tensor go = as_rows(grad_out, b.m, b.n), bits = torch::stable::contiguous(mask);
  b.grad_y = go.data_ptr();
  b.grad_y_stride = go.stride(0);
  b.bits = static_cast<const uint8_t*>(bits.data_ptr());
  Tensor grad_input = needs[0] ? empty_like_device(input, shape_of(input), dtype) : absent(input);
  Tensor grad_weight = needs[1] ? empty_like_device(input, shape_of(weight), dtype) : absent(input);
  Tensor grad_bias = needs[2] ? empty_like_device(input, {b.n}, dtype) : absent(input);
  if (needs[0]) b.grad_x = grad_input.data_ptr();
  if (needs[1]) b.grad_w = grad_weight.data_ptr();
  if (needs[2]) b.grad_bias = grad_bias.data_ptr();
  run_kernel(op, [&] { kernels(b.dtype).linear_backward(&b, 1, parallel()); });
  return {grad_input, grad_weight, grad_bias};
}

Tensor linear_relu_jvp(const Tensor& input, const Tensor& weight, const Tensor& mask,
                       const OptionalTensor& t_input, const OptionalTensor& t_weight,
                       const OptionalTensor& t_bias) {
  const char* op = "linear_relu_jvp";
  const LinearInputs in = validate_linear(op, input, weight, std::nullopt);
  const LinearProblem& p = in.problem;
  const ScalarType dtype = input.scalar_type();
  check_like(op, "mask", mask, ScalarType::Byte, input);
  check_shape(op, "mask", mask, {p.m, (p.n + 7) / 8});
  const Tensor bits = torch::stable::contiguous(mask);
  LinearJvpProblem j{p.dtype, p.m, p.n, p.k, p.x, p.x_stride, p.w, p.w_stride};
  j.relu_mask = static_cast<const uint8_t*>(bits.data_ptr());
  OptionalTensor x, w, b;
  if (t_input.has_value()) {
    check_like(op, "t_input", *t_input, dtype, input);
    check_shape(op, "t_input", *t_input, shape_of(input));
    x = as_rows(*t_input, p.m, p.k);
    j.t_x = x->data_ptr();
    j.t_x_stride = x->stride(0);
  }
  if (t_weight.has_value()) {
    check_like(op, "t_weight", *t_weight, dtype, input);
    check_shape(op, "t_weight", *t_weight, shape_of(weight));
    w = unit_last_stride(*t_weight);
    j.t_w = w->data_ptr();
    j.t_w_stride = w->stride(0);
  }
  if (t_bias.has_value()) {
    check_like(op, "t_bias", *t_bias, dtype, input);
    check_shape(op, "t_bias", *t_bias, {p.n});
    b = unit_last_stride(*t_bias);
    j.t_bias = b->data_ptr();
  }
  Tensor t_out = empty_like_device(input, in.out_shape, dtype);
  j.t_y = t_out.data_ptr();
  run_kernel(op, [&] { kernels(p.dtype).linear_jvp(j, parallel()); });
  return t_out;
}

// Layers on one input: [out of each, what each one's backward multiplies its gradient by]. The
// latter are bits, of the layer's dtype, or empty where there is nothing to multiply by.
std::vector<Tensor> linear_forward(const Tensor& input, const std::vector<Tensor>& weights,
                                   const std::vector<Tensor>& biases,
                                   const std::vector<Tensor>& packed, int64_t activation,
                                   double dropout_p, const OptionalTensor& seed, bool save) {
  const char* op = "linear_forward";
  FASTATTN_CHECK(packed.empty() || packed.size() == weights.size(), op, "packed",
                 "none or " + std::to_string(weights.size()) + " tensors", packed.size());
  check_layers(op, input, weights, biases);
  FASTATTN_CHECK(dropout_p == 0.0 || weights.size() == 1, op, "dropout_p", "0 with several weights",
                 dropout_p);
  const Activation f = activation_of(op, activation);
  const bool is_bits = f == Activation::kNone || f == Activation::kRelu;
  std::vector<LinearInputs> layers = validate_parallel_layers(op, input, weights, biases);
  const OptionalTensor seeds = take_dropout(op, seed, dropout_p, input, layers[0].problem);
  std::vector<Tensor> outs, saved;
  for (size_t l = 0; l < layers.size(); ++l) {
    LinearInputs& layer = layers[l];
    LinearProblem& p = layer.problem;
    p.activation = f;
    if (!packed.empty()) {
      check_like(op, "packed", packed[l], accumulator_type(input.scalar_type()), input);
      check_shape(op, "packed", packed[l],
                  {kernels(p.dtype).packed_weight_words(p.dtype, p.n, p.k)});
      FASTATTN_CHECK(packed[l].is_contiguous(), op, "packed", "a contiguous tensor", "another one");
      p.packed_w = packed[l].data_ptr();
    }
    outs.push_back(empty_like_device(input, layer.out_shape, input.scalar_type()));
    p.y = outs.back().data_ptr();
    if (save && is_bits && (f == Activation::kRelu || dropout_p > 0.0)) {
      saved.push_back(empty_like_device(input, {p.m, (p.n + 7) / 8}, ScalarType::Byte));
      p.bits = static_cast<uint8_t*>(saved.back().data_ptr());
    } else if (save && !is_bits) {
      saved.push_back(empty_like_device(input, layer.out_shape, input.scalar_type()));
      p.derivative = saved.back().data_ptr();
    } else {
      saved.push_back(absent(input));
    }
    run_kernel(op, [&] { kernels(p.dtype).linear_forward(p, parallel()); });
  }
  outs.insert(outs.end(), saved.begin(), saved.end());
  return outs;
}

// A weight [n, k] as this processor's kernels read it; as large, but for padding.
Tensor pack_weight(const Tensor& weight) {
  const char* op = "pack_weight";
  LinearProblem p;
  p.dtype = dtype_of(op, "weight", weight);
  FASTATTN_CHECK(weight.dim() == 2, op, "weight", "2 dimensions [out_features, in_features]",
                 text(shape_of(weight)));
  const Tensor w = unit_last_stride(weight);
  p.n = weight.size(0);
  p.k = weight.size(1);
  p.w = w.data_ptr();
  p.w_stride = w.stride(0);
  const Shape shape = {kernels(p.dtype).packed_weight_words(p.dtype, p.n, p.k)};
  const Tensor packed = empty_like_device(weight, shape, accumulator_type(weight.scalar_type()));
  run_kernel(op, [&] { kernels(p.dtype).pack_weight(p, packed.data_ptr(), parallel()); });
  return packed;
}

// f(input gate_weight^T + gate_bias) o (input weight^T + bias), and what the backward multiplies
// its gradient by: for the gate, then for the other.
std::tuple<Tensor, Tensor, Tensor> gated_linear_forward(
    const Tensor& input, const Tensor& gate_weight, const Tensor& weight,
    const OptionalTensor& gate_bias, const OptionalTensor& bias, int64_t activation, bool save) {
  const char* op = "gated_linear_forward";
  const LinearInputs gate = validate_linear(op, input, gate_weight, gate_bias);
  LinearInputs up = validate_linear(op, input, weight, bias);
  FASTATTN_CHECK(gate.problem.n == up.problem.n, op, "weight",
                 "gate_weight's shape " + text(shape_of(gate_weight)), text(shape_of(weight)));
  const ScalarType dtype = input.scalar_type();
  const Tensor out = empty_like_device(input, up.out_shape, dtype);
  const Tensor of_gate = save ? empty_like_device(input, up.out_shape, dtype) : absent(input);
  const Tensor of_up = save ? empty_like_device(input, up.out_shape, dtype) : absent(input);
  GatedLinearProblem p;
  p.up = up.problem;
  p.up.activation = activation_of(op, activation);
  p.up.y = out.data_ptr();
  if (save) p.up.derivative = of_gate.data_ptr();
  if (save) p.gate = of_up.data_ptr();
  p.w_gate = gate.problem.w;
  p.w_gate_stride = gate.problem.w_stride;
  p.bias_gate = gate.problem.bias;
  run_kernel(op, [&] { kernels(p.up.dtype).gated_linear_forward(p, parallel()); });
  return {out, of_gate, of_up};
}

// The gradients of layers on one input: of the input, of each weight, of each bias.
std::vector<Tensor> linear_backward(const std::vector<Tensor>& grads, const Tensor& input,
                                    const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& saved, double dropout_p,
                                    const std::vector<bool>& needs) {
  const char* op = "linear_backward";
  const size_t count = weights.size();
  FASTATTN_CHECK(count > 0, op, "weights", "at least 1 layer", 0);
  FASTATTN_CHECK(grads.size() == count, op, "grads", std::to_string(count) + " tensors",
                 grads.size());
  FASTATTN_CHECK(saved.size() == count, op, "saved", std::to_string(count) + " tensors",
                 saved.size());
  FASTATTN_CHECK(needs.size() == 1 + 2 * count, op, "needs",
                 std::to_string(1 + 2 * count) + " flags", needs.size());
  FASTATTN_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p", "a probability in [0, 1)",
                 dropout_p);
  const ScalarType dtype = input.scalar_type();
  std::vector<LinearInputs> layers;
  std::vector<LinearBackwardProblem> parts;
  std::vector<Tensor> kept, results;
  results.push_back(needs[0] ? empty_like_device(input, shape_of(input), dtype) : absent(input));
  for (size_t l = 0; l < count; ++l) {
    layers.push_back(validate_linear(op, input, weights[l], std::nullopt));
    LinearBackwardProblem b = backward_of(layers.back().problem);
    check_like(op, "grads", grads[l], dtype, input);
    check_shape(op, "grads", grads[l], layers.back().out_shape);
    kept.push_back(as_rows(grads[l], b.m, b.n));
    b.grad_y = kept.back().data_ptr();
    b.grad_y_stride = kept.back().stride(0);
    if (saved[l].scalar_type() == ScalarType::Byte) {
      check_like(op, "saved", saved[l], ScalarType::Byte, input);
      check_shape(op, "saved", saved[l], {b.m, (b.n + 7) / 8});
      kept.push_back(torch::stable::contiguous(saved[l]));
      b.bits = static_cast<const uint8_t*>(kept.back().data_ptr());
      b.bits_scale = 1.0 / (1.0 - dropout_p);
    } else if (saved[l].dim() != 1 || saved[l].numel() != 0) {
      check_like(op, "saved", saved[l], dtype, input);
      check_shape(op, "saved", saved[l], layers.back().out_shape);
      kept.push_back(torch::stable::contiguous(saved[l]));
      b.derivative = kept.back().data_ptr();
    }
    if (l == 0 && needs[0]) b.grad_x = results[0].data_ptr();
    parts.push_back(b);
  }
  for (size_t l = 0; l < count; ++l) {
    const bool need = needs[1 + l];
    results.push_back(need ? empty_like_device(input, shape_of(weights[l]), dtype) : absent(input));
    if (need) parts[l].grad_w = results.back().data_ptr();
  }
  for (size_t l = 0; l < count; ++l) {
    const bool need = needs[1 + count + l];
    results.push_back(need ? empty_like_device(input, {parts[l].n}, dtype) : absent(input));
    if (need) parts[l].grad_bias = results.back().data_ptr();
  }
  run_kernel(op, [&] {
    kernels(parts[0].dtype).linear_backward(parts.data(), static_cast<int64_t>(count), parallel());
  });
  return results;
}

std::vector<Tensor> mlp_forward(const Tensor& input, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& biases) {
  const char* op = "mlp_forward";
  check_layers(op, input, weights, biases);
  std::vector<Tensor> activations;
  for (const Tensor& weight : weights) {
    Shape shape = shape_of(input);
    shape.back() = weight.size(0);
    activations.push_back(empty_like_device(input, shape, input.scalar_type()));
  }
  std::vector<LinearInputs> layers = validate_layers(op, input, weights, &biases, activations);
  for (size_t l = 0; l < layers.size(); ++l) {
    LinearProblem& p = layers[l].problem;
    if (l + 1 < layers.size()) p.activation = Activation::kRelu;
    p.y = activations[l].data_ptr();
    run_kernel(op, [&] { kernels(p.dtype).linear_forward(p, parallel()); });
  }
  std::vector<Tensor> result = {activations.back()};
  result.insert(result.end(), activations.begin(), activations.end() - 1);
  return result;
}

// As mlp_forward's first result. Rows go through all layers kInferenceRows at a time: what lies
// between the layers is never there whole.
Tensor mlp_inference(const Tensor& input, const std::vector<Tensor>& weights,
                     const std::vector<Tensor>& biases) {
  constexpr int64_t kInferenceRows = 1920;  // so many that packing the weights again costs nothing
  const char* op = "mlp_inference";
  check_layers(op, input, weights, biases);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) rows *= input.size(d);
  const int64_t chunk = std::min(rows, kInferenceRows);
  std::vector<Tensor> hidden;
  for (size_t l = 0; l + 1 < weights.size(); ++l)
    hidden.push_back(empty_like_device(input, {chunk, weights[l].size(0)}, input.scalar_type()));
  std::vector<LinearInputs> layers = validate_layers(op, input, weights, &biases, hidden);
  Shape shape = shape_of(input);
  shape.back() = weights.back().size(0);
  const Tensor out = empty_like_device(input, shape, input.scalar_type());
  const auto bytes = static_cast<int64_t>(input.element_size());
  for (int64_t first = 0; first < rows; first += chunk) {
    for (size_t l = 0; l < layers.size(); ++l) {
      const bool last = l + 1 == layers.size();
      LinearProblem p = layers[l].problem;
      p.m = std::min(chunk, rows - first);
      if (!last) p.activation = Activation::kRelu;
      if (l == 0) p.x = static_cast<const char*>(p.x) + first * p.x_stride * bytes;
      p.y = last ? static_cast<char*>(out.data_ptr()) + first * p.n * bytes
                 : static_cast<char*>(hidden[l].data_ptr());
      run_kernel(op, [&] { kernels(p.dtype).linear_forward(p, parallel()); });
    }
  }
  return out;
}

std::vector<Tensor> mlp_backward(const Tensor& grad_out, const Tensor& input,
                                 const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& hidden,
                                 const std::vector<bool>& needs) {
  const char* op = "mlp_backward";
  const size_t count = weights.size();
  FASTATTN_CHECK(count > 0, op, "weights", "at least 1 layer", 0);
  FASTATTN_CHECK(hidden.size() + 1 == count, op, "hidden", std::to_string(count - 1) + " tensors",
                 hidden.size());
  FASTATTN_CHECK(needs.size() == 1 + 2 * count, op, "needs",
                 std::to_string(1 + 2 * count) + " flags", needs.size());
  const ScalarType dtype = input.scalar_type();
  std::vector<Tensor> kept;  // the ReLU is read from these: contiguous
  for (const Tensor& h : hidden) kept.push_back(torch::stable::contiguous(h));
  const std::vector<LinearInputs> layers = validate_layers(op, input, weights, nullptr, kept);
  for (size_t l = 0; l + 1 < count; ++l) check_shape(op, "hidden", kept[l], layers[l].out_shape);
  check_like(op, "grad_out", grad_out, dtype, input);
  check_shape(op, "grad_out", grad_out, layers.back().out_shape);

  std::vector<Tensor> grads(1 + 2 * count, absent(input));
  size_t first = 0;  // no layer below this one needs anything
  while (first < count && !needs[1 + first] && !needs[1 + count + first]) ++first;
  if (needs[0]) first = 0;

  const Tensor go = as_rows(grad_out, layers.back().problem.m, layers.back().problem.n);
  // Between layers in the accumulator's type: gradients are not rounded on the way.
  Tensor grad_y = go;
  for (size_t l = count; l-- > first;) {
    LinearBackwardProblem b = backward_of(layers[l].problem);
    b.grad_y = grad_y.data_ptr();
    b.grad_y_stride = grad_y.stride(0);
    b.grad_y_is_accumulator = l + 1 < count;
    if (l + 1 < count) b.relu_output = kept[l].data_ptr();
    if (needs[1 + l]) {
      grads[1 + l] = empty_like_device(input, shape_of(weights[l]), dtype);
      b.grad_w = grads[1 + l].data_ptr();
    }
    if (needs[1 + count + l]) {
      grads[1 + count + l] = empty_like_device(input, {b.n}, dtype);
      b.grad_bias = grads[1 + count + l].data_ptr();
    }
    Tensor grad_x = grad_y;
    if (l > first) {
      grad_x = empty_like_device(input, {b.m, b.k}, accumulator_type(dtype));
      b.grad_x = grad_x.data_ptr();
      b.grad_x_is_accumulator = true;
    } else if (l == 0 && needs[0]) {
      grads[0] = empty_like_device(input, shape_of(input), dtype);
      b.grad_x = grads[0].data_ptr();
    }
    run_kernel(op, [&] { kernels(b.dtype).linear_backward(&b, 1, parallel()); });
    grad_y = grad_x;
  }
  return grads;
}

// The floating-point operations that all threads did, each `iterations` rounds of independent
// multiply-adds in `like`'s accumulator type: timed, the roof of every kernel.
int64_t fma_probe(const Tensor& like, int64_t iterations) {
  const Dtype dtype = dtype_of("fma_probe", "like", like);
  std::atomic<int64_t> flops{0};
  const auto body = [&](int64_t) { flops += kernels(dtype).fma_probe(dtype, iterations); };
  const Parallel threads = parallel();
  threads.run(
      threads.threads,
      [](const void* f, int64_t i) { (*static_cast<const decltype(body)*>(f))(i); }, &body);
  return flops;
}

}  // namespace
}  // namespace fastattn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("linear_relu_forward", TORCH_BOX(&fastattn::cpu::linear_relu_forward));
  m.impl("linear_relu_backward", TORCH_BOX(&fastattn::cpu::linear_relu_backward));
  m.impl("linear_relu_jvp", TORCH_BOX(&fastattn::cpu::linear_relu_jvp));
  m.impl("linear_forward", TORCH_BOX(&fastattn::cpu::linear_forward));
  m.impl("pack_weight", TORCH_BOX(&fastattn::cpu::pack_weight));
  m.impl("gated_linear_forward", TORCH_BOX(&fastattn::cpu::gated_linear_forward));
  m.impl("linear_backward", TORCH_BOX(&fastattn::cpu::linear_backward));
  m.impl("mlp_forward", TORCH_BOX(&fastattn::cpu::mlp_forward));
  m.impl("mlp_inference", TORCH_BOX(&fastattn::cpu::mlp_inference));
  m.impl("mlp_backward", TORCH_BOX(&fastattn::cpu::mlp_backward));
  m.impl("fma_probe", TORCH_BOX(&fastattn::cpu::fma_probe));
}
