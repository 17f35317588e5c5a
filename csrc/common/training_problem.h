// What one step of training a small network is asked to compute: the layers, the loss, and how the
// optimizer changes each parameter. Knows neither torch nor an ISA.
#pragma once

#include <cstdint>

#include "common/problem.h"

namespace fastattn {

enum class Optimizer : int { kSgd, kAdam, kRmsprop };
constexpr int kOptimizers = 3;

// The hyperparameters of a parameter's group.
struct UpdateRule {
  double lr = 0.0, weight_decay = 0.0;
  double momentum = 0.0;   // SGD, RMSprop; Adam's beta1
  double decay = 0.0;      // RMSprop's alpha, Adam's beta2, SGD's dampening
  double eps = 0.0;        // Adam, RMSprop
  bool variant = false;    // SGD: nesterov; Adam: amsgrad; RMSprop: centered
  bool maximize = false;   // climbs instead
  bool decoupled = false;  // Adam: weight decay beside the gradient, as AdamW's
};
constexpr int kRuleNumbers = 8;  // of one rule in the op's tensor, in the order above
constexpr int kMostStates = 3;

// A parameter, its rule, and the tensors of its shape that the optimizer keeps for it:
//   SGD: the momentum buffer; Adam: the mean, the mean square, its maximum; RMSprop: the mean
//   square, the momentum buffer, the mean. Those that the rule does not use are absent.
struct UpdatedParameter {
  void* data = nullptr;  // absent for a bias that is not there
  UpdateRule rule;
  double step = 1.0;  // which step of Adam's this is, from 1 on
  void* states[kMostStates] = {};
};

struct TrainedLayer {
  int64_t n = 0, k = 0;
  bool relu = false;
  UpdatedParameter weight, bias;  // [n, k] and [n], contiguous
};

enum class Loss : int { kCrossEntropy, kMse };
constexpr int kLosses = 2;

// One step: forward, loss, backward, update. The gradients are nowhere whole.
struct TrainingProblem {
  Dtype dtype = Dtype::kFloat32;  // or kFloat64
  int64_t m = 0;
  const void* x = nullptr;  // [m, k of the first layer]
  int64_t x_stride = 0;
  TrainedLayer* layers = nullptr;
  int64_t count = 0;
  Optimizer optimizer = Optimizer::kSgd;

  Loss loss = Loss::kCrossEntropy;
  bool mean = true;                     // of the loss, else its sum
  const int64_t* labels = nullptr;      // [m], for the cross entropy
  int64_t ignore_index = -100;          // rows of this label have no loss
  const void* class_weights = nullptr;  // [n of the last layer], may be absent
  double label_smoothing = 0.0;
  const void* targets = nullptr;  // [m, n of the last layer] contiguous, for the squared error
  void* out = nullptr;            // the loss, one number of the dtype
};

}  // namespace fastattn
