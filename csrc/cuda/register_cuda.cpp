// The CUDA implementations: validate, make strides readable, allocate, launch.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/validate_attention.h"
#include "common/validate_linear.h"
#include "cuda/launch/launch.h"

namespace fastattn::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

// torch's stream on the device. Its function is looked up: the library loads without it, under a
// torch for CPUs.
void* current_stream(const Tensor& t) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(dlsym(torch_cuda == nullptr ? RTLD_DEFAULT : torch_cuda,
                                            "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function != nullptr && function(t.get_device_index(), &stream) == 0,
                  "fastattn: torch gave no CUDA stream");
  return stream;
}

Launch launch_on(const Tensor& t, const Tensor& workspace) {
  return {current_stream(t), static_cast<char*>(workspace.data_ptr())};
}
Tensor workspace_of(const Tensor& t, size_t bytes) {
  return empty_like_device(t, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}
Tensor reshaped(const Tensor& t, const Shape& shape) {
  return torch::stable::reshape(t, {shape.data(), shape.size()});
}

// [*, rows, cols] with the leading dimensions as one, for attention; [batch, heads, rows, cols].
Tensor four_dims(const Tensor& t, int64_t batch) {
  const int64_t rank = t.dim();
  if (rank == 4) return t;
  return reshaped(t, {batch, t.size(rank - 3), t.size(rank - 2), t.size(rank - 1)});
}

// Uninitialised, every row at a multiple of 16 bytes.
Tensor with_aligned_rows(const Tensor& like, Shape shape) {
  const int64_t cols = shape.back();
  shape.back() = (cols + 7) / 8 * 8;
  Tensor wide = empty_like_device(like, shape, like.scalar_type());
  return shape.back() == cols ? wide : torch::stable::narrow(wide, wide.dim() - 1, 0, cols);
}
// The tensor, or a copy, as TMA can read it.
Tensor readable(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool good = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 &&
              (t.size(last) == 1 || t.stride(last) == 1);
  for (int64_t d = 0; good && d < last; ++d)
    good = t.size(d) == 1 || (t.stride(d) > 0 && t.stride(d) % 8 == 0);
  if (good) return t;
  Tensor copy = with_aligned_rows(t, shape_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}
// Contiguous bits of a ReLU, as the kernels read them: by words.
Tensor readable_bits(const Tensor& mask) {
  const Tensor bits = torch::stable::contiguous(mask);
  if (reinterpret_cast<uintptr_t>(bits.data_ptr()) % 4 == 0) return bits;
  Tensor copy = empty_like_device(mask, shape_of(mask), ScalarType::Byte);
  torch::stable::copy_(copy, bits);
  return copy;
}
Tensor as_result(const Tensor& t, const Shape& shape) {
  return reshaped(torch::stable::contiguous(t), shape);
}

void check_supported(const char* op, const std::string& reason) {
  STD_TORCH_CHECK(reason.empty(), "fastattn::", op,
                  ": the CUDA kernels do not serve this: ", reason);
}

// The inputs of an attention op, checked, and their 4-dimensional readable tensors.
struct Attention {
  AttentionInputs in;
  Tensor q, k, v;

  Attention(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
            const OptionalTensor& attn_mask, const AttentionOptions& options, bool backward)
      : in(checked(op, query, key, value, attn_mask, options)) {
    check_supported(op, unsupported(in.problem, backward));
    const int64_t batch = in.problem.batch;
    q = readable(four_dims(in.query, batch));
    k = readable(four_dims(in.key, batch));
    v = readable(four_dims(in.value, batch));
    in.problem.q = view_of(q);
    in.problem.k = view_of(k);
    in.problem.v = view_of(v);
  }
  bool nothing() const {
    const AttentionProblem& p = in.problem;
    return p.batch * p.heads_q * p.seq_q * p.seq_k * p.head_dim * p.head_dim_v == 0;
  }

 private:
  static AttentionInputs checked(const char* op, const Tensor& query, const Tensor& key,
                                 const Tensor& value, const OptionalTensor& attn_mask,
                                 const AttentionOptions& options) {
    // Both would be read on this side.
    check_supported(op, options.dropout_p > 0.0 ? "there is dropout" : "");
    check_supported(op, options.starts_q.has_value() ? "the sequences are packed" : "");
    return validate_attention(op, query, key, value, attn_mask, options);
  }
};

Tensor filled(const Tensor& like, const Shape& shape, ScalarType dtype, double value) {
  Tensor t = empty_like_device(like, shape, dtype);
  return torch::stable::fill_(t, value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& slopes, const OptionalTensor& seed, const OptionalTensor& starts_q,
    const OptionalTensor& starts_k, bool is_causal, double scale, double dropout_p, int64_t left,
    int64_t right, double softcap, int64_t /*max_q*/, int64_t /*max_k*/) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Attention a("attention_forward", query, key, value, attn_mask,
              {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap},
              false);
  AttentionProblem& p = a.in.problem;
  if (a.nothing()) {
    return {filled(query, a.in.out_shape(), query.scalar_type(), 0.0),
            filled(query, a.in.lse_shape(), ScalarType::Float, -INFINITY),
            filled(query, a.in.lse_shape(), ScalarType::Float, -INFINITY),
            filled(query, a.in.lse_shape(), ScalarType::Float, 0.0)};
  }
  Tensor out = with_aligned_rows(query, {p.batch, p.heads_q, p.seq_q, p.head_dim_v});
  Tensor lse = empty_like_device(query, a.in.lse_shape(), ScalarType::Float);
  Tensor row_max = empty_like_device(query, a.in.lse_shape(), ScalarType::Float);
  Tensor log_sum = empty_like_device(query, a.in.lse_shape(), ScalarType::Float);
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  p.row_max = row_max.data_ptr();
  p.log_sum = log_sum.data_ptr();
  const Tensor workspace = workspace_of(query, attention_forward_workspace(p));
  launch_attention_forward(p, launch_on(query, workspace));
  return {as_result(out, a.in.out_shape()), lse, row_max, log_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& slopes,
    const OptionalTensor& seed, const OptionalTensor& starts_q, const OptionalTensor& starts_k,
    const Tensor& out, const Tensor& row_max, const Tensor& log_sum, bool is_causal, double scale,
    double dropout_p, int64_t left, int64_t right, double softcap, int64_t /*max_q*/,
    int64_t /*max_k*/, const std::vector<bool>& needs) {
  const char* op = "attention_backward";
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Attention a(op, query, key, value, attn_mask,
              {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap},
              true);
  AttentionProblem& p = a.in.problem;
  const ScalarType dtype = query.scalar_type();
  FASTATTN_CHECK(needs.size() == 4, op, "needs", "4 flags (query, key, value, attn_mask)",
                 needs.size());
  FASTATTN_CHECK(!needs[3], op, "attn_mask", "a floating-point mask, as its gradient is needed",
                 p.mask_kind == MaskKind::kBool ? "bool" : "None");
  check_like(op, "grad_out", grad_out, dtype, query);
  check_shape(op, "grad_out", grad_out, a.in.out_shape());
  check_like(op, "out", out, dtype, query);
  check_shape(op, "out", out, a.in.out_shape());
  check_like(op, "row_max", row_max, ScalarType::Float, query);
  check_shape(op, "row_max", row_max, a.in.lse_shape());
  check_like(op, "log_sum", log_sum, ScalarType::Float, query);
  check_shape(op, "log_sum", log_sum, a.in.lse_shape());
  const Tensor absent = empty_like_device(query, {0}, dtype);
  if (a.nothing()) {
    const auto zeros = [&](bool needed, const Tensor& like) {
      return needed ? filled(query, shape_of(like), dtype, 0.0) : absent;
    };
    return {zeros(needs[0], query), zeros(needs[1], key), zeros(needs[2], value), absent};
  }
  const Tensor go = readable(four_dims(unit_last_stride(grad_out), p.batch));
  const Tensor o = four_dims(unit_last_stride(out), p.batch);
  const Tensor maxima = torch::stable::contiguous(row_max);
  const Tensor sums = torch::stable::contiguous(log_sum);
  AttentionBackwardProblem b;
  OptionalTensor gl;
  if (grad_lse.has_value()) {
    check_like(op, "grad_lse", *grad_lse, ScalarType::Float, query);
    check_shape(op, "grad_lse", *grad_lse, a.in.lse_shape());
    gl = torch::stable::contiguous(*grad_lse);
    b.grad_lse = gl->data_ptr();
  }
  p.out = view_of(o);
  p.row_max = maxima.data_ptr();
  p.log_sum = sums.data_ptr();
  b.grad_out = view_of(go);
  // One kernel makes dK and dV whether or not both are asked for.
  Tensor grad_q = needs[0] ? empty_like_device(query, shape_of(query), dtype) : absent;
  Tensor grad_k = with_aligned_rows(query, {p.batch, p.heads_k, p.seq_k, p.head_dim});
  Tensor grad_v = with_aligned_rows(query, {p.batch, p.heads_k, p.seq_k, p.head_dim_v});
  b.needs_q = needs[0];
  if (needs[0]) b.grad_q = view_of(four_dims(grad_q, p.batch));
  b.grad_k = view_of(grad_k);
  b.grad_v = view_of(grad_v);
  b.forward = p;
  const Tensor workspace = workspace_of(query, attention_backward_workspace(b));
  launch_attention_backward(b, launch_on(query, workspace));
  return {grad_q, needs[1] ? as_result(grad_k, shape_of(key)) : absent,
          needs[2] ? as_result(grad_v, shape_of(value)) : absent, absent};
}

void make_readable(LinearInputs& in, bool input_too = true) {
  if (input_too) in.x = readable(in.x);
  in.w = readable(in.w);
  in.problem.x = in.x.data_ptr();
  in.problem.x_stride = in.x.stride(0);
  in.problem.w = in.w.data_ptr();
  in.problem.w_stride = in.w.stride(0);
}

// Inputs of a linear op, checked, as TMA can read them.
LinearInputs linear_inputs(const char* op, const Tensor& input, const Tensor& weight,
                           const OptionalTensor& bias) {
  LinearInputs in = validate_linear(op, input, weight, bias);
  const LinearProblem& p = in.problem;
  check_supported(op, unsupported_linear(p.dtype, p.m, p.n, p.k));
  make_readable(in);
  return in;
}

std::tuple<Tensor, Tensor> linear_relu_forward(const Tensor& input, const Tensor& weight,
                                               const OptionalTensor& bias) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  LinearInputs in = linear_inputs("linear_relu_forward", input, weight, bias);
  LinearProblem& p = in.problem;
  Tensor out = empty_like_device(input, in.out_shape, input.scalar_type());
  Tensor mask = empty_like_device(input, {p.m, (p.n + 7) / 8}, ScalarType::Byte);
  p.y = out.data_ptr();
  p.bits = static_cast<uint8_t*>(mask.data_ptr());
  const Tensor workspace = workspace_of(input, linear_forward_workspace(p));
  launch_linear_forward(p, launch_on(input, workspace));
  return {out, mask};
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_out, const Tensor& input,
                                                        const Tensor& weight, const Tensor& mask,
                                                        const std::vector<bool>& needs) {
  const char* op = "linear_relu_backward";
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const LinearInputs in = linear_inputs(op, input, weight, std::nullopt);
  const LinearProblem& p = in.problem;
  FASTATTN_CHECK(needs.size() == 3, op, "needs", "3 flags (input, weight, bias)", needs.size());
  const ScalarType dtype = input.scalar_type();
  check_like(op, "grad_out", grad_out, dtype, input);
  check_shape(op, "grad_out", grad_out, in.out_shape);
  check_like(op, "mask", mask, ScalarType::Byte, input);
  check_shape(op, "mask", mask, {p.m, (p.n + 7) / 8});
  const Tensor go = readable(reshaped(unit_last_stride(grad_out), {p.m, p.n}));
  const Tensor bits = readable_bits(mask), absent = empty_like_device(input, {0}, dtype);
  LinearBackwardProblem b = backward_of(p);
  b.grad_y = go.data_ptr();
  b.grad_y_stride = go.stride(0);
  b.bits = static_cast<const uint8_t*>(bits.data_ptr());
  const auto gradient = [&](bool needed, const Shape& shape, void*& data) {
    if (!needed) return absent;
    Tensor grad = empty_like_device(input, shape, dtype);
    data = grad.data_ptr();
    return grad;
  };
  Tensor grad_input = gradient(needs[0], shape_of(input), b.grad_x);
  Tensor grad_weight = gradient(needs[1] || needs[2], shape_of(weight), b.grad_w);
  Tensor grad_bias = gradient(needs[2], {p.n}, b.grad_bias);
  const Tensor workspace = workspace_of(input, linear_backward_workspace(b));
  launch_linear_backward(b, launch_on(input, workspace));
  return {grad_input, needs[1] ? grad_weight : absent, grad_bias};
}

// The layers of an MLP, checked, as TMA can read them; what keeps their memory alive.
struct MlpLayers {
  std::vector<LinearInputs> inputs;
  std::vector<LinearProblem> problems;

  MlpLayers(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
            const std::vector<Tensor>* biases, const std::vector<Tensor>& activations)
      : inputs(validate_layers(op, input, weights, biases, activations)) {
    const bool forward = biases != nullptr;  // which has no use for what is between the layers
    for (LinearInputs& in : inputs) {
      make_readable(in, problems.empty() || !forward);
      problems.push_back(in.problem);
    }
    check_supported(op, unsupported_mlp(problems.data(), problems.size()));
  }
};

// [out, h_1, ...]; only out where the hidden activations are not kept.
std::vector<Tensor> mlp(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                        const std::vector<Tensor>& biases, bool keep) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  check_layers(op, input, weights, biases);
  std::vector<Tensor> activations;
  for (const Tensor& weight : weights) {
    Shape shape = shape_of(input);
    shape.back() = weight.size(0);
    activations.push_back(empty_like_device(input, shape, input.scalar_type()));
  }
  MlpLayers layers(op, input, weights, &biases, activations);
  for (size_t l = 0; l < weights.size(); ++l) {
    if (keep || l + 1 == weights.size()) layers.problems[l].y = activations[l].data_ptr();
  }
  launch_mlp_forward(layers.problems.data(), weights.size(), {current_stream(input), nullptr});
  std::vector<Tensor> result = {activations.back()};
  if (keep) result.insert(result.end(), activations.begin(), activations.end() - 1);
  return result;
}

std::vector<Tensor> mlp_forward(const Tensor& input, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& biases) {
  return mlp("mlp_forward", input, weights, biases, true);
}
Tensor mlp_inference(const Tensor& input, const std::vector<Tensor>& weights,
                     const std::vector<Tensor>& biases) {
  return mlp("mlp_inference", input, weights, biases, false)[0];
}

std::vector<Tensor> mlp_backward(const Tensor& grad_out, const Tensor& input,
                                 const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& hidden,
                                 const std::vector<bool>& needs) {
  const char* op = "mlp_backward";
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const size_t count = weights.size();
  FASTATTN_CHECK(count > 0, op, "weights", "at least 1 layer", 0);
  FASTATTN_CHECK(hidden.size() + 1 == count, op, "hidden", std::to_string(count - 1) + " tensors",
                 hidden.size());
  FASTATTN_CHECK(needs.size() == 1 + 2 * count, op, "needs",
                 std::to_string(1 + 2 * count) + " flags", needs.size());
  const ScalarType dtype = input.scalar_type();
  std::vector<Tensor> kept;  // the ReLU is read from these: contiguous
  for (const Tensor& h : hidden) kept.push_back(torch::stable::contiguous(h));
  const MlpLayers layers(op, input, weights, nullptr, kept);
  for (size_t l = 0; l + 1 < count; ++l)
    check_shape(op, "hidden", kept[l], layers.inputs[l].out_shape);
  check_like(op, "grad_out", grad_out, dtype, input);
  check_shape(op, "grad_out", grad_out, layers.inputs.back().out_shape);
  const LinearProblem& last = layers.problems.back();
  const Tensor go = readable(reshaped(unit_last_stride(grad_out), {last.m, last.n}));
  const Tensor absent = empty_like_device(input, {0}, dtype);
  std::vector<Tensor> grads(1 + 2 * count, absent), alive;
  const auto gradient = [&](size_t index, bool wanted, const Shape& shape, void*& data) {
    if (!wanted) return;
    Tensor grad = empty_like_device(input, shape, dtype);
    data = grad.data_ptr();
    alive.push_back(grad);
    if (needs[index]) grads[index] = grad;
  };
  std::vector<LinearBackwardProblem> problems(count);
  for (size_t l = 0; l < count; ++l) {
    const LinearProblem& p = layers.problems[l];
    LinearBackwardProblem& b = problems[l] = backward_of(p);
    if (l + 1 < count) b.relu_output = kept[l].data_ptr();
    const bool needs_bias = needs[1 + count + l];
    gradient(1 + l, needs[1 + l] || needs_bias, shape_of(weights[l]), b.grad_w);
    gradient(1 + count + l, needs_bias, {p.n}, b.grad_bias);
  }
  gradient(0, needs[0], shape_of(input), problems[0].grad_x);
  problems.back().grad_y = go.data_ptr();
  problems.back().grad_y_stride = go.stride(0);
  const Tensor workspace = workspace_of(input, mlp_backward_workspace(problems.data(), count));
  launch_mlp_backward(problems.data(), count, launch_on(input, workspace));
  return grads;
}

}  // namespace
}  // namespace fastattn::cuda

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&fastattn::cuda::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastattn::cuda::attention_backward));
  m.impl("linear_relu_forward", TORCH_BOX(&fastattn::cuda::linear_relu_forward));
  m.impl("linear_relu_backward", TORCH_BOX(&fastattn::cuda::linear_relu_backward));
  m.impl("mlp_forward", TORCH_BOX(&fastattn::cuda::mlp_forward));
  m.impl("mlp_inference", TORCH_BOX(&fastattn::cuda::mlp_inference));
  m.impl("mlp_backward", TORCH_BOX(&fastattn::cuda::mlp_backward));
}
