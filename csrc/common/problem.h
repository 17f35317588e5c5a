// What a kernel is asked to compute: sizes, strides (in elements) and pointers. Knows neither torch
// nor an ISA.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDtypes = 4;

constexpr int kMaxBatchDims = 6;
constexpr int64_t kUnbounded = int64_t{1} << 60;

// A [*batch, heads, rows, cols] view.
struct TensorView {
  char* data = nullptr;
  int64_t batch_strides[kMaxBatchDims] = {};
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
};

enum class MaskKind : int { kNone, kBool, kFloat };

struct AttentionProblem {
  Dtype dtype = Dtype::kFloat32;
  int batch_dims = 0;
  int64_t batch_sizes[kMaxBatchDims] = {};
  int64_t batch = 1;  // product of batch_sizes
  int64_t heads_q = 0, heads_k = 0, seq_q = 0, seq_k = 0, head_dim = 0, head_dim_v = 0;

  // Packed sequences: batch element b is rows [starts_q[b], starts_q[b + 1]) of q and out, and rows
  // [starts_k[b], starts_k[b + 1]) of k and v; seq_q and seq_k are the longest ones' lengths.
  const int64_t* starts_q = nullptr;  // [batch + 1]
  const int64_t* starts_k = nullptr;
  int64_t tokens_q = 0;  // of all sequences

  TensorView q, k, v;  // [*batch, heads, seq, dim], unit last stride
  MaskKind mask_kind = MaskKind::kNone;
  TensorView mask;  // [*batch, heads_q, seq_q, seq_k], stride 0 where it broadcasts
  // Query i sees keys [i - left, i + right]; a causal mask is a right of 0.
  int64_t left = kUnbounded, right = kUnbounded;
  double scale = 1.0;
  double softcap = 0.0;          // 0: none
  const void* slopes = nullptr;  // ALiBi: [slope_batches, heads_q], lse's dtype; may be absent
  int64_t slope_batches = 1;     // divides batch
  double dropout_p = 0.0;
  const int64_t* seeds = nullptr;  // [seed_count]
  int64_t seed_count = 1;          // divides batch

  TensorView out;  // [*batch, heads_q, seq_q, head_dim_v]
  // [batch, heads_q, seq_q] or packed [heads_q, tokens_q], contiguous, fp32 (fp64 for fp64): for
  // users the LSE, which may be absent; for the passes behind the forward one its two parts.
  void* lse = nullptr;
  void* row_max = nullptr;  // of a row's scores, -inf where it sees nothing
  void* log_sum = nullptr;  // of e^{score - row_max}
};

struct AttentionBackwardProblem {
  AttentionProblem forward;
  TensorView grad_out;             // [*batch, heads_q, seq_q, head_dim_v], unit last stride
  const void* grad_lse = nullptr;  // as lse; may be absent
  TensorView grad_q, grad_k, grad_v;
  bool needs_q = false, needs_k = false, needs_v = false, needs_mask = false;

  // The mask's gradient, contiguous in the mask's own shape; an extent of 1 is reduced over.
  void* grad_mask = nullptr;
  int64_t mask_batch_sizes[kMaxBatchDims] = {};
  int64_t mask_heads = 1, mask_rows = 1, mask_cols = 1;
};

// Tangents of a problem's inputs in their shapes; data is null where there is none.
struct AttentionTangents {
  TensorView q, k, v, mask;

  bool of_scores() const { return q.data || k.data || mask.data; }
};

// The derivatives of backward's gradients in the direction of the tangents, left where the
// gradients would be, and the tangents of out (if needed) and lse.
struct AttentionDoubleBackwardProblem {
  AttentionBackwardProblem backward;
  AttentionTangents tangents;
  TensorView t_out;       // [*batch, heads_q, seq_q, head_dim_v]
  void* t_lse = nullptr;  // as lse; written whether needed or not
  void* rest = nullptr;   // as lse, scratch; this and beta where gradients of scores are needed
  void* beta = nullptr;
  bool needs_tangents = false;

  bool needs_gradient_of_scores() const {
    return backward.needs_q || backward.needs_k || backward.needs_mask;
  }
};

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kRelu2, kQuickGelu };
constexpr int kActivations = 7;

// y [m, n] = Z o f(x), f an activation, Z dropout's keep-mask over 1 - p; or, where grad_y is
// there, y = grad_y o Z o f'(x).
struct ActivationProblem {
  Dtype dtype = Dtype::kFloat32;
  int64_t m = 0, n = 0;
  const void* x = nullptr;  // absent for a gradient without an activation
  int64_t x_stride = 0;
  const void* grad_y = nullptr;
  int64_t grad_y_stride = 0;
  Activation activation = Activation::kNone;
  double dropout_p = 0.0;
  const int64_t* seeds = nullptr;
  int64_t rows_of_seed = 1;
  void* y = nullptr;  // contiguous
};

// One linear layer: y [m, n] = Z o f(x [m, k] w[n, k]^T + bias [n]), f an activation, Z dropout's
// keep-mask over 1 - p.
struct LinearProblem {
  Dtype dtype = Dtype::kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;  // between rows; unit last stride, here and below
  const void* w = nullptr;
  int64_t w_stride = 0;
  const void* packed_w = nullptr;  // w as pack_weight left it; may be absent
  const void* bias = nullptr;      // may be absent
  Activation activation = Activation::kNone;
  double dropout_p = 0.0;
  const int64_t* seeds = nullptr;
  int64_t rows_of_seed = 1;
  void* y = nullptr;  // contiguous
  // What the backward multiplies dY by, of which at most one is there: for no activation and ReLU a
  // bit an element, set where its gradient passes, times 1 / (1 - p); for the others Z o f', in the
  // problem's dtype.
  uint8_t* bits = nullptr;     // [m, ceil(n / 8)]
  void* derivative = nullptr;  // [m, n] contiguous
};

// A pair of layers on one input, of which one gates the other: y = f(gate) o up.
struct GatedLinearProblem {
  LinearProblem up;  // its activation is f, its derivative f'(gate) o up
  const void* w_gate = nullptr;
  int64_t w_gate_stride = 0;
  const void* bias_gate = nullptr;  // may be absent
  void* gate = nullptr;             // [m, n] contiguous, f(gate); there where the derivative is
};

// The gradients of a LinearProblem. What dY is multiplied by is given as bits, as the derivative,
// or as a ReLU's output (`y`), or is absent.
struct LinearBackwardProblem {
  Dtype dtype = Dtype::kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void* grad_y = nullptr;
  int64_t grad_y_stride = 0;
  bool grad_y_is_accumulator = false;  // grad_y holds fp32 (fp64 for fp64) whatever the dtype
  const uint8_t* bits = nullptr;       // [m, ceil(n / 8)]
  double bits_scale = 1.0;
  const void* derivative = nullptr;   // [m, n] contiguous
  const void* relu_output = nullptr;  // [m, n] contiguous
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* w = nullptr;
  int64_t w_stride = 0;
  void* grad_x = nullptr;  // contiguous; any of the three may be absent
  bool grad_x_is_accumulator = false;
  void* grad_w = nullptr;
  void* grad_bias = nullptr;
};

// The tangent of a linear layer with a ReLU: t_y [m, n] = R o (t_x w^T + x t_w^T + t_bias), where
// those tangents are.
struct LinearJvpProblem {
  Dtype dtype = Dtype::kFloat32;
  int64_t m = 0, n = 0, k = 0;
  const void* x = nullptr;  // [m, k]
  int64_t x_stride = 0;
  const void* w = nullptr;  // [n, k]
  int64_t w_stride = 0;
  const void* t_x = nullptr;
  int64_t t_x_stride = 0;
  const void* t_w = nullptr;
  int64_t t_w_stride = 0;
  const void* t_bias = nullptr;        // [n]
  const uint8_t* relu_mask = nullptr;  // [m, ceil(n / 8)]
  void* t_y = nullptr;                 // contiguous
};

// out [m, n] = the norm, over its rows, of sum = residual + Z o x, as the sum is kept: rounded.
struct DropoutAddNormProblem {
  Dtype dtype = Dtype::kFloat32;
  int64_t m = 0, n = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* residual = nullptr;  // may be absent
  int64_t residual_stride = 0;
  const void* weight = nullptr;  // [n], may be absent
  bool weight_is_accumulator = false;
  const void* bias = nullptr;  // [n], may be absent
  bool bias_is_accumulator = false;
  double dropout_p = 0.0;
  const int64_t* seeds = nullptr;
  int64_t rows_of_seed = 1;
  double eps = 0.0;
  bool rms = false;
  void* out = nullptr;   // contiguous
  void* sum = nullptr;   // contiguous; absent where x is the sum
  void* mean = nullptr;  // [m] fp32 (fp64 for fp64); absent for rms
  void* rstd = nullptr;  // likewise
};

// The gradients of a DropoutAddNormProblem.
struct DropoutAddNormBackwardProblem {
  Dtype dtype = Dtype::kFloat32;
  int64_t m = 0, n = 0;
  const void* grad_out = nullptr;  // one of the two cotangents may be absent
  int64_t grad_out_stride = 0;
  const void* grad_sum = nullptr;
  int64_t grad_sum_stride = 0;
  const void* sum = nullptr;
  int64_t sum_stride = 0;
  const void* weight = nullptr;  // may be absent
  bool weight_is_accumulator = false;
  const void* mean = nullptr;
  const void* rstd = nullptr;
  double dropout_p = 0.0;
  const int64_t* seeds = nullptr;
  int64_t rows_of_seed = 1;
  bool rms = false;
  void* grad_x = nullptr;  // contiguous; any of the four may be absent
  void* grad_residual = nullptr;
  void* grad_w = nullptr;
  void* grad_bias = nullptr;
  bool grad_w_is_accumulator = false;  // and grad_bias
};

// The backward of a forward, without its gradients and its ReLU.
inline LinearBackwardProblem backward_of(const LinearProblem& p) {
  LinearBackwardProblem b;
  b.dtype = p.dtype;
  b.m = p.m;
  b.n = p.n;
  b.k = p.k;
  b.x = p.x;
  b.x_stride = p.x_stride;
  b.w = p.w;
  b.w_stride = p.w_stride;
  return b;
}

}  // namespace fastattn
