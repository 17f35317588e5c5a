// Every kernel of one ISA, in all dtypes, behind one table. Included once by each isa_*.cpp.
#pragma once

#include "cpu/attention_backward.h"
#include "cpu/attention_double_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/kernel_table.h"
#include "cpu/linear_jvp.h"
#include "cpu/roofline.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Body>
void with_dtype(Dtype dtype, const Body& body) {
#if defined(FASTATTN_ONLY_BF16)
  if (dtype == Dtype::kBFloat16) body(bf16{});
#else
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float{});
    case Dtype::kFloat64:
      return body(double{});
    case Dtype::kBFloat16:
      return body(bf16{});
    case Dtype::kFloat16:
      return body(fp16{});
  }
#endif
}

extern const KernelTable kTable;
const KernelTable kTable = {
    [](const AttentionProblem& p, const Parallel& parallel) {
      with_dtype(p.dtype, [&](auto t) { attention_forward<decltype(t)>(p, parallel); });
    },
    [](const AttentionBackwardProblem& b, const Parallel& parallel) {
      with_dtype(b.forward.dtype, [&](auto t) { attention_backward<decltype(t)>(b, parallel); });
    },
    [](const AttentionDoubleBackwardProblem& s, const Parallel& parallel) {
      with_dtype(s.backward.forward.dtype,
                 [&](auto t) { attention_double_backward<decltype(t)>(s, parallel); });
    },
    [](const LinearProblem& p, const Parallel& parallel) {
      with_dtype(p.dtype, [&](auto t) { linear_forward<decltype(t)>(p, parallel); });
    },
    [](const LinearBackwardProblem& p, const Parallel& parallel) {
      with_dtype(p.dtype, [&](auto t) { linear_backward<decltype(t)>(p, parallel); });
    },
    [](const LinearJvpProblem& p, const Parallel& parallel) {
      with_dtype(p.dtype, [&](auto t) { linear_jvp<decltype(t)>(p, parallel); });
    },
    [](Dtype dtype, int64_t iterations) {
      int64_t flops = 0;
      with_dtype(dtype, [&](auto t) { flops = fma_probe<Operand<decltype(t)>>(iterations); });
      return flops;
    },
};

}  // namespace fastattn::cpu::FASTATTN_ISA
