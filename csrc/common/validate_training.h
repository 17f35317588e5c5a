// A step of training: tensors -> a problem, with all checks before anything changes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/training_problem.h"
#include "common/views.h"

namespace fastattn {

// A problem and what its pointers point to.
struct TrainingInputs {
  Tensor x, targets;
  std::optional<Tensor> class_weights;
  std::vector<TrainedLayer> layers;
  std::vector<Tensor> steps;  // of Adam and RMSprop, which the step counts on
  TrainingProblem problem;
};

// A tensor that the step writes: contiguous, so that it is changed where it lies.
inline void* check_written(const char* op, const char* argument, const Tensor& t,
                           const Shape& shape, const Tensor& input) {
  check_like(op, argument, t, input.scalar_type(), input);
  check_shape(op, argument, t, shape);
  FASTATTN_CHECK(t.is_contiguous(), op, argument, "contiguous tensors", "another one");
  return t.data_ptr();
}

// The tensors of `states` in their order, each of which is taken once.
class States {
 public:
  States(const char* op, const std::vector<Tensor>& states) : op_(op), states_(states) {}

  void* take(const Shape& shape, const Tensor& input) {
    return check_written(op_, "states", next(), shape, input);
  }
  // A step's number: one element, of float32 or float64.
  const Tensor& take_step(const Tensor& input) {
    const Tensor& step = next();
    const ScalarType dtype = step.scalar_type();
    FASTATTN_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op_, "states",
                   "a step of float32 or float64", torch::headeronly::toString(dtype));
    check_like(op_, "states", step, dtype, input);
    FASTATTN_CHECK(step.numel() == 1, op_, "states", "a step of 1 element", step.numel());
    return step;
  }
  void end() const {
    FASTATTN_CHECK(taken_ == states_.size(), op_, "states", std::to_string(taken_) + " tensors",
                   states_.size());
  }

 private:
  const Tensor& next() {
    FASTATTN_CHECK(taken_ < states_.size(), op_, "states",
                   "more than " + std::to_string(taken_) + " tensors", states_.size());
    return states_[taken_++];
  }

  const char* op_;
  const std::vector<Tensor>& states_;
  size_t taken_ = 0;
};

inline double step_of(const Tensor& step) {
  return step.scalar_type() == ScalarType::Double ? *static_cast<const double*>(step.data_ptr())
                                                  : *static_cast<const float*>(step.data_ptr());
}
inline void count_step(const Tensor& step) {
  if (step.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(step.data_ptr()) += 1.0;
  } else {
    *static_cast<float*>(step.data_ptr()) += 1.0f;
  }
}

inline UpdateRule rule_from(const double* numbers) {
  return {numbers[0], numbers[1],        numbers[2],        numbers[3],
          numbers[4], numbers[5] != 0.0, numbers[6] != 0.0, numbers[7] != 0.0};
}

// One parameter with its part of the states.
inline UpdatedParameter take_parameter(const char* op, const Tensor& parameter, const Shape& shape,
                                       const double* rule, Optimizer optimizer, States& states,
                                       TrainingInputs& in, const Tensor& input) {
  UpdatedParameter p;
  p.data = check_written(op, "parameters", parameter, shape, input);
  p.rule = rule_from(rule);
  const auto take = [&] { return states.take(shape, input); };
  if (optimizer == Optimizer::kSgd) {
    if (p.rule.momentum != 0.0) p.states[0] = take();
    return p;
  }
  in.steps.push_back(states.take_step(input));
  p.step = step_of(in.steps.back()) + 1.0;
  p.states[0] = take();
  if (optimizer == Optimizer::kAdam) {
    p.states[1] = take();
    if (p.rule.variant) p.states[2] = take();
    return p;
  }
  if (p.rule.momentum > 0.0) p.states[1] = take();
  if (p.rule.variant) p.states[2] = take();
  return p;
}

// Layers in the order of `parameters`: weight, bias, weight, bias, ...; an absent bias is of shape
// [0].
inline void take_layers(const char* op, const Tensor& input, const std::vector<Tensor>& parameters,
                        const std::vector<Tensor>& states, const Tensor& rules,
                        const std::vector<bool>& relus, TrainingInputs& in) {
  TrainingProblem& p = in.problem;
  const size_t count = relus.size();
  FASTATTN_CHECK(count > 0, op, "relus", "at least 1 layer", 0);
  FASTATTN_CHECK(parameters.size() == 2 * count, op, "parameters",
                 std::to_string(2 * count) + " tensors", parameters.size());
  check_like(op, "rules", rules, ScalarType::Double, input);
  check_shape(op, "rules", rules, {static_cast<int64_t>(2 * count), kRuleNumbers});
  FASTATTN_CHECK(rules.is_contiguous(), op, "rules", "a contiguous tensor", "another one");
  const double* rule = static_cast<const double*>(rules.data_ptr());
  States left(op, states);
  int64_t width = input.size(1);
  for (size_t l = 0; l < count; ++l, rule += 2 * kRuleNumbers) {
    const Tensor &weight = parameters[2 * l], &bias = parameters[2 * l + 1];
    FASTATTN_CHECK(weight.dim() == 2 && weight.size(0) > 0, op, "parameters",
                   "a weight [out_features, " + std::to_string(width) + "]",
                   text(shape_of(weight)));
    TrainedLayer layer;
    layer.n = weight.size(0);
    layer.k = width;
    layer.relu = relus[l];
    layer.weight =
        take_parameter(op, weight, {layer.n, layer.k}, rule, p.optimizer, left, in, input);
    if (bias.dim() != 1 || bias.numel() != 0) {
      layer.bias =
          take_parameter(op, bias, {layer.n}, rule + kRuleNumbers, p.optimizer, left, in, input);
    }
    in.layers.push_back(layer);
    width = layer.n;
  }
  left.end();
}

// The memory of a contiguous tensor.
struct Range {
  const char *begin, *end;

  explicit Range(const Tensor& t)
      : begin(static_cast<const char*>(t.data_ptr())),
        end(begin + t.numel() * static_cast<int64_t>(t.element_size())) {}
  bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};

// No two written tensors share memory. An input that shares some with them is read after they have
// changed, and is therefore copied first.
inline void separate(const char* op, const std::vector<Tensor>& parameters,
                     const std::vector<Tensor>& states, TrainingInputs& in) {
  std::vector<Range> written;
  for (const std::vector<Tensor>* list : {&parameters, &states}) {
    for (const Tensor& t : *list) {
      if (t.numel() > 0) written.emplace_back(t);
    }
  }
  bool aliased = false;
  const int64_t rows = in.problem.m, stride = in.problem.x_stride;
  Range x(in.x);
  x.end = x.begin + (rows > 0 ? (rows - 1) * stride + in.x.size(1) : 0) *
                        static_cast<int64_t>(in.x.element_size());
  for (size_t i = 0; i < written.size(); ++i) {
    aliased = aliased || written[i].meets(x);
    for (size_t j = 0; j < i; ++j) {
      FASTATTN_CHECK(!written[i].meets(written[j]), op, "parameters, states",
                     "tensors without memory in common", "two that share some");
    }
  }
  if (!aliased) return;
  in.x = torch::stable::clone(in.x);
  in.problem.x = in.x.data_ptr();
  in.problem.x_stride = in.x.stride(0);
}

inline void take_labels(const char* op, const Tensor& input, const Tensor& targets,
                        TrainingInputs& in) {
  TrainingProblem& p = in.problem;
  const int64_t classes = in.layers.back().n;
  if (p.loss == Loss::kMse) {
    check_like(op, "targets", targets, input.scalar_type(), input);
    check_shape(op, "targets", targets, {p.m, classes});
  } else {
    check_like(op, "targets", targets, ScalarType::Long, input);
    check_shape(op, "targets", targets, {p.m});
  }
  in.targets = torch::stable::contiguous(targets);
  p.targets = in.targets.data_ptr();
  if (p.loss == Loss::kMse) return;
  p.labels = static_cast<const int64_t*>(p.targets);
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t label = p.labels[i];
    FASTATTN_CHECK(label == p.ignore_index || (label >= 0 && label < classes), op, "targets",
                   "classes below " + std::to_string(classes), label);
  }
}

}  // namespace fastattn
