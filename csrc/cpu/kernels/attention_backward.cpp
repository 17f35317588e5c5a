// Attention backward, in all dtypes.
#include "cpu/attention_backward.h"

#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void attention_backward(const AttentionBackwardProblem& b, const Parallel& parallel) {
  with_dtype(b.forward.dtype, [&](auto t) { attention_backward<decltype(t)>(b, parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
