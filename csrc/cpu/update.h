// How SGD, Adam and RMSprop change a parameter: torch.optim's formulas, in its order of operations,
// on vectors of the parameter's dtype.
#pragma once

#include "common/training_problem.h"
#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

// The mean square less the squared mean. Of a gradient that does not change both are the same
// number: what is below 0 by roundings is 0, as its root would be NaN.
template <class A>
FASTATTN_INLINE Vec<A> variance(Vec<A> square, Vec<A> mean) {
  constexpr A kRoundings = sizeof(A) == 4 ? A(0x1p-20) : A(0x1p-49);  // 8
  const Vec<A> zero{}, difference = square - mean * mean;
  const auto rounded = (difference < zero) & (difference >= broadcast(-kRoundings) * square);
  return rounded ? zero : difference;
}

// Torch's lerp with a weight: near `end` it starts from there.
template <class A>
struct Lerp {
  bool from_start;
  A factor;

  explicit Lerp(double weight)
      : from_start(weight < 0.5), factor(static_cast<A>(from_start ? weight : weight - 1.0)) {}
  FASTATTN_INLINE Vec<A> operator()(Vec<A> start, Vec<A> end) const {
    return (from_start ? start : end) + broadcast(factor) * (end - start);
  }
};

template <class A>
class SgdUpdate {
 public:
  explicit SgdUpdate(const UpdatedParameter& p)
      : rate_(static_cast<A>(-p.rule.lr)),
        momentum_(static_cast<A>(p.rule.momentum)),
        share_(static_cast<A>(1.0 - p.rule.decay)),
        has_momentum_(p.rule.momentum != 0.0),
        nesterov_(p.rule.variant) {}

  FASTATTN_INLINE Vec<A> operator()(Vec<A> parameter, Vec<A> gradient, A* const* states,
                                    int64_t at) const {
    Vec<A> direction = gradient;
    if (has_momentum_) {
      const Vec<A> momentum = broadcast(momentum_);
      const Vec<A> buffer = momentum * load(states[0] + at) + broadcast(share_) * gradient;
      store(states[0] + at, buffer);
      direction = nesterov_ ? gradient + momentum * buffer : buffer;
    }
    return parameter + broadcast(rate_) * direction;
  }

 private:
  A rate_, momentum_, share_;
  bool has_momentum_, nesterov_;
};

template <class A>
class AdamUpdate {
 public:
  explicit AdamUpdate(const UpdatedParameter& p)
      : mean_(1.0 - p.rule.momentum),
        decay_(static_cast<A>(p.rule.decay)),
        share_(static_cast<A>(1.0 - p.rule.decay)),
        eps_(static_cast<A>(p.rule.eps)),
        amsgrad_(p.rule.variant) {
    const double correction = __builtin_sqrt(1.0 - __builtin_pow(p.rule.decay, p.step));
    inverse_correction_ = static_cast<A>(1.0 / correction);
    rate_ = static_cast<A>(-p.rule.lr / (1.0 - __builtin_pow(p.rule.momentum, p.step)));
  }

  FASTATTN_INLINE Vec<A> operator()(Vec<A> parameter, Vec<A> gradient, A* const* states,
                                    int64_t at) const {
    const Vec<A> mean = mean_(load(states[0] + at), gradient);
    Vec<A> square =
        broadcast(decay_) * load(states[1] + at) + broadcast(share_) * (gradient * gradient);
    store(states[0] + at, mean);
    store(states[1] + at, square);
    if (amsgrad_) {
      const Vec<A> most = load(states[2] + at);  // a NaN of either stays
      square = ((most > square) | (most != most)) ? most : square;
      store(states[2] + at, square);
    }
    const Vec<A> root = sqrt(square) * broadcast(inverse_correction_) + broadcast(eps_);
    return parameter + broadcast(rate_) * mean / root;
  }

 private:
  Lerp<A> mean_;
  A decay_, share_, eps_, inverse_correction_, rate_;
  bool amsgrad_;
};

template <class A>
class RmspropUpdate {
 public:
  explicit RmspropUpdate(const UpdatedParameter& p)
      : mean_(1.0 - p.rule.decay),
        decay_(static_cast<A>(p.rule.decay)),
        share_(static_cast<A>(1.0 - p.rule.decay)),
        eps_(static_cast<A>(p.rule.eps)),
        momentum_(static_cast<A>(p.rule.momentum)),
        rate_(static_cast<A>(-p.rule.lr)),
        has_momentum_(p.rule.momentum > 0.0),
        centered_(p.rule.variant) {}

  FASTATTN_INLINE Vec<A> operator()(Vec<A> parameter, Vec<A> gradient, A* const* states,
                                    int64_t at) const {
    Vec<A> square =
        broadcast(decay_) * load(states[0] + at) + broadcast(share_) * (gradient * gradient);
    store(states[0] + at, square);
    if (centered_) {
      const Vec<A> mean = mean_(load(states[2] + at), gradient);
      store(states[2] + at, mean);
      square = variance<A>(square, mean);
    }
    const Vec<A> root = sqrt(square) + broadcast(eps_);
    if (!has_momentum_) return parameter + broadcast(rate_) * gradient / root;
    const Vec<A> buffer = broadcast(momentum_) * load(states[1] + at) + gradient / root;
    store(states[1] + at, buffer);
    return parameter + broadcast(rate_) * buffer;
  }

 private:
  Lerp<A> mean_;
  A decay_, share_, eps_, momentum_, rate_;
  bool has_momentum_, centered_;
};

// Weight decay and the sign, then the optimizer's own part, on any number of elements.
template <class A, class Rule>
class Update {
 public:
  explicit Update(const UpdatedParameter& p)
      : rule_(p),
        data_(static_cast<A*>(p.data)),
        states_{static_cast<A*>(p.states[0]), static_cast<A*>(p.states[1]),
                static_cast<A*>(p.states[2])},
        sign_(p.rule.maximize ? A(-1) : A(1)),
        decay_(p.rule.decoupled ? A(0) : static_cast<A>(p.rule.weight_decay)),
        kept_(p.rule.decoupled ? static_cast<A>(1.0 - p.rule.lr * p.rule.weight_decay) : A(1)) {}

  // Elements [first, first + count) from their gradients.
  FASTATTN_INLINE void operator()(int64_t first, int64_t count, const A* gradient) const {
    int64_t j = 0;
    for (; j + kWidth<A> <= count; j += kWidth<A>)
      vector(data_, states_, first + j, load(gradient + j));
    if (j < count) rest(first + j, count - j, gradient + j);
  }

 private:
  FASTATTN_INLINE void vector(A* data, A* const* states, int64_t at, Vec<A> gradient) const {
    Vec<A> parameter = load(data + at);
    if (sign_ < A(0)) gradient = -gradient;
    if (decay_ != A(0)) gradient += broadcast(decay_) * parameter;
    if (kept_ != A(1)) parameter *= broadcast(kept_);
    store(data + at, rule_(parameter, gradient, states, at));
  }

  // Less than a vector.
  void rest(int64_t first, int64_t count, const A* gradient) const {
    const size_t bytes = static_cast<size_t>(count) * sizeof(A);
    A g[kWidth<A>] = {}, data[kWidth<A>] = {}, copies[kMostStates][kWidth<A>] = {};
    A* states[kMostStates] = {copies[0], copies[1], copies[2]};
    __builtin_memcpy(g, gradient, bytes);
    __builtin_memcpy(data, data_ + first, bytes);
    for (int s = 0; s < kMostStates; ++s) {
      if (states_[s] != nullptr) __builtin_memcpy(copies[s], states_[s] + first, bytes);
    }
    vector(data, states, 0, load(g));
    __builtin_memcpy(data_ + first, data, bytes);
    for (int s = 0; s < kMostStates; ++s) {
      if (states_[s] != nullptr) __builtin_memcpy(states_[s] + first, copies[s], bytes);
    }
  }

  Rule rule_;
  A* data_;
  A* states_[kMostStates];
  A sign_, decay_, kept_;
};

// body(update), the update of a parameter by the optimizer.
template <class A, class Body>
FASTATTN_INLINE void with_update(Optimizer optimizer, const UpdatedParameter& p, const Body& body) {
  switch (optimizer) {
    case Optimizer::kSgd:
      return body(Update<A, SgdUpdate<A>>(p));
    case Optimizer::kAdam:
      return body(Update<A, AdamUpdate<A>>(p));
    case Optimizer::kRmsprop:
      return body(Update<A, RmspropUpdate<A>>(p));
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
