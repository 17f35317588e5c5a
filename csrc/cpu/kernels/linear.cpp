// Linear layers and their gradients, in all dtypes.
#include "cpu/linear.h"

#include "cpu/gated_linear.h"
#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void linear_forward(const LinearProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { linear_forward<decltype(t)>(p, parallel); });
}

void gated_linear_forward(const GatedLinearProblem& p, const Parallel& parallel) {
  with_dtype(p.up.dtype, [&](auto t) { GatedLinear<decltype(t)>(p).run(parallel); });
}

void linear_backward(const LinearBackwardProblem* parts, int64_t count, const Parallel& parallel) {
  with_dtype(parts[0].dtype, [&](auto t) { linear_backward<decltype(t)>(parts, count, parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
