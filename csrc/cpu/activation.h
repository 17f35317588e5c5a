// Activation functions and their derivatives, E21, on vectors of the accumulator's type.
#pragma once

#include "common/problem.h"
#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

// 1 / x for x of about 1, to the last bit or the one before.
FASTATTN_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(FASTATTN_AVX512)
  const Vec<float> estimate = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return estimate * (broadcast(2.0f) - x * estimate);
#else
  return broadcast(1.0f) / x;
#endif
}
FASTATTN_INLINE Vec<double> reciprocal(Vec<double> x) { return broadcast(1.0) / x; }

template <class A>
struct Activated {
  Vec<A> value, derivative;
};

// The coefficients of R(s), s = (a - kShift) / (a + kShift): the tail of the normal distribution is
// P(Z > a) = e^(-a^2 / 2) R(s) for 0 <= a <= kFar, from where on the power is 0. Chebyshev
// interpolation; the relative error before rounding is 7e-9 and 4e-18.
template <class A>
struct NormalTail;
template <>
struct NormalTail<float> {
  static constexpr float kShift = 3.0f, kFar = 14.0f;
  static constexpr float kR[] = {
      5.416040221e-05f, 1.160536704e-04f,  -3.399123962e-04f, -9.841950377e-04f, 2.904700348e-03f,
      6.132185925e-03f, -4.621331394e-02f, 1.232250184e-01f,  -2.064026147e-01f, 1.215139478e-01f};
};
template <>
struct NormalTail<double> {
  static constexpr double kShift = 4.0, kFar = 39.0;
  static constexpr double kR[] = {
      8.409371338647314e-11,   2.1368017783995233e-10, -5.297536200764235e-10,
      -2.1677809994374887e-09, 7.506782465999165e-10,  1.2254219004354827e-08,
      8.733987057235652e-09,   -5.326002227690984e-08, -9.374255568966705e-08,
      2.0634882452383433e-07,  6.613194084142708e-07,  -8.295796735402787e-07,
      -4.303505319556271e-06,  4.631610707475278e-06,  2.8648335186768932e-05,
      -4.555490455942878e-05,  -0.000187184268237512,  0.0006388138529616531,
      0.00050756207492555,     -0.008492095482197468,  0.030864804106323737,
      -0.07170740733773429,    0.12437925533926335,    -0.17039772154845545,
      0.09441064130196894};
};

// z Phi(z), Phi the distribution function of the normal distribution.
template <class A>
FASTATTN_INLINE Activated<A> gelu(Vec<A> z) {
  using Tail = NormalTail<A>;
  const Vec<A> zero{}, far = broadcast(Tail::kFar), shift = broadcast(Tail::kShift);
  const Vec<A> magnitude = z < zero ? -z : z;
  const Vec<A> a = magnitude < far ? magnitude : far;  // a NaN of z comes back with z below
  const Vec<A> s = (a - shift) * reciprocal(a + shift);
  Vec<A> r = broadcast(Tail::kR[0]);
  constexpr int kCount = sizeof(Tail::kR) / sizeof(A);
#pragma GCC unroll 32
  for (int i = 1; i < kCount; ++i) r = r * s + broadcast(Tail::kR[i]);
  const Vec<A> power = exp2(a * a * broadcast(static_cast<A>(-0.72134752044448170368)));
  const Vec<A> tail = power * r;
  const Vec<A> phi = z < zero ? tail : broadcast(A(1)) - tail;
  const Vec<A> density = power * broadcast(static_cast<A>(0.39894228040143267794));
  return {z * phi, phi + z * density};
}

// z S(v), S the logistic function, of which `slope` is the derivative of v by z.
template <class A>
FASTATTN_INLINE Activated<A> times_logistic(Vec<A> z, Vec<A> v, Vec<A> slope) {
  const Vec<A> zero{}, one = broadcast(A(1));
  const Vec<A> power =
      exp2((v < zero ? v : -v) * broadcast(static_cast<A>(1.44269504088896340736)));
  const Vec<A> inverse = reciprocal(one + power);
  const Vec<A> logistic = (v < zero ? power : one) * inverse;
  return {z * logistic, logistic + z * (power * inverse * inverse * slope)};
}

template <class A>
FASTATTN_INLINE Activated<A> gelu_tanh(Vec<A> z) {
  // (1 + tanh u) / 2 = S(2 u); 2 u = z (kLinear + kCubic z^2).
  constexpr double kLinear = 1.59576912160573071176, kCubic = kLinear * 0.044715;
  const Vec<A> linear = broadcast(static_cast<A>(kLinear));
  Vec<A> square = z * z;
  const Vec<A> v = z * (linear + broadcast(static_cast<A>(kCubic)) * square);
  // Where the square is infinite, the logistic function's slope is 0: their product must be too.
  const Vec<A> most = broadcast(A(1e30));
  square = square < most ? square : most;
  return times_logistic<A>(z, v, linear + broadcast(static_cast<A>(3 * kCubic)) * square);
}

template <Activation kActivation, class A>
FASTATTN_INLINE Activated<A> activate(Vec<A> z) {
  const Vec<A> zero{}, one = broadcast(A(1));
  if constexpr (kActivation == Activation::kNone) return {z, one};
  if constexpr (kActivation == Activation::kRelu) return {relu<A>(z), z <= zero ? zero : one};
  if constexpr (kActivation == Activation::kRelu2) {
    const Vec<A> positive = relu<A>(z);
    return {positive * positive, positive + positive};
  }
  if constexpr (kActivation == Activation::kGelu) return gelu<A>(z);
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh<A>(z);
  if constexpr (kActivation == Activation::kSilu) return times_logistic<A>(z, z, one);
  const Vec<A> factor = broadcast(static_cast<A>(1.702));
  return times_logistic<A>(z, z * factor, factor);
}

// body(f), f.value the activation as a constant.
template <Activation kActivation>
struct Constant {
  static constexpr Activation value = kActivation;
};
template <class Body>
FASTATTN_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kNone:
      return body(Constant<Activation::kNone>{});
    case Activation::kRelu:
      return body(Constant<Activation::kRelu>{});
    case Activation::kGelu:
      return body(Constant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(Constant<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return body(Constant<Activation::kSilu>{});
    case Activation::kRelu2:
      return body(Constant<Activation::kRelu2>{});
    case Activation::kQuickGelu:
      return body(Constant<Activation::kQuickGelu>{});
  }
}

template <Activation kActivation, bool kDerivative, class A>
void activate_row(A* row, A* derivative, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth<A>) {
    const Activated<A> of = activate<kActivation, A>(load(row + j));
    store(row + j, of.value);
    if constexpr (kDerivative) store(derivative + j, of.derivative);
  }
}

// row [n] = f(row), and derivative [n] = f'(row) unless it is absent; both have room for whole
// vectors.
template <class A>
FASTATTN_INLINE void activate_row(Activation activation, A* row, A* derivative, int64_t n) {
  if (activation == Activation::kNone && derivative == nullptr) return;
  with_activation(activation, [&](auto f) {
    if (derivative != nullptr) return activate_row<f.value, true>(row, derivative, n);
    activate_row<f.value, false>(row, derivative, n);
  });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
