// What products are computed from: elements of the accumulator's type or, where the machine
// multiplies bf16 by twos, words of two bf16 that follow each other in depth.
#pragma once

#include "cpu/convert.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Depths 2k and 2k + 1; past the last depth is 0. Written over other types in place.
struct __attribute__((may_alias)) Pair {
  uint16_t low, high;
};

template <class T>
struct OperandOf {
  using type = Acc<T>;
};
#if defined(FASTATTN_AVX512BF16) || defined(FASTATTN_EMULATED)
template <>
struct OperandOf<bf16> {
  using type = Pair;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;
template <class T>
constexpr bool kPaired = false;
template <>
inline constexpr bool kPaired<Pair> = true;

// The depth of one word of an operand, and the words of a depth.
template <class E>
constexpr int kDepth = kPaired<E> ? 2 : 1;
template <class E>
FASTATTN_INLINE int64_t words(int64_t depth) {
  return ceil_div(depth, kDepth<E>);
}

// acc += the products of a word with each word of a vector.
template <class E>
struct Multiply {
  using Vector = Vec<E>;
  static FASTATTN_INLINE Vector load_words(const E* p) { return load(p); }
  static FASTATTN_INLINE Vector word(const E* p) { return broadcast(*p); }
  static FASTATTN_INLINE void add(Vec<E>& acc, Vector a, Vector b) { acc += a * b; }
};
template <>
struct Multiply<Pair> {
  using Vector = Words;
  static FASTATTN_INLINE Vector load_words(const Pair* p) {
    Words v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static FASTATTN_INLINE Vector word(const Pair* p) {
    uint32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return broadcast_word(bits);
  }
  static FASTATTN_INLINE void add(Vec<float>& acc, Vector a, Vector b) {
#if defined(FASTATTN_AVX512BF16)
    acc = (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    const Words high = broadcast_word(0xffff0000u);
    acc += (Vec<float>)(a & high) * (Vec<float>)(b & high);
    acc += (Vec<float>)(a << 16) * (Vec<float>)(b << 16);
#endif
  }
};

// --- factors of dot products: rows of an io type where they lie, kDotStep elements at a time

template <class T>
constexpr int kDotStep = kWidth<Acc<T>> * kDepth<Operand<T>>;
template <class T>
FASTATTN_INLINE typename Multiply<Operand<T>>::Vector load_factors(const T* p) {
  if constexpr (kPaired<Operand<T>>) {
    return Multiply<Pair>::load_words(reinterpret_cast<const Pair*>(p));
  } else {
    return load_acc(p);
  }
}

// --- rows of numbers in the accumulator's type -> operands, n a multiple of the vector width

// dst [n / kDepth] = row [n], in depth order; dst may lie over row's beginning.
template <class A>
FASTATTN_INLINE void round_row(A*, const A*, int64_t) {}
FASTATTN_INLINE void round_row(Pair* dst, const float* row, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth<float>) {
    const HalfWords rounded = round_to_bf16(load(row + j));
    __builtin_memcpy(dst + j / 2, &rounded, sizeof(rounded));
  }
}

// dst [n]: word j holds low[j] and high[j]; dst may be either row.
FASTATTN_INLINE void round_two_rows(Pair* dst, const float* low, const float* high, int64_t n) {
  for (int64_t j = 0; j < n; j += kWidth<float>) {
    const Words pair = widen(round_to_bf16(load(low + j))) | widen(round_to_bf16(load(high + j)))
                                                                 << 16;
    __builtin_memcpy(dst + j, &pair, sizeof(pair));
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
