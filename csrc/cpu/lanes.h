// Rows of any length, a vector at a time.
#pragma once

#include "cpu/convert.h"

namespace fastattn::cpu::FASTATTN_ISA {

// --- a vector, or the first `count` lanes of one at the end of a row; the others are 0

template <class T>
FASTATTN_INLINE Vec<Acc<T>> load_lanes(const T* p, int64_t count) {
  if (count == kWidth<Acc<T>>) return load_acc(p);
  T lanes[kWidth<Acc<T>>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load_acc(static_cast<const T*>(lanes));
}
// Returns what it has stored: v, rounded.
template <class T>
FASTATTN_INLINE Vec<Acc<T>> store_lanes(T* p, Vec<Acc<T>> v, int64_t count) {
  T lanes[kWidth<Acc<T>>];
  store_acc(lanes, v);
  if (count == kWidth<Acc<T>>) {
    __builtin_memcpy(p, lanes, sizeof(lanes));
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
  }
  return load_acc(static_cast<const T*>(lanes));
}
template <class A>
FASTATTN_INLINE Vec<A> first_lanes(Vec<A> v, int64_t count) {
  if (count == kWidth<A>) return v;
  A lanes[kWidth<A>];
  store(lanes, v);
  for (int64_t i = count; i < kWidth<A>; ++i) lanes[i] = A(0);
  return load(lanes);
}

// body(j, count) for the vectors of columns [j, end).
template <class A, class Body>
FASTATTN_INLINE void for_vectors(int64_t j, int64_t end, const Body& body) {
  for (; j + kWidth<A> <= end; j += kWidth<A>) body(j, int64_t{kWidth<A>});
  if (j < end) body(j, end - j);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
