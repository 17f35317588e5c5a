// Activations with dropout, in all dtypes.
#include "cpu/activation_rows.h"
#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void activation(const ActivationProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { ActivationRows<decltype(t)>(p).run(parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
