// The kernels of one ISA, in all dtypes. Each file of cpu/kernels/ defines some of them and is
// compiled once per ISA, with that ISA's flags and its name as FASTATTN_ISA (setup.py).
#pragma once

#include "common/parallel.h"
#include "common/problem.h"
#include "common/training_problem.h"
#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

void attention_forward(const AttentionProblem& p, const Parallel& parallel);
// The blocked passes, however few the queries are: derivatives compute their results once more.
void attention_forward_in_blocks(const AttentionProblem& p, const Parallel& parallel);
void attention_backward(const AttentionBackwardProblem& b, const Parallel& parallel);
void attention_double_backward(const AttentionDoubleBackwardProblem& s, const Parallel& parallel);
void activation(const ActivationProblem& p, const Parallel& parallel);
void linear_forward(const LinearProblem& p, const Parallel& parallel);
// The size of a packed weight in words of the accumulator's size, and the packing.
int64_t packed_weight_words(Dtype dtype, int64_t n, int64_t k);
void pack_weight(const LinearProblem& p, void* packed, const Parallel& parallel);
void gated_linear_forward(const GatedLinearProblem& p, const Parallel& parallel);
void linear_backward(const LinearBackwardProblem* parts, int64_t count, const Parallel& parallel);
void linear_jvp(const LinearJvpProblem& p, const Parallel& parallel);
void dropout_add_norm_forward(const DropoutAddNormProblem& p, const Parallel& parallel);
void dropout_add_norm_backward(const DropoutAddNormBackwardProblem& p, const Parallel& parallel);
void training_step(const TrainingProblem& p, const Parallel& parallel);  // float32 and float64
int64_t fma_probe(Dtype dtype, int64_t iterations);

template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
#if defined(FASTATTN_ONLY_BF16)
  if (dtype == Dtype::kBFloat16) body(bf16{});
#else
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kFloat64:
      return body(double{});
    case Dtype::kBFloat16:
      return body(bf16{});
    case Dtype::kFloat16:
      return body(fp16{});
  }
#endif
}

}  // namespace fastattn::cpu::FASTATTN_ISA
