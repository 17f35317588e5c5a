// A step of training, in the dtypes that networks are trained in without autocast.
#include "cpu/training_step.h"

#include "cpu/kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

void training_step([[maybe_unused]] const TrainingProblem& p,
                   [[maybe_unused]] const Parallel& parallel) {
#if !defined(FASTATTN_ONLY_BF16)
  if (p.dtype == Dtype::kFloat64) return TrainingStep<double>(p).run(parallel);
  TrainingStep<float>(p).run(parallel);
#endif
}

}  // namespace fastattn::cpu::FASTATTN_ISA
