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
  p.relu = true;
  p.y = out.data_ptr();
  p.relu_mask = static_cast<uint8_t*>(mask.data_ptr());
  run_kernel(op, [&] { kernels(p.dtype).linear_forward(p, parallel()); });
  return {out, mask};
}

// The gradient of a layer's output, folded to [m, n].
Tensor fold(const Tensor& t, int64_t m, int64_t n) {
  const int64_t folded[] = {m, n};
  const Tensor contiguous = unit_last_stride(t);
  return contiguous.dim() == 2 ? contiguous : torch::stable::reshape(contiguous, {folded, 2});
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
  const Tensor go = fold(grad_out, b.m, b.n), bits = torch::stable::contiguous(mask);
  b.grad_y = go.data_ptr();
  b.grad_y_stride = go.stride(0);
  b.relu_mask = static_cast<const uint8_t*>(bits.data_ptr());
  Tensor grad_input = needs[0] ? empty_like_device(input, shape_of(input), dtype) : absent(input);
  Tensor grad_weight = needs[1] ? empty_like_device(input, shape_of(weight), dtype) : absent(input);
  Tensor grad_bias = needs[2] ? empty_like_device(input, {b.n}, dtype) : absent(input);
  if (needs[0]) b.grad_x = grad_input.data_ptr();
  if (needs[1]) b.grad_w = grad_weight.data_ptr();
  if (needs[2]) b.grad_bias = grad_bias.data_ptr();
  run_kernel(op, [&] { kernels(b.dtype).linear_backward(b, parallel()); });
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
    x = fold(*t_input, p.m, p.k);
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
    p.relu = l + 1 < layers.size();
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
      p.relu = !last;
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

  const Tensor go = fold(grad_out, layers.back().problem.m, layers.back().problem.n);
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
    run_kernel(op, [&] { kernels(b.dtype).linear_backward(b, parallel()); });
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
  m.impl("mlp_forward", TORCH_BOX(&fastattn::cpu::mlp_forward));
  m.impl("mlp_inference", TORCH_BOX(&fastattn::cpu::mlp_inference));
  m.impl("mlp_backward", TORCH_BOX(&fastattn::cpu::mlp_backward));
  m.impl("fma_probe", TORCH_BOX(&fastattn::cpu::fma_probe));
}
