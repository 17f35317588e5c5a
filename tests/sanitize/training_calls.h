// Steps of training: every optimizer and loss, with all states that they have.
#pragma once

#include <vector>

#include "cpu/kernel_table.h"
#include "numbers.h"

namespace fastattn {

// A network of these widths with a ReLU between any two layers, and without the second layer's
// bias. A variant has every option of the optimizer on.
inline void call_training_step(Dtype dtype, Optimizer optimizer, Loss loss, bool variant, int64_t m,
                               const std::vector<int64_t>& widths) {
  const int64_t count = static_cast<int64_t>(widths.size()) - 1, classes = widths.back();
  const Numbers x = Numbers::random(dtype, m * widths[0]);
  const Numbers targets = Numbers::random(dtype, m * classes);
  const Numbers class_weights = Numbers::random(dtype, classes), out(dtype, 1);
  std::vector<int64_t> labels(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) labels[static_cast<size_t>(i)] = i % classes;
  std::vector<Numbers> memory;
  memory.reserve(static_cast<size_t>(count) * 2 * (1 + kMostStates));
  const auto parameter = [&](int64_t elements) {
    UpdatedParameter p;
    p.rule = {0.01, variant ? 0.1 : 0.0, 0.9, 0.99, 1e-8, variant, variant, variant};
    p.step = 3.0;
    memory.push_back(Numbers::random(dtype, elements));
    p.data = memory.back().data();
    for (void*& state : p.states) {
      memory.push_back(Numbers::random(dtype, elements));
      state = memory.back().data();
    }
    return p;
  };
  std::vector<TrainedLayer> layers;
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    TrainedLayer layer;
    layer.n = widths[l + 1];
    layer.k = widths[l];
    layer.relu = l + 2 < widths.size();
    layer.weight = parameter(layer.n * layer.k);
    if (l != 1) layer.bias = parameter(layer.n);
    layers.push_back(layer);
  }
  TrainingProblem p;
  p.dtype = dtype;
  p.m = m;
  p.x = x.data();
  p.x_stride = widths[0];
  p.layers = layers.data();
  p.count = count;
  p.optimizer = optimizer;
  p.loss = loss;
  p.labels = labels.data();
  p.ignore_index = variant ? 0 : -100;
  p.class_weights = variant ? class_weights.data() : nullptr;
  p.label_smoothing = variant ? 0.1 : 0.0;
  p.targets = targets.data();
  p.out = out.data();
  cpu::kernels(dtype).training_step(p, kParallel);
  out.expect_written("training_step");
}

inline int call_training_steps(Dtype dtype) {
  int calls = 0;
  for (int optimizer = 0; optimizer < kOptimizers; ++optimizer) {
    for (const bool variant : {false, true}) {
      const auto of = static_cast<Optimizer>(optimizer);
      call_training_step(dtype, of, Loss::kCrossEntropy, variant, 64, {784, 128, 10});
      call_training_step(dtype, of, Loss::kMse, variant, 7, {33, 17, 65, 5});
      call_training_step(dtype, of, Loss::kCrossEntropy, variant, 1, {5, 3});
      calls += 3;
    }
  }
  return calls;
}

}  // namespace fastattn
