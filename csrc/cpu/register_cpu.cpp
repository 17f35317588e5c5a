// The CPU implementations: validate, allocate, call the kernels of the chosen ISA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <tuple>

#include "common/validate.h"
#include "cpu/kernel_table.h"

namespace fastattn::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Tasks are handed out one by one, so that uneven ones (causal blocks) balance. Which thread runs a
// task does not change its result.
void run_tasks(int64_t tasks, Parallel::Body body, const void* context) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) body(context, task);
  });
}

Parallel parallel() { return {static_cast<int>(torch::stable::get_num_threads()), run_tasks}; }

Tensor absent(const Tensor& like) { return empty_like_device(like, {0}, like.scalar_type()); }

// A gradient of x, or the output beside q: packed tokens keep the layout [tokens, heads, dim].
Tensor empty_rows(const Tensor& like, const Shape& shape, bool packed) {
  if (!packed) return empty_like_device(like, shape, like.scalar_type());
  const Tensor tokens =
      empty_like_device(like, {shape[0], shape[2], shape[1], shape[3]}, like.scalar_type());
  return torch::stable::transpose(tokens, 1, 2);
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& slopes, const OptionalTensor& seed, const OptionalTensor& starts_q,
    const OptionalTensor& starts_k, bool is_causal, double scale, double dropout_p, int64_t left,
    int64_t right, double softcap) {
  AttentionInputs in = validate_attention(
      "attention_forward", query, key, value, attn_mask,
      {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap});
  AttentionProblem& p = in.problem;
  Tensor out = empty_rows(query, in.out_shape(), starts_q.has_value());
  Tensor lse = empty_like_device(query, in.lse_shape(), accumulator_type(query.scalar_type()));
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  kernels(p.dtype).attention_forward(p, parallel());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& slopes,
    const Tensor& out, const Tensor& lse, const OptionalTensor& seed,
    const OptionalTensor& starts_q, const OptionalTensor& starts_k, bool is_causal, double scale,
    double dropout_p, int64_t left, int64_t right, double softcap, const std::vector<bool>& needs) {
  const char* op = "attention_backward";
  AttentionInputs in = validate_attention(
      op, query, key, value, attn_mask,
      {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap});
  FASTATTN_CHECK(needs.size() == 4, op, "needs", "4 flags (query, key, value, attn_mask)",
                 needs.size());
  AttentionBackwardProblem b;
  AttentionProblem& p = in.problem;
  const ScalarType dtype = query.scalar_type(), accumulator = accumulator_type(dtype);
  check_like(op, "grad_out", grad_out, dtype, query);
  check_shape(op, "grad_out", grad_out, in.out_shape());
  check_like(op, "out", out, dtype, query);
  check_shape(op, "out", out, in.out_shape());
  check_like(op, "lse", lse, accumulator, query);
  check_shape(op, "lse", lse, in.lse_shape());
  const Tensor go = unit_last_stride(grad_out), o = unit_last_stride(out),
               l = torch::stable::contiguous(lse);
  OptionalTensor gl;
  if (grad_lse.has_value()) {
    check_like(op, "grad_lse", *grad_lse, accumulator, query);
    check_shape(op, "grad_lse", *grad_lse, in.lse_shape());
    gl = torch::stable::contiguous(*grad_lse);
    b.grad_lse = gl->data_ptr();
  }
  p.out = view_of(o);
  p.lse = l.data_ptr();
  b.grad_out = view_of(go);

  const auto gradient = [&](bool needed, const Tensor& like, TensorView& view) {
    if (!needed) return absent(query);
    Tensor grad = empty_rows(like, shape_of(like), starts_q.has_value());
    view = view_of(grad);
    return grad;
  };
  Tensor grad_query = gradient(needs[0], query, b.grad_q);
  Tensor grad_key = gradient(needs[1], key, b.grad_k);
  Tensor grad_value = gradient(needs[2], value, b.grad_v);
  Tensor grad_mask = absent(query);
  b.needs_q = needs[0];
  b.needs_k = needs[1];
  b.needs_v = needs[2];
  b.needs_mask = needs[3];
  if (b.needs_mask) {
    FASTATTN_CHECK(p.mask_kind == MaskKind::kFloat, op, "attn_mask",
                   "a floating-point mask, as its gradient is needed",
                   p.mask_kind == MaskKind::kBool ? "bool" : "None");
    const int64_t rank = attn_mask->dim();
    grad_mask = empty_like_device(query, shape_of(*attn_mask), dtype);
    b.grad_mask = grad_mask.data_ptr();
    for (int d = 0; d < p.batch_dims; ++d) b.mask_batch_sizes[d] = attn_mask->size(d);
    b.mask_heads = attn_mask->size(rank - 3);
    b.mask_rows = attn_mask->size(rank - 2);
    b.mask_cols = attn_mask->size(rank - 1);
  }
  b.forward = p;
  kernels(b.forward.dtype).attention_backward(b, parallel());
  return {grad_query, grad_key, grad_value, grad_mask};
}

std::tuple<Tensor, Tensor> linear_relu_forward(const Tensor& input, const Tensor& weight,
                                               const OptionalTensor& bias) {
  LinearInputs in = validate_linear("linear_relu_forward", input, weight, bias);
  LinearProblem& p = in.problem;
  Tensor out = empty_like_device(input, in.out_shape, input.scalar_type());
  Tensor mask = empty_like_device(input, {p.m, (p.n + 7) / 8}, ScalarType::Byte);
  p.relu = true;
  p.y = out.data_ptr();
  p.relu_mask = static_cast<uint8_t*>(mask.data_ptr());
  kernels(p.dtype).linear_forward(p, parallel());
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
  kernels(b.dtype).linear_backward(b, parallel());
  return {grad_input, grad_weight, grad_bias};
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
    kernels(p.dtype).linear_forward(p, parallel());
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
      kernels(p.dtype).linear_forward(p, parallel());
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
  Tensor grad_y =
      go;  // between layers in the accumulator's type: gradients are not rounded on the way
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
    kernels(b.dtype).linear_backward(b, parallel());
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
  m.impl("attention_forward", TORCH_BOX(&fastattn::cpu::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastattn::cpu::attention_backward));
  m.impl("linear_relu_forward", TORCH_BOX(&fastattn::cpu::linear_relu_forward));
  m.impl("linear_relu_backward", TORCH_BOX(&fastattn::cpu::linear_relu_backward));
  m.impl("mlp_forward", TORCH_BOX(&fastattn::cpu::mlp_forward));
  m.impl("mlp_inference", TORCH_BOX(&fastattn::cpu::mlp_inference));
  m.impl("mlp_backward", TORCH_BOX(&fastattn::cpu::mlp_backward));
  m.impl("fma_probe", TORCH_BOX(&fastattn::cpu::fma_probe));
}
