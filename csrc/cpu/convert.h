// The 16-bit types, and rows of any io type converted from and to the accumulator's.
#pragma once

#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

FASTATTN_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
// Where the processor does it, alone and by vectors alike, results below the normal range are 0.
FASTATTN_INLINE bf16 to_bf16(float f) {
#if defined(FASTATTN_AVX512BF16)
  return bf16{static_cast<uint16_t>(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(f)), 0))};
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  return bf16{static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded)};
#endif
}
#if defined(FASTATTN_F16C)
FASTATTN_INLINE float to_float(fp16 x) { return _cvtsh_ss(x.bits); }
FASTATTN_INLINE fp16 to_fp16(float f) { return fp16{static_cast<uint16_t>(_cvtss_sh(f, 0))}; }
#else
FASTATTN_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ff;
  float f;
  if (exponent == 0) {
    f = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    bits |= sign;
    __builtin_memcpy(&f, &bits, 4);
    return f;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
FASTATTN_INLINE fp16 to_fp16(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return fp16{static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000)
    return fp16{static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000) {  // denormal in fp16: let the fp32 adder round at 2^-24
    float m;
    __builtin_memcpy(&m, &magnitude, 4);
    m += 0.5f;
    uint32_t shifted;
    __builtin_memcpy(&shifted, &m, 4);
    return fp16{static_cast<uint16_t>(sign | (shifted - 0x3f000000))};
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
  return fp16{static_cast<uint16_t>(sign | (rounded >> 13))};
}
#endif

FASTATTN_INLINE float to_acc(float x) { return x; }
FASTATTN_INLINE double to_acc(double x) { return x; }
FASTATTN_INLINE float to_acc(bf16 x) { return to_float(x); }
FASTATTN_INLINE float to_acc(fp16 x) { return to_float(x); }

// Whether it takes a call's worth of instructions to bring one element to the accumulator's type.
template <class T>
constexpr bool kConvertsSlowly = false;
#if !defined(FASTATTN_F16C)
template <>
inline constexpr bool kConvertsSlowly<fp16> = true;
#endif

template <class T>
FASTATTN_INLINE T from_acc(Acc<T> x) {
  return x;
}
template <>
FASTATTN_INLINE bf16 from_acc<bf16>(float x) {
  return to_bf16(x);
}
template <>
FASTATTN_INLINE fp16 from_acc<fp16>(float x) {
  return to_fp16(x);
}

// --- a vector at a time

typedef uint16_t HalfWords __attribute__((vector_size(kVecBytes / 2)));

// GCC 12 takes several instructions for either conversion on AVX2.
#if defined(FASTATTN_AVX2) && !defined(FASTATTN_AVX512)
FASTATTN_INLINE Words widen(HalfWords x) { return (Words)_mm256_cvtepu16_epi32((__m128i)x); }
FASTATTN_INLINE HalfWords narrow(Words x) {
  const __m256i halves = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (HalfWords)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
}
#else
FASTATTN_INLINE Words widen(HalfWords x) { return __builtin_convertvector(x, Words); }
FASTATTN_INLINE HalfWords narrow(Words x) { return __builtin_convertvector(x, HalfWords); }
#endif
template <class T>
FASTATTN_INLINE HalfWords load_half_words(const T* p) {
  HalfWords v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// Rounded to nearest even; a NaN stays one.
FASTATTN_INLINE HalfWords round_to_bf16(Vec<float> x) {
#if defined(FASTATTN_AVX512BF16)
  return (HalfWords)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  const Words nan = (Words)(x != x);
  return narrow((quiet & nan) | (rounded & ~nan));
#endif
}
FASTATTN_INLINE HalfWords round_to_fp16(Vec<float> x) {
#if defined(FASTATTN_AVX512)
  return (HalfWords)_mm512_cvtps_ph((__m512)x, 0);
#elif defined(FASTATTN_F16C)
  return (HalfWords)_mm256_cvtps_ph((__m256)x, 0);
#else
  HalfWords halves;
  for (int i = 0; i < kWidth<float>; ++i) halves[i] = to_fp16(x[i]).bits;
  return halves;
#endif
}

// kWidth of the accumulator's type from and to as many elements of an io type.
template <class T>
FASTATTN_INLINE Vec<T> load_acc(const T* p) {
  return load(p);
}
FASTATTN_INLINE Vec<float> load_acc(const bf16* p) {
  return (Vec<float>)(widen(load_half_words(p)) << 16);
}
FASTATTN_INLINE Vec<float> load_acc(const fp16* p) {
#if defined(FASTATTN_AVX512)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)load_half_words(p));
#elif defined(FASTATTN_F16C)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)load_half_words(p));
#else
  Vec<float> v;
  for (int i = 0; i < kWidth<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
template <class T>
FASTATTN_INLINE auto rounded(Vec<Acc<T>> v) {
  return v;
}
template <>
FASTATTN_INLINE auto rounded<bf16>(Vec<float> v) {
  return round_to_bf16(v);
}
template <>
FASTATTN_INLINE auto rounded<fp16>(Vec<float> v) {
  return round_to_fp16(v);
}
template <class T>
FASTATTN_INLINE void store_acc(T* p, Vec<Acc<T>> v) {
  const auto numbers = rounded<T>(v);
  __builtin_memcpy(p, &numbers, sizeof(numbers));
}
// The same past the caches; p is a multiple of a vector's size. Before another thread reads what
// was written, a fence: streamed().
template <class T>
FASTATTN_INLINE void stream_acc(T* p, Vec<Acc<T>> v) {
  stream(p, rounded<T>(v));
}

// dst[i] = src[i], where either's type is the accumulator's.
template <class D, class S>
FASTATTN_INLINE void convert(D* dst, const S* src, int64_t n) {
  constexpr int64_t kAtOnce = kWidth<Acc<S>>;
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) store_acc(dst + i, load_acc(src + i));
  for (; i < n; ++i) dst[i] = from_acc<D>(to_acc(src[i]));
}

}  // namespace fastattn::cpu::FASTATTN_ISA
