// Attention's forward mode and second derivative, in all dtypes.
#include "cpu/attention_double_backward.h"

#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void attention_double_backward(const AttentionDoubleBackwardProblem& s, const Parallel& parallel) {
  with_dtype(s.backward.forward.dtype,
             [&](auto t) { attention_double_backward<decltype(t)>(s, parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
