// Attention on the CPU: validate, allocate, call the kernels of the chosen ISA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/validate_attention.h"
#include "cpu/register_cpu.h"

namespace fastattn::cpu {
namespace {

// A gradient of x, or the output beside q: packed tokens keep the layout [tokens, heads, dim].
Tensor empty_rows(const Tensor& like, const Shape& shape, bool packed) {
  if (!packed) return empty_like_device(like, shape, like.scalar_type());
  const Tensor tokens =
      empty_like_device(like, {shape[0], shape[2], shape[1], shape[3]}, like.scalar_type());
  return torch::stable::transpose(tokens, 1, 2);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& slopes, const OptionalTensor& seed, const OptionalTensor& starts_q,
    const OptionalTensor& starts_k, bool is_causal, double scale, double dropout_p, int64_t left,
    int64_t right, double softcap, int64_t /*max_q*/, int64_t /*max_k*/) {
  const char* op = "attention_forward";
  AttentionInputs in = validate_attention(
      op, query, key, value, attn_mask,
      {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap});
  AttentionProblem& p = in.problem;
  Tensor out = empty_rows(query, in.out_shape(), starts_q.has_value());
  const ScalarType accumulator = accumulator_type(query.scalar_type());
  Tensor lse = empty_like_device(query, in.lse_shape(), accumulator);
  Tensor row_max = empty_like_device(query, in.lse_shape(), accumulator);
  Tensor log_sum = empty_like_device(query, in.lse_shape(), accumulator);
  p.out = view_of(out);
  p.lse = lse.data_ptr();
  p.row_max = row_max.data_ptr();
  p.log_sum = log_sum.data_ptr();
  run_kernel(op, [&] { kernels(p.dtype).attention_forward(p, parallel()); });
  return {out, lse, row_max, log_sum};
}

// What the forward left.
struct ForwardResults {
  Tensor out, row_max, log_sum;

  ForwardResults(const char* op, AttentionInputs& in, const Tensor& o, const Tensor& max,
                 const Tensor& sum)
      : out(unit_last_stride(o)),
        row_max(torch::stable::contiguous(max)),
        log_sum(torch::stable::contiguous(sum)) {
    check_like(op, "out", o, in.query.scalar_type(), in.query);
    check_shape(op, "out", o, in.out_shape());
    const auto check = [&](const char* argument, const Tensor& x) {
      check_like(op, argument, x, accumulator_type(in.query.scalar_type()), in.query);
      check_shape(op, argument, x, in.lse_shape());
    };
    check("row_max", max);
    check("log_sum", sum);
    in.problem.out = view_of(out);
    in.problem.row_max = row_max.data_ptr();
    in.problem.log_sum = log_sum.data_ptr();
  }
};

// The cotangents that a backward takes and the gradients that it leaves.
struct Gradients {
  Tensor grad_out;
  OptionalTensor grad_lse;
  Tensor query, key, value, mask;
  AttentionBackwardProblem problem;

  // needs: of query, key, value and attn_mask, from `needed` on.
  Gradients(const char* op, const AttentionInputs& in, const Tensor& go, const OptionalTensor& gl,
            const OptionalTensor& attn_mask, const std::vector<bool>& needs, size_t needed)
      : grad_out(unit_last_stride(go)),
        query(absent(in.query)),
        key(absent(in.query)),
        value(absent(in.query)),
        mask(absent(in.query)) {
    AttentionBackwardProblem& b = problem;
    const ScalarType dtype = in.query.scalar_type();
    b.forward = in.problem;
    check_like(op, "grad_out", go, dtype, in.query);
    check_shape(op, "grad_out", go, in.out_shape());
    b.grad_out = view_of(grad_out);
    if (gl.has_value()) {
      check_like(op, "grad_lse", *gl, accumulator_type(dtype), in.query);
      check_shape(op, "grad_lse", *gl, in.lse_shape());
      grad_lse = torch::stable::contiguous(*gl);
      b.grad_lse = grad_lse->data_ptr();
    }
    b.needs_q = needs[needed];
    b.needs_k = needs[needed + 1];
    b.needs_v = needs[needed + 2];
    b.needs_mask = needs[needed + 3];
    const bool packed = !in.starts_q.empty();
    const auto gradient = [&](bool wanted, const Tensor& like, Tensor& grad, TensorView& view) {
      if (!wanted) return;
      grad = empty_rows(like, shape_of(like), packed);
      view = view_of(grad);
    };
    gradient(b.needs_q, in.query, query, b.grad_q);
    gradient(b.needs_k, in.key, key, b.grad_k);
    gradient(b.needs_v, in.value, value, b.grad_v);
    if (!b.needs_mask) return;
    const MaskKind kind = in.problem.mask_kind;
    FASTATTN_CHECK(kind == MaskKind::kFloat, op, "attn_mask",
                   "a floating-point mask, as its gradient is needed",
                   kind == MaskKind::kBool ? "bool" : "None");
    const int64_t rank = attn_mask->dim();
    mask = empty_like_device(in.query, shape_of(*attn_mask), dtype);
    b.grad_mask = mask.data_ptr();
    for (int d = 0; d < in.problem.batch_dims; ++d) b.mask_batch_sizes[d] = attn_mask->size(d);
    b.mask_heads = attn_mask->size(rank - 3);
    b.mask_rows = attn_mask->size(rank - 2);
    b.mask_cols = attn_mask->size(rank - 1);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& slopes,
    const OptionalTensor& seed, const OptionalTensor& starts_q, const OptionalTensor& starts_k,
    const Tensor& out, const Tensor& row_max, const Tensor& log_sum, bool is_causal, double scale,
    double dropout_p, int64_t left, int64_t right, double softcap, int64_t /*max_q*/,
    int64_t /*max_k*/, const std::vector<bool>& needs) {
  const char* op = "attention_backward";
  AttentionInputs in = validate_attention(
      op, query, key, value, attn_mask,
      {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap});
  FASTATTN_CHECK(needs.size() == 4, op, "needs", "4 flags (query, key, value, attn_mask)",
                 needs.size());
  const ForwardResults results(op, in, out, row_max, log_sum);
  const Gradients grads(op, in, grad_out, grad_lse, attn_mask, needs, 0);
  run_kernel(op, [&] { kernels(in.problem.dtype).attention_backward(grads.problem, parallel()); });
  return {grads.query, grads.key, grads.value, grads.mask};
}

// The tangents of query, key, value and attn_mask, kept alive and with a unit last stride.
struct Tangents {
  OptionalTensor query, key, value, mask;
  AttentionTangents views;

  Tangents(const char* op, const AttentionInputs& in, const OptionalTensor& q,
           const OptionalTensor& k, const OptionalTensor& v, const OptionalTensor& m,
           const OptionalTensor& attn_mask) {
    const auto take = [&](const char* argument, const OptionalTensor& t, const Tensor& of,
                          OptionalTensor& kept, TensorView& view, bool broadcast) {
      if (!t.has_value()) return;
      check_like(op, argument, *t, of.scalar_type(), in.query);
      check_shape(op, argument, *t, shape_of(of));
      kept = broadcast ? *t : unit_last_stride(*t);
      view = view_of(*kept, broadcast);
    };
    take("t_query", q, in.query, query, views.q, false);
    take("t_key", k, in.key, key, views.k, false);
    take("t_value", v, in.value, value, views.v, false);
    if (!m.has_value()) return;
    FASTATTN_CHECK(in.problem.mask_kind == MaskKind::kFloat, op, "t_mask",
                   "None, as attn_mask is not a floating-point mask", text(shape_of(*m)));
    take("t_mask", m, *attn_mask, mask, views.mask, true);
  }
};

std::tuple<Tensor, Tensor> attention_jvp(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& slopes, const OptionalTensor& seed, const OptionalTensor& starts_q,
    const OptionalTensor& starts_k, const OptionalTensor& t_query, const OptionalTensor& t_key,
    const OptionalTensor& t_value, const OptionalTensor& t_mask, const Tensor& out,
    const Tensor& row_max, const Tensor& log_sum, bool is_causal, double scale, double dropout_p,
    int64_t left, int64_t right, double softcap, int64_t /*max_q*/, int64_t /*max_k*/) {
  const char* op = "attention_jvp";
  AttentionInputs in = validate_attention(
      op, query, key, value, attn_mask,
      {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap});
  const ForwardResults results(op, in, out, row_max, log_sum);
  const Tangents tangents(op, in, t_query, t_key, t_value, t_mask, attn_mask);
  Tensor t_out = empty_rows(query, in.out_shape(), starts_q.has_value());
  Tensor t_lse = empty_like_device(query, in.lse_shape(), accumulator_type(query.scalar_type()));
  AttentionDoubleBackwardProblem s;  // without gradients
  s.backward.forward = in.problem;
  s.tangents = tangents.views;
  s.needs_tangents = true;
  s.t_out = view_of(t_out);
  s.t_lse = t_lse.data_ptr();
  run_kernel(op, [&] { kernels(in.problem.dtype).attention_double_backward(s, parallel()); });
  return {t_out, t_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_double_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const OptionalTensor& attn_mask, const OptionalTensor& slopes,
    const OptionalTensor& seed, const OptionalTensor& starts_q, const OptionalTensor& starts_k,
    const OptionalTensor& t_query, const OptionalTensor& t_key, const OptionalTensor& t_value,
    const OptionalTensor& t_mask, const Tensor& out, const Tensor& row_max, const Tensor& log_sum,
    bool is_causal, double scale, double dropout_p, int64_t left, int64_t right, double softcap,
    int64_t /*max_q*/, int64_t /*max_k*/, const std::vector<bool>& needs) {
  const char* op = "attention_double_backward";
  AttentionInputs in = validate_attention(
      op, query, key, value, attn_mask,
      {slopes, seed, starts_q, starts_k, is_causal, scale, dropout_p, left, right, softcap});
  FASTATTN_CHECK(needs.size() == 5, op, "needs", "5 flags (tangents, query, key, value, attn_mask)",
                 needs.size());
  const ForwardResults results(op, in, out, row_max, log_sum);
  const Tangents tangents(op, in, t_query, t_key, t_value, t_mask, attn_mask);
  const Gradients grads(op, in, grad_out, grad_lse, attn_mask, needs, 1);
  AttentionDoubleBackwardProblem s;
  s.backward = grads.problem;
  s.tangents = tangents.views;
  s.needs_tangents = needs[0];
  Tensor t_out = absent(query);
  if (needs[0]) {
    t_out = empty_rows(query, in.out_shape(), starts_q.has_value());
    s.t_out = view_of(t_out);
  }
  const ScalarType accumulator = accumulator_type(query.scalar_type());
  Tensor t_lse = empty_like_device(query, in.lse_shape(), accumulator);
  const Tensor rest = empty_like_device(query, in.lse_shape(), accumulator);
  const Tensor beta = empty_like_device(query, in.lse_shape(), accumulator);
  s.t_lse = t_lse.data_ptr();
  s.rest = rest.data_ptr();
  s.beta = beta.data_ptr();
  run_kernel(op, [&] { kernels(in.problem.dtype).attention_double_backward(s, parallel()); });
  if (!needs[0]) t_lse = empty_like_device(query, {0}, accumulator);
  return {t_out, t_lse, grads.query, grads.key, grads.value, grads.mask};
}

}  // namespace
}  // namespace fastattn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastattn::cpu::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastattn::cpu::attention_backward));
  m.impl("attention_jvp", TORCH_BOX(&fastattn::cpu::attention_jvp));
  m.impl("attention_double_backward", TORCH_BOX(&fastattn::cpu::attention_double_backward));
}
