// Linear layers and their gradients, in all dtypes.
#include "cpu/linear_forward.h"

#include "cpu/gated_linear.h"
#include "cpu/kernels.h"
#include "cpu/linear_backward.h"

namespace fastattn::cpu::FASTATTN_ISA {

void linear_forward(const LinearProblem& p, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) { linear_forward<decltype(t)>(p, parallel); });
}

int64_t packed_weight_words(Dtype dtype, int64_t n, int64_t k) {
  int64_t size = 0;
  with_dtype(dtype, [&](auto t) { size = PackedWeight<decltype(t)>(n, k).size(); });
  return size;
}

void pack_weight(const LinearProblem& p, void* packed, const Parallel& parallel) {
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    pack_weight<T>(p, static_cast<Operand<T>*>(packed), parallel);
  });
}

void gated_linear_forward(const GatedLinearProblem& p, const Parallel& parallel) {
  with_dtype(p.up.dtype, [&](auto t) { GatedLinear<decltype(t)>(p).run(parallel); });
}

void linear_backward(const LinearBackwardProblem* parts, int64_t count, const Parallel& parallel) {
  with_dtype(parts[0].dtype, [&](auto t) { linear_backward<decltype(t)>(parts, count, parallel); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
