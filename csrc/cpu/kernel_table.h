// One table of entry points per ISA; dispatch.cpp picks them once.
#pragma once

#include "common/parallel.h"
#include "common/problem.h"
#include "common/training_problem.h"

namespace fastattn::cpu {

struct KernelTable {
  void (*attention_forward)(const AttentionProblem&, const Parallel&);
  void (*attention_backward)(const AttentionBackwardProblem&, const Parallel&);
  void (*attention_double_backward)(const AttentionDoubleBackwardProblem&, const Parallel&);
  void (*activation)(const ActivationProblem&, const Parallel&);
  void (*linear_forward)(const LinearProblem&, const Parallel&);
  int64_t (*packed_weight_words)(Dtype, int64_t n, int64_t k);
  void (*pack_weight)(const LinearProblem&, void* packed, const Parallel&);
  void (*gated_linear_forward)(const GatedLinearProblem&, const Parallel&);
  void (*linear_backward)(const LinearBackwardProblem*, int64_t, const Parallel&);
  void (*linear_jvp)(const LinearJvpProblem&, const Parallel&);
  void (*dropout_add_norm_forward)(const DropoutAddNormProblem&, const Parallel&);
  void (*dropout_add_norm_backward)(const DropoutAddNormBackwardProblem&, const Parallel&);
  void (*training_step)(const TrainingProblem&, const Parallel&);
  int64_t (*fma_probe)(Dtype, int64_t iterations);
};

namespace avx512bf16 {  // bf16 alone: the other dtypes are avx512's
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace generic {
extern const KernelTable kTable;
}
namespace emulated {
extern const KernelTable kTable;
}

const KernelTable& kernels(Dtype dtype);

}  // namespace fastattn::cpu
