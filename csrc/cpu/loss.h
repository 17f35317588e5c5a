// The loss of a step of training and its gradient by the model's output, E24 and E25.
#pragma once

#include "common/training_problem.h"
#include "cpu/softmax.h"

namespace fastattn::cpu::FASTATTN_ISA {

// What the rows' losses are divided by: the weights of the rows that have one, or 1 for their sum.
template <class A>
double total_weight(const TrainingProblem& p) {
  if (!p.mean) return 1.0;
  const A* weights = static_cast<const A*>(p.class_weights);
  double total = 0.0;
  for (int64_t i = 0; i < p.m; ++i) {
    if (p.labels[i] == p.ignore_index) continue;
    total += weights == nullptr ? 1.0 : static_cast<double>(weights[p.labels[i]]);
  }
  return total;
}

// grad [m, stride] = the gradient of `out` [m, n], stride a multiple of the vector width; returns
// the loss.  // E24
template <class A>
double cross_entropy(const TrainingProblem& p, int64_t n, const A* out, A* grad, int64_t stride) {
  const A* weights = static_cast<const A*>(p.class_weights);
  const double total = total_weight<A>(p), smoothing = p.label_smoothing;
  const double others = smoothing / static_cast<double>(n);  // of every class, the label's as well
  double of_all = static_cast<double>(n), loss = 0.0;
  if (weights != nullptr && smoothing > 0.0) {
    of_all = 0.0;
    for (int64_t j = 0; j < n; ++j) of_all += static_cast<double>(weights[j]);
  }
  for (int64_t i = 0; i < p.m; ++i) {
    A* row = grad + i * stride;
    const int64_t label = p.labels[i];
    if (label == p.ignore_index) {
      for (int64_t j = 0; j < n; ++j) row[j] = A(0);
      continue;
    }
    const A* z = out + i * n;
    for (int64_t j = 0; j < n; ++j) row[j] = z[j];
    for (int64_t j = n; j < stride; ++j) row[j] = -kInf<A>;
    const A most = row_max(row, stride);
    const A sum = row_exp2(row, stride, most, static_cast<A>(kLog2E)), log_sum = natural_log(sum);
    const auto log_probability = [&](int64_t j) {
      return static_cast<double>((z[j] - most) - log_sum);
    };
    const double weight = weights == nullptr ? 1.0 : static_cast<double>(weights[label]);
    const double of_label = (1.0 - smoothing) * weight;
    loss -= of_label * log_probability(label);
    double of_row = of_label;
    if (smoothing > 0.0) {
      of_row += others * of_all;
      for (int64_t j = 0; j < n; ++j) {
        const double share = others * (weights == nullptr ? 1.0 : static_cast<double>(weights[j]));
        loss -= share * log_probability(j);
      }
    }
    const A scale = static_cast<A>(of_row / total) / sum;
    for (int64_t j = 0; j < n; ++j) row[j] *= scale;
    if (smoothing > 0.0) {
      for (int64_t j = 0; j < n; ++j) {
        const double share = others * (weights == nullptr ? 1.0 : static_cast<double>(weights[j]));
        row[j] -= static_cast<A>(share / total);
      }
    }
    row[label] -= static_cast<A>(of_label / total);
  }
  return loss / total;
}

// The same of the squared error.  // E25
template <class A>
double squared_error(const TrainingProblem& p, int64_t n, const A* out, A* grad, int64_t stride) {
  const A* targets = static_cast<const A*>(p.targets);
  const double total = p.mean ? static_cast<double>(p.m * n) : 1.0;
  const A scale = static_cast<A>(2.0 / total);
  double loss = 0.0;
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const A error = out[i * n + j] - targets[i * n + j];
      loss += static_cast<double>(error) * static_cast<double>(error);
      grad[i * stride + j] = scale * error;
    }
  }
  return loss / total;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
