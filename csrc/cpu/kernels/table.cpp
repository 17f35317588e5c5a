// The table of one ISA's kernels, and the probe of its vector units.
#include "cpu/kernel_table.h"
#include "cpu/kernels.h"
#include "cpu/roofline.h"

namespace fastattn::cpu::FASTATTN_ISA {

int64_t fma_probe(Dtype dtype, int64_t iterations) {
  int64_t flops = 0;
  with_dtype(dtype, [&](auto t) { flops = fma_probe<Operand<decltype(t)>>(iterations); });
  return flops;
}

const KernelTable kTable = {
    attention_forward,
    attention_backward,
    attention_double_backward,
    activation,
    linear_forward,
    packed_weight_words,
    pack_weight,
    gated_linear_forward,
    linear_backward,
    linear_jvp,
    dropout_add_norm_forward,
    dropout_add_norm_backward,
    training_step,
    fma_probe,
};

}  // namespace fastattn::cpu::FASTATTN_ISA
