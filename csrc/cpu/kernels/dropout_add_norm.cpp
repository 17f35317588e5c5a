// Dropout, the residual sum and the norm after it, and their gradients, in all dtypes.
#include "cpu/dropout_add_norm.h"

#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void dropout_add_norm_forward(const DropoutAddNormProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { dropout_add_norm_forward<decltype(t)>(p, parallel); });
}

void dropout_add_norm_backward(const DropoutAddNormBackwardProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { dropout_add_norm_backward<decltype(t)>(p, parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
