// The CPU's instructions: vectors of float and double, the exponential, the ReLU and its bits.
// Compiled once per ISA, inside its namespace. No libstdc++ templates here or in the
// kernels: an inline function compiled with wide instructions must never be the copy that the
// linker keeps for everybody.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Which intrinsics may be used. FASTATTN_EMULATED has the vectors, tiles and bf16 pairs of AVX-512
// in the compiler's own vectors, without any: they are tested on every machine.
#if !defined(FASTATTN_EMULATED)
#if defined(__AVX2__)
#define FASTATTN_AVX2
#include <immintrin.h>
#endif
#if defined(__F16C__)
#define FASTATTN_F16C
#endif
#if defined(__AVX512F__)
#define FASTATTN_AVX512
#endif
#if defined(__AVX512BF16__)
#define FASTATTN_AVX512BF16
#endif
#endif

#define FASTATTN_INLINE inline __attribute__((always_inline))

namespace fastattn::cpu::FASTATTN_ISA {

#if defined(FASTATTN_AVX512) || defined(FASTATTN_EMULATED)
constexpr int kVecBytes = 64;
// The micro-kernel's 6 x 64 tile takes 24 accumulators, 4 vectors of B and the broadcasts of A: all
// 32 registers.
constexpr int kPanelVecs = 4;
#else
constexpr int kVecBytes = 32;
// The 6 x 16 tile takes 12 accumulators, 2 vectors of B and the broadcasts of A: all 16 registers.
constexpr int kPanelVecs = 2;
#endif
constexpr int kRows = 6;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulatorOf<T>::type;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kWidth = kVecBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPanel = kPanelVecs * kWidth<T>;  // columns of a micro-kernel tile

typedef uint32_t Words __attribute__((vector_size(kVecBytes)));
constexpr int kWords = kVecBytes / 4;
FASTATTN_INLINE Words broadcast_word(uint32_t x) { return x + Words{}; }

template <class T>
constexpr T kInf = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));

FASTATTN_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FASTATTN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTATTN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- loads, stores, broadcasts

template <class T>
FASTATTN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
FASTATTN_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// A store that leaves the caches as they are; p is a multiple of v's size.
template <class V>
FASTATTN_INLINE void stream(void* p, V v) {
#if defined(FASTATTN_AVX512)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(FASTATTN_AVX2)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  __builtin_memcpy(p, &v, sizeof(v));
}
// What was streamed comes before what is stored from here on.
FASTATTN_INLINE void streamed() {
#if defined(FASTATTN_AVX2)
  _mm_sfence();
#endif
}

#if defined(FASTATTN_AVX512)
FASTATTN_INLINE Vec<float> broadcast(float x) { return (Vec<float>)_mm512_set1_ps(x); }
FASTATTN_INLINE Vec<double> broadcast(double x) { return (Vec<double>)_mm512_set1_pd(x); }
// Where either operand is NaN, the second one is returned.
FASTATTN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
FASTATTN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
}
FASTATTN_INLINE float reduce_max(Vec<float> v) { return _mm512_reduce_max_ps((__m512)v); }
FASTATTN_INLINE double reduce_max(Vec<double> v) { return _mm512_reduce_max_pd((__m512d)v); }
FASTATTN_INLINE float reduce_add(Vec<float> v) { return _mm512_reduce_add_ps((__m512)v); }
FASTATTN_INLINE double reduce_add(Vec<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
#if defined(FASTATTN_AVX2)
FASTATTN_INLINE Vec<float> broadcast(float x) { return (Vec<float>)_mm256_set1_ps(x); }
FASTATTN_INLINE Vec<double> broadcast(double x) { return (Vec<double>)_mm256_set1_pd(x); }
FASTATTN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
FASTATTN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
}
#else
// x - 0 and not x + 0, which would lose the sign of -0.
FASTATTN_INLINE Vec<float> broadcast(float x) { return x - Vec<float>{}; }
FASTATTN_INLINE Vec<double> broadcast(double x) { return x - Vec<double>{}; }
template <class V>
FASTATTN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
#endif
// Halves are folded onto each other: the order of the sum is fixed.
template <class T, class Fold>
FASTATTN_INLINE T reduce_lanes(Vec<T> v, const Fold& fold) {
  T lanes[kWidth<T>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = kWidth<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = fold(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}
template <class T>
FASTATTN_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}
FASTATTN_INLINE double reduce_max(Vec<double> v) { return reduce_lanes<double>(v, larger<double>); }
FASTATTN_INLINE double reduce_add(Vec<double> v) {
  return reduce_lanes<double>(v, [](double a, double b) { return a + b; });
}
#if defined(FASTATTN_AVX2)
#define FASTATTN_REDUCE(name, operation)                                                       \
  FASTATTN_INLINE float name(Vec<float> v) {                                                   \
    const __m256 whole = (__m256)v;                                                            \
    __m128 x = operation##_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1)); \
    x = operation##_ps(x, _mm_movehl_ps(x, x));                                                \
    return _mm_cvtss_f32(operation##_ss(x, _mm_movehdup_ps(x)));                               \
  }
FASTATTN_REDUCE(reduce_max, _mm_max)
FASTATTN_REDUCE(reduce_add, _mm_add)
#undef FASTATTN_REDUCE
#else
FASTATTN_INLINE float reduce_max(Vec<float> v) { return reduce_lanes<float>(v, larger<float>); }
FASTATTN_INLINE float reduce_add(Vec<float> v) {
  return reduce_lanes<float>(v, [](float a, float b) { return a + b; });
}
#endif
#endif

// --- square root

#if defined(FASTATTN_AVX512)
FASTATTN_INLINE Vec<float> sqrt(Vec<float> x) { return (Vec<float>)_mm512_sqrt_ps((__m512)x); }
FASTATTN_INLINE Vec<double> sqrt(Vec<double> x) { return (Vec<double>)_mm512_sqrt_pd((__m512d)x); }
#elif defined(FASTATTN_AVX2)
FASTATTN_INLINE Vec<float> sqrt(Vec<float> x) { return (Vec<float>)_mm256_sqrt_ps((__m256)x); }
FASTATTN_INLINE Vec<double> sqrt(Vec<double> x) { return (Vec<double>)_mm256_sqrt_pd((__m256d)x); }
#else
FASTATTN_INLINE Vec<float> sqrt(Vec<float> x) {
  for (int i = 0; i < kWidth<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
FASTATTN_INLINE Vec<double> sqrt(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif

// --- exp2

// 2^x for x up to the overflow threshold; 0 for -inf, NaN for NaN. Relative error 7.5e-8 before
// rounding: minimax polynomial of degree 5 on |f| <= 1/2. Results below the normal range are 0.
FASTATTN_INLINE Vec<float> exp2(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(kVecBytes)));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits; 127 more biases
  // it as an exponent.
  const Vec<float> magic = broadcast(12582912.0f + 127.0f);
  // The power of -127 has an exponent field of 0, which is 0.0; NaN stays.
  x = max(broadcast(-127.0f), x);
  const Vec<float> shifted = x + magic;
  const Vec<float> f = x - (shifted - magic);
  Vec<float> p = broadcast(1.327647263e-03f);
  p = p * f + broadcast(9.675541343e-03f);
  p = p * f + broadcast(5.550713272e-02f);
  p = p * f + broadcast(2.402211972e-01f);
  p = p * f + broadcast(6.931469671e-01f);
  p = p * f + broadcast(1.000000072e+00f);
  return p * (Vec<float>)((Bits)shifted << 23);
}

// Taylor polynomial of degree 13: the truncation error on |f| <= 1/2 is 4e-18.
FASTATTN_INLINE Vec<double> exp2(Vec<double> x) {
  typedef int64_t Bits __attribute__((vector_size(kVecBytes)));
  const Vec<double> magic = broadcast(6755399441055744.0 + 1023.0);  // 1.5 * 2^52, biased
  x = max(broadcast(-1023.0), x);
  const Vec<double> shifted = x + magic;
  const Vec<double> f = x - (shifted - magic);
  constexpr double kCoefficients[] = {
      // ln(2)^k / k! from k = 12 down
      2.56784359934881958e-11, 4.44553827187081007e-10, 7.05491162080112088e-09,
      1.01780860092396960e-07, 1.32154867901443053e-06, 1.52527338040598377e-05,
      1.54035303933816061e-04, 1.33335581464284411e-03, 9.61812910762847688e-03,
      5.55041086648215762e-02, 2.40226506959100694e-01, 6.93147180559945286e-01,
      1.00000000000000000e+00};
  Vec<double> p = broadcast(1.36914888539041241e-12);
  for (const double c : kCoefficients) p = p * f + broadcast(c);
  return p * (Vec<double>)((Bits)shifted << 52);
}

// --- tanh

// Relative error 2e-7: x + x^3 P(x^2), minimax, up to 5/8, where the quotient of exponentials would
// cancel.
FASTATTN_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> zero{}, magnitude = x < zero ? -x : x, z = x * x;
  Vec<float> p = broadcast(-5.704985466e-03f);
  p = p * z + broadcast(2.063908614e-02f);
  p = p * z + broadcast(-5.373971537e-02f);
  p = p * z + broadcast(1.333144158e-01f);
  p = p * z + broadcast(-3.333328068e-01f);
  const Vec<float> small = x + x * z * p;
  const Vec<float> t = exp2(magnitude * broadcast(-2.885390082f)), one = broadcast(1.0f);
  const Vec<float> large = (one - t) / (one + t);
  return magnitude < broadcast(0.625f) ? small : (x < zero ? -large : large);
}
FASTATTN_INLINE Vec<double> tanh(Vec<double> x) {
  double lanes[kWidth<double>];
  store(lanes, x);
  for (double& lane : lanes) lane = __builtin_tanh(lane);
  return load(lanes);
}

// --- ReLU and its bit-mask

// max(x, 0), but a NaN stays a NaN.
template <class T>
FASTATTN_INLINE Vec<T> relu(Vec<T> x) {
  return x <= Vec<T>{} ? Vec<T>{} : x;
}

// The 8 bits of x[0..8) that a ReLU lets pass: not (x <= 0).
template <class T>
FASTATTN_INLINE uint8_t relu_bits(const T* x) {
  uint8_t byte = 0;
  for (int t = 0; t < 8; ++t) byte |= static_cast<uint8_t>(!(x[t] <= T(0)) << t);
  return byte;
}
// dst[t] = bit t of byte ? src[t] : 0; dst may be src.
template <class T>
FASTATTN_INLINE void apply_relu_bits(uint8_t byte, T* dst, const T* src, int count) {
  for (int t = 0; t < count; ++t) dst[t] = byte >> t & 1 ? src[t] : T(0);
}
#if defined(FASTATTN_AVX2)
FASTATTN_INLINE uint8_t relu_bits(const float* x) {
  return static_cast<uint8_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_NLE_UQ)));
}
FASTATTN_INLINE void apply_relu_bits(uint8_t byte, float* dst, const float* src) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i passes =
      _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), lanes), lanes);
  _mm256_storeu_ps(dst, _mm256_and_ps(_mm256_castsi256_ps(passes), _mm256_loadu_ps(src)));
}
#else
FASTATTN_INLINE void apply_relu_bits(uint8_t byte, float* dst, const float* src) {
  apply_relu_bits(byte, dst, src, 8);
}
#endif
FASTATTN_INLINE void apply_relu_bits(uint8_t byte, double* dst, const double* src) {
  apply_relu_bits(byte, dst, src, 8);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
