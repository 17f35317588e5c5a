// One step of training a small network of linear layers and ReLUs: E15, the loss, E16, and the
// optimizer's update of a weight while a block of its gradient is in L1. No gradient is written.
#pragma once

#include "common/training_problem.h"
#include "cpu/linear_backward.h"
#include "cpu/linear_forward.h"
#include "cpu/loss.h"
#include "cpu/update.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class A>
class TrainingStep {
 public:
  explicit TrainingStep(const TrainingProblem& p) : p_(p) {
    int64_t outputs = 0, widest = 0;
    for (int64_t l = 0; l < p.count; ++l) {
      outputs += p.m * p.layers[l].n;
      widest = max64(widest, round_up(p.layers[l].n, kWidth<A>));
    }
    // The outputs of all layers, then two gradients of outputs that take turns.
    outputs = round_up(outputs, kWidth<A>);
    const int64_t gradient = p.m * widest;
    size_ = outputs + 2 * gradient;
    outputs_ = thread_scratch<A>(Scratch::kTraining, size_);
    gradients_[0] = outputs_ + outputs;
    gradients_[1] = gradients_[0] + gradient;
  }

  void run(const Parallel& parallel) const {
    A* out = outputs_;
    for (int64_t l = 0; l < p_.count; ++l) {
      LinearProblem layer = forward_of(l, out);
      linear_forward<A>(layer, parallel);
      out += p_.m * layer.n;
    }
    const int64_t n = p_.layers[p_.count - 1].n, stride = round_up(n, kWidth<A>);
    const auto loss = p_.loss == Loss::kCrossEntropy ? cross_entropy<A> : squared_error<A>;
    *static_cast<A*>(p_.out) = static_cast<A>(loss(p_, n, out - p_.m * n, gradients_[0], stride));
    const A* grad_y = gradients_[0];
    int64_t grad_y_stride = stride;
    for (int64_t l = p_.count; l-- > 0;) {
      out -= p_.m * p_.layers[l].n;
      LinearBackwardProblem layer = backward_of(forward_of(l, out));
      layer.grad_y = grad_y;
      layer.grad_y_stride = grad_y_stride;
      if (p_.layers[l].relu) layer.relu_output = out;
      if (l > 0) {  // before the weight changes
        A* grad_x = grad_y == gradients_[0] ? gradients_[1] : gradients_[0];
        layer.grad_x = grad_x;
        LinearInputGradient<A>(&layer, 1).run(parallel);
        grad_y = grad_x;
        grad_y_stride = layer.k;
      }
      update(p_.layers[l], layer, parallel);
    }
    if (size_ > kMostKept) free_thread_scratch(Scratch::kTraining);
  }

 private:
  // Layer l, whose output is at `out`, and its input right before.
  LinearProblem forward_of(int64_t l, A* out) const {
    const TrainedLayer& layer = p_.layers[l];
    LinearProblem f;
    f.dtype = p_.dtype;
    f.m = p_.m;
    f.n = layer.n;
    f.k = layer.k;
    f.x = l == 0 ? p_.x : out - p_.m * layer.k;
    f.x_stride = l == 0 ? p_.x_stride : layer.k;
    f.w = layer.weight.data;
    f.w_stride = layer.k;
    f.bias = layer.bias.data;
    f.activation = layer.relu ? Activation::kRelu : Activation::kNone;
    f.y = out;
    return f;
  }

  void update(const TrainedLayer& layer, const LinearBackwardProblem& backward,
              const Parallel& parallel) const {
    const A* of_bias = nullptr;
    with_update<A>(p_.optimizer, layer.weight, [&](const auto& weight) {
      const auto store_c = [&](int64_t i, int64_t j0, int64_t cols, A* row) {
        weight(i * layer.k + j0, cols, row);
      };
      of_bias = weight_gradient<A>(backward, true, store_c, PlainC<A>{nullptr, 0}, parallel);
    });
    if (layer.bias.data == nullptr) return;
    with_update<A>(p_.optimizer, layer.bias, [&](const auto& bias) { bias(0, layer.n, of_bias); });
  }

  static constexpr int64_t kMostKept = int64_t{1} << 22;  // elements, from step to step

  const TrainingProblem& p_;
  int64_t size_;
  A* outputs_;
  A* gradients_[2];
};

}  // namespace fastattn::cpu::FASTATTN_ISA
