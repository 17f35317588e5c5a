// Attention: tensors -> problems, and the only checks of shapes, dtypes and devices that the native
// ops make, for every device. A call that passes them cannot read or write out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/views.h"

namespace fastattn {

// The options of an attention op, as its schema has them.
struct AttentionOptions {
  const std::optional<Tensor>& slopes;
  const std::optional<Tensor>& seed;
  const std::optional<Tensor>& starts_q;
  const std::optional<Tensor>& starts_k;
  bool is_causal;
  double scale, dropout_p;
  int64_t left, right;
  double softcap;
};

// Inputs of an attention op, kept alive and with a unit last stride.
struct AttentionInputs {
  Tensor query, key, value;
  std::optional<Tensor> mask, slopes, seed;
  std::vector<int64_t> starts_q, starts_k;  // empty unless the sequences are packed
  AttentionProblem problem;

  Shape batch_shape() const { return {query.sizes().begin(), query.sizes().end() - 3}; }
  Shape shape(int64_t heads, int64_t rows) const {
    Shape s = batch_shape();
    s.insert(s.end(), {heads, rows});
    return s;
  }
  Shape shape(int64_t heads, int64_t rows, int64_t cols) const {
    Shape s = shape(heads, rows);
    s.push_back(cols);
    return s;
  }
  Shape lse_shape() const { return {query.sizes().begin(), query.sizes().end() - 1}; }
  Shape out_shape() const {
    Shape s = lse_shape();
    s.push_back(problem.head_dim_v);
    return s;
  }
};

// Starts of packed sequences: [B + 1] integers from 0 to `tokens` that never fall.
inline std::vector<int64_t> sequence_starts(const char* op, const char* argument, const Tensor& t,
                                            int64_t tokens) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  FASTATTN_CHECK(wide || t.scalar_type() == ScalarType::Int, op, argument, "int32 or int64",
                 torch::headeronly::toString(t.scalar_type()));
  FASTATTN_CHECK(t.is_cpu(), op, argument, "a tensor on the CPU", "another device");
  FASTATTN_CHECK(t.dim() == 1 && t.size(0) > 0, op, argument, "shape [B + 1]", text(shape_of(t)));
  const Tensor contiguous = torch::stable::contiguous(t);
  std::vector<int64_t> starts;
  for (int64_t b = 0; b < t.size(0); ++b) {
    starts.push_back(wide ? static_cast<const int64_t*>(contiguous.data_ptr())[b]
                          : static_cast<const int32_t*>(contiguous.data_ptr())[b]);
  }
  FASTATTN_CHECK(starts.front() == 0 && starts.back() == tokens &&
                     std::is_sorted(starts.begin(), starts.end()),
                 op, argument, "starts from 0 to " + std::to_string(tokens) + " that never fall",
                 text(starts));
  return starts;
}

inline int64_t longest(const std::vector<int64_t>& starts) {
  int64_t length = 0;
  for (size_t b = 1; b < starts.size(); ++b) length = std::max(length, starts[b] - starts[b - 1]);
  return length;
}

// Each of these checks an argument, or several, and takes it into the problem.

inline void take_sizes(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                       AttentionInputs& in) {
  AttentionProblem& p = in.problem;
  p.dtype = dtype_of(op, "query", query);
  const int64_t rank = query.dim();
  FASTATTN_CHECK(rank >= 3 && rank <= kMaxBatchDims + 3, op, "query",
                 "3 to 9 dimensions [*batch, heads, seq, dim]", text(shape_of(query)));
  check_like(op, "key", key, query.scalar_type(), query);
  check_like(op, "value", value, query.scalar_type(), query);
  FASTATTN_CHECK(key.dim() == rank, op, "key", "the rank of query, " + std::to_string(rank),
                 text(shape_of(key)));
  FASTATTN_CHECK(value.dim() == rank, op, "value", "the rank of query, " + std::to_string(rank),
                 text(shape_of(value)));

  p.batch_dims = static_cast<int>(rank - 3);
  for (int d = 0; d < p.batch_dims; ++d) {
    p.batch_sizes[d] = query.size(d);
    p.batch *= query.size(d);
  }
  p.heads_q = query.size(rank - 3);
  p.heads_k = key.size(rank - 3);
  p.seq_q = query.size(rank - 2);
  p.seq_k = key.size(rank - 2);
  p.head_dim = query.size(rank - 1);
  p.head_dim_v = value.size(rank - 1);
  check_shape(op, "key", key, in.shape(p.heads_k, p.seq_k, p.head_dim));
  check_shape(op, "value", value, in.shape(p.heads_k, p.seq_k, p.head_dim_v));
  const bool divides = p.heads_k == 0 ? p.heads_q == 0 : p.heads_q % p.heads_k == 0;
  FASTATTN_CHECK(divides, op, "key",
                 "a number of heads that divides query's " + std::to_string(p.heads_q), p.heads_k);
}

inline void take_numbers(const char* op, const AttentionOptions& options, AttentionProblem& p) {
  const double scale = options.scale, dropout_p = options.dropout_p;
  FASTATTN_CHECK(std::isfinite(scale), op, "scale", "a finite number", scale);
  FASTATTN_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p", "a probability in [0, 1)",
                 dropout_p);
  FASTATTN_CHECK(dropout_p == 0.0 || options.seed.has_value(), op, "seed",
                 "an int64 tensor, as dropout_p > 0", "None");
  FASTATTN_CHECK(std::isfinite(options.softcap) && options.softcap >= 0.0, op, "softcap",
                 "0 or a positive number", options.softcap);
  for (const int64_t bound : {options.left, options.right}) {
    FASTATTN_CHECK(bound >= -1 && bound < kUnbounded, op, "window_size",
                   "two numbers >= 0, or -1 for unbounded", bound);
  }
  p.left = options.left < 0 ? kUnbounded : options.left;
  p.right = options.right < 0 ? kUnbounded : options.right;
  if (options.is_causal) p.right = 0;
  p.softcap = options.softcap;
  p.scale = scale;
  p.dropout_p = dropout_p;
}

inline void take_seed(const char* op, const Tensor& query, const Tensor& seed,
                      AttentionInputs& in) {
  check_like(op, "seed", seed, ScalarType::Long, query);
  FASTATTN_CHECK(seed.numel() >= 1, op, "seed", "at least 1 element", 0);
  in.seed = torch::stable::contiguous(seed);
  in.problem.seeds = static_cast<const int64_t*>(in.seed->data_ptr());
  in.problem.seed_count = seed.numel();
}

inline void take_mask(const char* op, const Tensor& query, const Tensor& mask, bool packed,
                      AttentionInputs& in) {
  AttentionProblem& p = in.problem;
  const bool is_bool = mask.scalar_type() == ScalarType::Bool;
  FASTATTN_CHECK(is_bool || mask.scalar_type() == query.scalar_type(), op, "attn_mask",
                 "bool or the dtype of query", torch::headeronly::toString(mask.scalar_type()));
  check_like(op, "attn_mask", mask, mask.scalar_type(), query);
  const Shape full = in.shape(p.heads_q, p.seq_q, p.seq_k);
  bool broadcasts = mask.dim() == query.dim();
  for (int64_t d = 0; broadcasts && d < query.dim(); ++d)
    broadcasts = mask.size(d) == 1 || mask.size(d) == full[d];
  FASTATTN_CHECK(broadcasts, op, "attn_mask",
                 "the rank of query and extents of 1 or of " + text(full), text(shape_of(mask)));
  FASTATTN_CHECK(!packed, op, "attn_mask", "None beside packed sequences", text(shape_of(mask)));
  in.mask = mask;
  p.mask_kind = is_bool ? MaskKind::kBool : MaskKind::kFloat;
  p.mask = view_of(mask, true);
}

inline void take_packed(const char* op, const Tensor& query, const Tensor& starts_q,
                        const Tensor& starts_k, AttentionInputs& in) {
  AttentionProblem& p = in.problem;
  FASTATTN_CHECK(query.dim() == 4 && query.size(0) == 1, op, "query", "[1, heads, tokens, dim]",
                 text(shape_of(query)));
  in.starts_q = sequence_starts(op, "starts_q", starts_q, p.seq_q);
  in.starts_k = sequence_starts(op, "starts_k", starts_k, p.seq_k);
  FASTATTN_CHECK(in.starts_k.size() == in.starts_q.size(), op, "starts_k",
                 std::to_string(in.starts_q.size()) + " entries as starts_q", in.starts_k.size());
  p.batch = static_cast<int64_t>(in.starts_q.size()) - 1;
  p.starts_q = in.starts_q.data();
  p.starts_k = in.starts_k.data();
  p.tokens_q = p.seq_q;
  p.seq_q = longest(in.starts_q);
  p.seq_k = longest(in.starts_k);
}

inline void take_slopes(const char* op, const Tensor& query, const Tensor& slopes,
                        AttentionInputs& in) {
  AttentionProblem& p = in.problem;
  check_like(op, "alibi_slopes", slopes, accumulator_type(query.scalar_type()), query);
  if (slopes.dim() == 2) {
    FASTATTN_CHECK(slopes.size(1) == p.heads_q && slopes.size(0) >= (p.batch > 0) &&
                       (slopes.size(0) == 0 || p.batch % slopes.size(0) == 0),
                   op, "alibi_slopes",
                   text({p.heads_q}) + " or [n, heads], n a divisor of the batch of " +
                       std::to_string(p.batch),
                   text(shape_of(slopes)));
    p.slope_batches = std::max<int64_t>(1, slopes.size(0));
  } else {
    check_shape(op, "alibi_slopes", slopes, {p.heads_q});
  }
  in.slopes = torch::stable::contiguous(slopes);
  p.slopes = in.slopes->data_ptr();
}

inline AttentionInputs validate_attention(const char* op, const Tensor& query, const Tensor& key,
                                          const Tensor& value, const std::optional<Tensor>& mask,
                                          const AttentionOptions& options) {
  AttentionInputs in{.query = query, .key = key, .value = value};
  AttentionProblem& p = in.problem;
  take_sizes(op, query, key, value, in);
  take_numbers(op, options, p);
  if (options.dropout_p > 0.0) take_seed(op, query, *options.seed, in);
  in.query = unit_last_stride(query);
  in.key = unit_last_stride(key);
  in.value = unit_last_stride(value);
  p.q = view_of(in.query);
  p.k = view_of(in.key);
  p.v = view_of(in.value);
  if (mask.has_value()) take_mask(op, query, *mask, options.starts_q.has_value(), in);
  FASTATTN_CHECK(options.starts_q.has_value() == options.starts_k.has_value(), op, "starts_k",
                 options.starts_q.has_value() ? "a tensor as starts_q" : "None as starts_q",
                 options.starts_k.has_value() ? "a tensor" : "None");
  if (options.starts_q.has_value())
    take_packed(op, query, *options.starts_q, *options.starts_k, in);
  FASTATTN_CHECK(p.batch % p.seed_count == 0, op, "seed",
                 "a number of elements that divides the batch of " + std::to_string(p.batch),
                 p.seed_count);
  if (options.slopes.has_value()) take_slopes(op, query, *options.slopes, in);
  return in;
}

}  // namespace fastattn
