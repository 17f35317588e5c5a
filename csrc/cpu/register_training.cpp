// A step of training on the CPU: validate, then the one kernel of the chosen ISA.
#include <torch/csrc/stable/library.h>

#include "common/validate_training.h"
#include "cpu/register_cpu.h"

namespace fastattn::cpu {
namespace {

// The loss before the step. `parameters` and `states` are changed in place, all of them or, where
// an argument is refused, none.
Tensor training_step(const Tensor& input, const Tensor& targets,
                     const std::vector<Tensor>& parameters, const std::vector<Tensor>& states,
                     const Tensor& rules, const std::vector<bool>& relus, int64_t optimizer,
                     int64_t loss, bool mean, const OptionalTensor& class_weights,
                     int64_t ignore_index, double label_smoothing) {
  const char* op = "training_step";
  TrainingInputs in;
  TrainingProblem& p = in.problem;
  p.dtype = dtype_of(op, "input", input);
  FASTATTN_CHECK(p.dtype == Dtype::kFloat32 || p.dtype == Dtype::kFloat64, op, "input",
                 "float32 or float64", torch::headeronly::toString(input.scalar_type()));
  FASTATTN_CHECK(input.dim() == 2 && input.size(0) > 0 && input.size(1) > 0, op, "input",
                 "2 dimensions [rows, features] of at least 1", text(shape_of(input)));
  FASTATTN_CHECK(optimizer >= 0 && optimizer < kOptimizers, op, "optimizer",
                 "a number below " + std::to_string(kOptimizers), optimizer);
  FASTATTN_CHECK(loss >= 0 && loss < kLosses, op, "loss",
                 "a number below " + std::to_string(kLosses), loss);
  FASTATTN_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0, op, "label_smoothing",
                 "a number in [0, 1]", label_smoothing);
  p.optimizer = static_cast<Optimizer>(optimizer);
  p.loss = static_cast<Loss>(loss);
  p.mean = mean;
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing;
  in.x = unit_last_stride(input);
  p.m = in.x.size(0);
  p.x = in.x.data_ptr();
  p.x_stride = in.x.stride(0);
  take_layers(op, input, parameters, states, rules, relus, in);
  p.layers = in.layers.data();
  p.count = static_cast<int64_t>(in.layers.size());
  take_labels(op, input, targets, in);
  if (class_weights.has_value()) {
    check_like(op, "class_weights", *class_weights, input.scalar_type(), input);
    check_shape(op, "class_weights", *class_weights, {in.layers.back().n});
    in.class_weights = unit_last_stride(*class_weights);
    p.class_weights = in.class_weights->data_ptr();
  }
  separate(op, parameters, states, in);
  const Tensor out = empty_like_device(input, {}, input.scalar_type());
  p.out = out.data_ptr();
  run_kernel(op, [&] { kernels(p.dtype).training_step(p, parallel()); });
  for (const Tensor& step : in.steps) count_step(step);
  return out;
}

}  // namespace
}  // namespace fastattn::cpu

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("training_step", TORCH_BOX(&fastattn::cpu::training_step));
}
