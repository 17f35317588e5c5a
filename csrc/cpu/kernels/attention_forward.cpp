// Attention forward, in all dtypes.
#include "cpu/attention_forward.h"

#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void attention_forward(const AttentionProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { AttentionForward<decltype(t)>(p, parallel).run(); });
}

void attention_forward_in_blocks(const AttentionProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { AttentionForward<decltype(t)>(p, parallel).run_blocks(); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
