// Every kernel on several threads, without torch: `kernels all` is the program for
// ThreadSanitizer. `kernels past_the_end`, `misaligned` and `race` each hold a fault
// that a sanitizer must report inside a kernel.
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/kernel_table.h"
#include "linear_calls.h"
#include "numbers.h"
#include "row_calls.h"
#include "training_calls.h"

namespace {

using namespace fastattn;

struct AttentionShape {
  int64_t batch, heads_q, heads_k, seq_q, seq_k, dim, dim_v;
  MaskKind mask = MaskKind::kNone;
  bool causal = false;
  double dropout_p = 0.0, scale = 0.3;
};

void call_attention(Dtype dtype, const AttentionShape& s) {
  const auto random = [&](int64_t count) { return Numbers::random(dtype, count); };
  const auto view = [&](const Numbers& x, int64_t heads, int64_t rows, int64_t cols) {
    TensorView v;
    v.data = x.data();
    v.batch_strides[0] = heads * rows * cols;
    v.head_stride = rows * cols;
    v.row_stride = cols;
    v.col_stride = 1;
    return v;
  };
  const auto view_q = [&](const Numbers& x) { return view(x, s.heads_q, s.seq_q, s.dim); };
  const auto view_k = [&](const Numbers& x) { return view(x, s.heads_k, s.seq_k, s.dim); };
  const auto view_v = [&](const Numbers& x) { return view(x, s.heads_k, s.seq_k, s.dim_v); };
  const auto view_out = [&](const Numbers& x) { return view(x, s.heads_q, s.seq_q, s.dim_v); };
  const int64_t rows = s.batch * s.heads_q * s.seq_q;
  const int64_t size_q = rows * s.dim, size_out = rows * s.dim_v;
  const int64_t size_k = s.batch * s.heads_k * s.seq_k * s.dim;
  const int64_t size_v = s.batch * s.heads_k * s.seq_k * s.dim_v;
  const cpu::KernelTable& kernels = cpu::kernels(dtype);

  const Numbers q = random(size_q), k = random(size_k), v = random(size_v);
  AttentionProblem p;
  p.dtype = dtype;
  p.batch_dims = 1;
  p.batch = p.batch_sizes[0] = s.batch;
  p.heads_q = s.heads_q;
  p.heads_k = s.heads_k;
  p.seq_q = s.seq_q;
  p.seq_k = s.seq_k;
  p.head_dim = s.dim;
  p.head_dim_v = s.dim_v;
  p.q = view_q(q);
  p.k = view_k(k);
  p.v = view_v(v);
  // A mask of the batch and one of every batch element: its gradient is summed or is not.
  const bool shared = s.mask == MaskKind::kFloat && s.causal;
  const int64_t size_mask = (shared ? 1 : s.batch) * s.heads_q * s.seq_q * s.seq_k;
  const Numbers mask = random(size_mask);
  std::vector<char> bits(static_cast<size_t>(size_mask), 1);
  p.mask_kind = s.mask;
  if (s.mask == MaskKind::kFloat) p.mask = view(mask, s.heads_q, s.seq_q, s.seq_k);
  if (s.mask == MaskKind::kBool) {
    for (size_t i = 0; i < bits.size(); i += 3) bits[i] = 0;
    p.mask = view(mask, s.heads_q, s.seq_q, s.seq_k);
    p.mask.data = bits.data();
  }
  if (shared) p.mask.batch_strides[0] = 0;
  if (s.causal) p.right = 0;
  p.scale = s.scale;
  const int64_t seed = 5;
  p.dropout_p = s.dropout_p;
  p.seeds = &seed;
  const Numbers out(dtype, size_out), lse(accumulator(dtype), rows);
  const Numbers row_max(accumulator(dtype), rows), log_sum(accumulator(dtype), rows);
  p.out = view_out(out);
  p.lse = lse.data();
  p.row_max = row_max.data();
  p.log_sum = log_sum.data();
  kernels.attention_forward(p, kParallel);
  out.expect_written("out");
  lse.expect_written("lse");
  row_max.expect_written("row_max");
  log_sum.expect_written("log_sum");

  const Numbers grad_out = random(size_out), grad_lse = Numbers::random(accumulator(dtype), rows);
  AttentionBackwardProblem b;
  b.forward = p;
  b.grad_out = view_out(grad_out);
  b.grad_lse = grad_lse.data();
  b.needs_q = b.needs_k = b.needs_v = true;
  b.needs_mask = s.mask == MaskKind::kFloat;
  b.mask_batch_sizes[0] = shared ? 1 : s.batch;
  b.mask_heads = s.heads_q;
  b.mask_rows = s.seq_q;
  b.mask_cols = s.seq_k;
  const auto gradients = [&](const char* what, const auto& call) {
    const Numbers of_q(dtype, size_q), of_k(dtype, size_k), of_v(dtype, size_v);
    const Numbers of_mask(dtype, size_mask);
    b.grad_q = view_q(of_q);
    b.grad_k = view_k(of_k);
    b.grad_v = view_v(of_v);
    b.grad_mask = of_mask.data();
    call();
    of_q.expect_written(what);
    of_k.expect_written(what);
    of_v.expect_written(what);
    if (b.needs_mask) of_mask.expect_written(what);
  };
  gradients("attention_backward", [&] { kernels.attention_backward(b, kParallel); });

  const Numbers t_q = random(size_q), t_k = random(size_k), t_v = random(size_v);
  const Numbers t_mask = random(size_mask);
  AttentionTangents tangents{view_q(t_q), view_k(t_k), view_v(t_v), {}};
  if (b.needs_mask) {
    tangents.mask = p.mask;
    tangents.mask.data = t_mask.data();
  }
  const Numbers t_out(dtype, size_out), t_lse(accumulator(dtype), rows);
  AttentionDoubleBackwardProblem forward_mode;
  forward_mode.backward.forward = p;
  forward_mode.tangents = tangents;
  forward_mode.needs_tangents = true;
  forward_mode.t_out = view_out(t_out);
  forward_mode.t_lse = t_lse.data();
  kernels.attention_double_backward(forward_mode, kParallel);
  t_out.expect_written("attention_jvp");
  t_lse.expect_written("attention_jvp");

  gradients("attention_double_backward", [&] {
    const Numbers t_out_again(dtype, size_out), t_lse_again(accumulator(dtype), rows);
    const Numbers rest(accumulator(dtype), rows), beta(accumulator(dtype), rows);
    kernels.attention_double_backward(
        {b, tangents, view_out(t_out_again), t_lse_again.data(), rest.data(), beta.data(), true},
        kParallel);
    t_out_again.expect_written("attention_double_backward");
  });
}

int call_attentions(Dtype dtype) {
  int calls = 0;
  for (const AttentionShape& shape : {
           AttentionShape{4, 4, 2, 30, 50, 16, 16},  // a task owns a unit
           AttentionShape{2, 2, 2, 130, 220, 40, 24, MaskKind::kFloat},
           AttentionShape{2, 2, 1, 130, 220, 40, 24, MaskKind::kFloat, true},
           AttentionShape{2, 2, 2, 130, 220, 24, 40, MaskKind::kBool, true, 0.3},
           AttentionShape{1, 1, 1, 300, 430, 17, 9, MaskKind::kNone, true},  // a block of rows
           AttentionShape{1, 4, 2, 2, 700, 40, 24},                          // few queries
           // with large scores, whose forward pass the others repeat
           AttentionShape{2, 4, 2, 2, 700, 40, 24, MaskKind::kNone, false, 0.0, 30.0},
       }) {
    call_attention(dtype, shape);
    ++calls;
  }
  return calls;
}

int call_layers(Dtype dtype) {
  int calls = 0;
  // A product by blocks, one of much depth, one whose result is written past the caches, and few
  // rows.
  const int64_t shapes[][3] = {
      {200, 64, 300}, {50, 900, 77}, {600, 16, 1024}, {1, 1100, 1500}, {4, 900, 1037}};
  for (const auto& [m, k, n] : shapes) {
    call_relu(dtype, m, k, n);
    ++calls;
  }
  for (int number = 0; number < kActivations; ++number) {
    const auto activation = static_cast<Activation>(number);
    // By blocks, and with few rows, whose weights are not packed.
    const int64_t layers[][3] = {{130, 41, 77}, {2, 700, 301}};
    for (const auto& [m, k, n] : layers) {
      for (const double dropout_p : {0.0, 0.3}) call_layer(dtype, activation, dropout_p, m, k, n);
      call_gated(dtype, activation, m, k, n);
      calls += 3;
    }
    const int64_t rows[][2] = {{3, 700}, {61, 535}};  // one task and several
    for (const auto& [m, n] : rows) {
      for (const double dropout_p : {0.0, 0.3}) call_activation(dtype, activation, dropout_p, m, n);
      calls += 2;
    }
  }
  for (const int64_t m : {2, 17, 150}) {
    call_several(dtype, m, 57, {5, 130, 16});
    call_several(dtype, m, 64, {77, 301});
    calls += 2;
  }
  return calls;
}

int call_norms(Dtype dtype) {
  int calls = 0;
  const int64_t rows[][2] = {{3, 17}, {130, 33}, {41, 1029}};
  for (const auto& [m, n] : rows) {
    for (const bool rms : {false, true}) {
      call_norm(dtype, rms, 0.0, rms, m, n);
      call_norm(dtype, rms, 0.3, !rms, m, n);
      calls += 2;
    }
  }
  return calls;
}

void call_everything() {
  int calls = 0;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16})
    calls += call_attentions(dtype) + call_layers(dtype) + call_norms(dtype);
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64}) calls += call_training_steps(dtype);
  std::printf("%d problems on %d threads, kernels of %s\n", calls, kThreads, cpu::selected_isa());
}

// One linear layer of float, of which the fault makes a mistake of its caller's.
int fault(const std::string& name) {
  const int64_t m = 12, k = 40, n = 23;
  const bool short_by_one = name == "past_the_end", beside = name == "misaligned";
  const Numbers x = Numbers::random(Dtype::kFloat32, m * k - short_by_one);
  const Numbers w = Numbers::random(Dtype::kFloat32, n * k);
  const Numbers bias = Numbers::random(Dtype::kFloat32, n + 1), y(Dtype::kFloat32, m * n);
  LinearProblem p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.x = x.data();
  p.w = w.data();
  p.x_stride = p.w_stride = k;
  p.bias = bias.data() + 2 * beside;
  p.y = y.data();
  const auto call = [&p] { cpu::kernels(p.dtype).linear_forward(p, {1, run_tasks}); };
  if (name == "race") {  // both write y
    std::thread other(call);
    call();
    other.join();
  } else {
    call();
  }
  std::printf("%s: nothing was reported\n", name.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  if (name == "all") {
    call_everything();
    return 0;
  }
  return fault(name);
}
