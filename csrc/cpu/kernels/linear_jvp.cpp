// The tangent of linear layers, in all dtypes.
#include "cpu/linear_jvp.h"

#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void linear_jvp(const LinearJvpProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { LinearJvp<decltype(t)>(p).run(parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
