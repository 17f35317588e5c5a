// The results of the forward pass once more, for the derivatives of few queries.
// AttentionFewQueries adds up the products of a score in another order than the blocked passes of
// the derivatives do. Where scores are large their last digits decide: rows of P, made from the
// scores of the blocked passes and the sums of AttentionFewQueries, would not sum to 1, and dO .
// out would not be the mean of dP.
#pragma once

#include "cpu/attention_few_queries.h"
#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

// From such scores on the results are computed once more; below, rounding one changes P by 8 ulp.
constexpr int kLargeScore = 16;

template <class T>
bool any_is_large(const AttentionProblem& p, int64_t rows) {
  using A = Acc<T>;
  const A* row_max = static_cast<const A*>(p.row_max);
  const A unit = ScoreTerms<T>::only_scale(p) ? static_cast<A>(p.scale) : A(1);
  for (int64_t i = 0; i < rows; ++i) {
    const A score = row_max[i] * unit;
    if (score > kLargeScore || (score < -kLargeScore && score != -kInf<A>)) return true;
  }
  return false;
}

template <class T>
class OwnForward {
  using A = Acc<T>;

 public:
  // The problem as the passes behind the forward one take it.
  AttentionProblem problem;

  OwnForward(const AttentionProblem& p, const Parallel& parallel) : problem(p) {
    const int64_t tokens = p.starts_q == nullptr ? p.batch * p.seq_q : p.tokens_q;
    const int64_t rows = p.heads_q * tokens;
    if (!AttentionFewQueries<T>::serves(p) || !any_is_large<T>(p, rows)) return;
    A* row_max = thread_scratch<A>(Scratch::kOwnForward, rows * (2 + p.head_dim_v));
    computed_ = true;
    problem.row_max = row_max;
    problem.log_sum = row_max + rows;
    problem.lse = nullptr;
    TensorView& out = problem.out;  // [*batch, heads, rows, Dv]
    out.data = reinterpret_cast<char*>(row_max + 2 * rows);
    out.row_stride = p.head_dim_v;
    out.head_stride = (p.starts_q == nullptr ? p.seq_q : p.tokens_q) * out.row_stride;
    int64_t stride = p.heads_q * out.head_stride;
    for (int d = p.batch_dims - 1; d >= 0; --d) {
      out.batch_strides[d] = stride;
      stride *= p.batch_sizes[d];
    }
    attention_forward_in_blocks(problem, parallel);
  }
  ~OwnForward() {
    if (computed_) free_thread_scratch(Scratch::kOwnForward);
  }
  OwnForward(const OwnForward&) = delete;
  OwnForward& operator=(const OwnForward&) = delete;

 private:
  bool computed_ = false;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
