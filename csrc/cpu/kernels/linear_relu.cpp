// Linear layers and their gradients, in all dtypes.
#include "cpu/linear_relu.h"

#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void linear_forward(const LinearProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { linear_forward<decltype(t)>(p, parallel); });
}

void linear_backward(const LinearBackwardProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { linear_backward<decltype(t)>(p, parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
