// What a thread holds of a warpgroup's [64, N] sums, acc[N / 2]: rows row_of(t) and 8 below by
// pairs, of every 8 columns those from 2 (t % 4) and the next. acc[4 c + 2 h + i] is row
// row_of(t) + 8 h, column 8 c + column_of(t) + i. Packed by pairs, they are an operand A.
#pragma once

#include "cuda/tile/block.h"
#include "cuda/tile/operand.h"

namespace fastattn::cuda {

FASTATTN_DEVICE int row_of(int t) { return t / 32 * 16 + t % 32 / 4; }
FASTATTN_DEVICE int column_of(int t) { return 2 * (t % 4); }

// Over the four threads that share a row.
FASTATTN_DEVICE float row_max(float value) {
  value = ptx::max(value, ptx::shuffle_xor(value, 1));
  return ptx::max(value, ptx::shuffle_xor(value, 2));
}
FASTATTN_DEVICE float row_sum(float value) {
  value += ptx::shuffle_xor(value, 1);
  return value + ptx::shuffle_xor(value, 2);
}

// All of x, of which nothing is negative, is computed before what follows.
template <int kCount>
FASTATTN_DEVICE void settle(const float (&x)[kCount]) {
  uint32_t bits = 0;
  FASTATTN_UNROLL
  for (int i = 0; i < kCount; ++i) bits |= ptx::bits_of(x[i]);
  ptx::settle(bits);
}

template <class T, int kCount>
FASTATTN_DEVICE void pack_pairs(const float (&acc)[2 * kCount], uint32_t (&words)[kCount]) {
  FASTATTN_UNROLL
  for (int i = 0; i < kCount; ++i) words[i] = ptx::pack<T>(acc[2 * i], acc[2 * i + 1]);
}

// Into a tile of 64 rows, 64 columns at every `apart` bytes; without bank conflicts.
template <int kN>
FASTATTN_DEVICE void store_tile(char* tile, int apart, int t, const uint32_t (&words)[kN / 4]) {
  const int row = row_of(t);
  const int begin = ptx::fresh(row * kRowBytes + row % 8 * 16 + 2 * column_of(t));
  FASTATTN_UNROLL
  for (int c = 0; c < kN / 8; ++c) {
    char* to = tile + c / 8 * apart + (begin ^ c % 8 * 16);  // the swizzle
    ptx::store_shared(to, words[2 * c]);
    ptx::store_shared(to + 8 * kRowBytes, words[2 * c + 1]);
  }
}

// A packed pair to columns `column` and the next of a row in global memory, where they are below
// `columns`; at once if rows begin at multiples of 4 bytes.
template <class T>
FASTATTN_DEVICE void store_pair(T* row, int64_t column, int64_t columns, bool aligned,
                                uint32_t pair) {
  if (aligned && column + 1 < columns) {
    *reinterpret_cast<uint32_t*>(row + column) = pair;
    return;
  }
  auto* to = reinterpret_cast<uint16_t*>(row + column);
  if (column < columns) to[0] = static_cast<uint16_t>(pair);
  if (column + 1 < columns) to[1] = static_cast<uint16_t>(pair >> 16);
}

}  // namespace fastattn::cuda
