// What is done for attention row by row, beside the kernels that multiply: the bits of a key mask,
// the backward's softmax and delta before it, dQ's conversion behind it. Bound by memory.
#pragma once

#include "cuda/tile/band.h"
#include "cuda/tile/fragment.h"

namespace fastattn::cuda {

// [batch, heads, seq, dim] with unit last stride; strides in elements.
struct Rows {
  char* data;
  int64_t batch_stride, head_stride, row_stride;

  template <class T>
  FASTATTN_DEVICE T* row(int batch, int head, int row) const {
    return reinterpret_cast<T*>(data) + batch * batch_stride + head * head_stride +
           row * row_stride;
  }
};

constexpr int kRowThreads = 256;
constexpr double kLog2E = 1.4426950408889634;

// Whether 8 elements of 16 bits can be read or written there at once.
FASTATTN_DEVICE bool at_once(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Bits of a mask over keys, a thread a word.
struct KeyWordsParameters {
  static constexpr int kMostDims = 6;
  const uint8_t* mask;  // [*batch, seq_k]: 1 where the key is seen
  int dims, sizes[kMostDims];
  int64_t strides[kMostDims], key_stride;
  int batch, seq_k, words;
  uint32_t* key_words;  // [batch, words]
};

// Bit i: byte i is not 0.
FASTATTN_DEVICE uint32_t bits_of_bytes(uint32_t bytes) {
  const uint32_t ones = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) >> 7 & 0x01010101u;
  return ones * 0x01020408u >> 24 & 0xfu;
}

FASTATTN_DEVICE void key_words(const KeyWordsParameters& p) {
  const int index = ptx::block_id() * kRowThreads + ptx::thread_id();
  if (index >= p.batch * p.words) return;
  const int first = index % p.words * 32;
  const uint8_t* mask = p.mask + first * p.key_stride;
  FASTATTN_NO_UNROLL
  for (int d = p.dims - 1, rest = index / p.words; d >= 0; --d) {
    mask += rest % p.sizes[d] * p.strides[d];
    rest /= p.sizes[d];
  }
  uint32_t word = 0;
  if (p.key_stride == 1 && first + 32 <= p.seq_k && at_once(mask)) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto keys = ptx::load_global<ptx::Words4>(mask + 16 * half);
      FASTATTN_UNROLL
      for (int i = 0; i < 4; ++i) word |= bits_of_bytes(keys.word[i]) << (16 * half + 4 * i);
    }
  } else {
    FASTATTN_NO_UNROLL
    for (int j = 0; j < 32 && first + j < p.seq_k; ++j)
      word |= static_cast<uint32_t>(mask[j * p.key_stride] != 0) << j;
  }
  p.key_words[index] = word;
}

// E6's Δ = rowsum(dO∘O) − dLSE, and the softmax's two numbers side by side; a block of threads a
// block of queries, a lane 8 columns of a row. Rows that see nothing and rows behind the last have
// a maximum of +inf: their powers are 0.
struct DeltaParameters {
  Rows out, grad_out;
  const float *row_max, *log_sum;  // [batch, heads, seq]
  const float* grad_lse;           // likewise, or absent
  int heads, seq, blocks, dim;
  float* softmax;  // [batch, heads, blocks][kGradQueryBlock / kDim][2]: row_max, log_sum in base 2
  float* delta;    // [batch, heads, blocks][kGradQueryBlock / kDim]
};

// Over `count` elements, of which it takes up to 8, in order.
template <class T>
FASTATTN_DEVICE float sum_of_products(const T* x, const T* y, int count) {
  float sum = 0.0f;
  if (count >= 8 && at_once(x) && at_once(y)) {
    const auto a = ptx::load_global<ptx::Words4>(x), b = ptx::load_global<ptx::Words4>(y);
    FASTATTN_UNROLL
    for (int i = 0; i < 4; ++i) sum = ptx::add_products_of_pairs<T>(sum, a.word[i], b.word[i]);
  } else {
    FASTATTN_NO_UNROLL
    for (int i = 0; i < 8 && i < count; ++i)
      sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
  }
  return sum;
}

template <class T, int kDim>
FASTATTN_DEVICE void delta(const DeltaParameters& p) {
  constexpr int kBlockQ = kGradQueryBlock / kDim, kLanes = kDim / 8;
  const int block = ptx::block_id() % p.blocks, head = ptx::block_id() / p.blocks;
  const int batch = head / p.heads, of_batch = head % p.heads;
  const int column = ptx::thread_id() % kLanes * 8;
  const T* out = p.out.row<T>(batch, of_batch, 0) + column;
  const T* grad_out = p.grad_out.row<T>(batch, of_batch, 0) + column;
  FASTATTN_NO_UNROLL
  for (int row = ptx::thread_id() / kLanes; row < kBlockQ; row += kRowThreads / kLanes) {
    const int i = block * kBlockQ + row;
    float row_max = -INFINITY, log_sum = 0.0f, grad_lse = 0.0f, sum = 0.0f;
    if (i < p.seq) {
      const int64_t at = int64_t{head} * p.seq + i;
      row_max = p.row_max[at];
      log_sum = p.log_sum[at];
      if (p.grad_lse != nullptr) grad_lse = p.grad_lse[at];
      sum = sum_of_products(out + i * p.out.row_stride, grad_out + i * p.grad_out.row_stride,
                            p.dim - column);
    }
    FASTATTN_UNROLL
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
    if (column > 0) continue;
    const int64_t to = int64_t{ptx::block_id()} * kBlockQ + row;
    const bool empty = row_max == -INFINITY;  // its sum may be NaN
    p.softmax[2 * to] = empty ? INFINITY : row_max;
    p.softmax[2 * to + 1] = empty ? 0.0f : log_sum * static_cast<float>(kLog2E);
    p.delta[to] = empty ? 0.0f : sum - grad_lse;
  }
}

// dQ from the order of fragments in which the backward adds it up; a block of threads a block of
// queries, a thread 8 columns of two rows twice: the fragments of four threads.
struct GradQueryParameters {
  const float* sums;     // [batch, heads, blocks][2][8][128][4]
  const float* softmax;  // [batch, heads, padded][2]
  Rows grad_q;
  int heads, seq, blocks, dim;
  float scale;
};

// Up to 8 elements, of which `count` are in the row.
template <class T>
FASTATTN_DEVICE void store_elements(T* to, int count, ptx::Words4 pairs) {
  if (count >= 8 && at_once(to)) return ptx::store_global(to, pairs);
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 4 == 0;
  FASTATTN_NO_UNROLL
  for (int i = 0; i < 8; i += 2) {
    store_pair(to, i, count, aligned, pairs.word[0]);
    pairs = {pairs.word[1], pairs.word[2], pairs.word[3], 0};
  }
}

template <class T, int kDim>
FASTATTN_DEVICE void grad_query(const GradQueryParameters& p) {
  constexpr int kBlockQ = kGradQueryBlock / kDim;
  const int block = ptx::block_id() % p.blocks, head = ptx::block_id() / p.blocks;
  const int chunk = ptx::thread_id() % 8, t = ptx::thread_id() / 8 * 4;  // of four, the first
  T* grad_q = p.grad_q.row<T>(head / p.heads, head % p.heads, 0);
  FASTATTN_NO_UNROLL
  for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
    const int column = (kDim == 128 ? 64 * warpgroup : 0) + 8 * chunk;
    if (column >= p.dim) return;
    const float* sums = p.sums + int64_t{ptx::block_id()} * (kBlockQ * kDim) +
                        ((warpgroup * 8 + chunk) * 128 + t) * 4;
    ptx::Floats4 fragments[4];
    FASTATTN_UNROLL
    for (int i = 0; i < 4; ++i) fragments[i] = ptx::load_global<ptx::Floats4>(sums + 4 * i);
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int within = (kDim == 64 ? 64 * warpgroup : 0) + row_of(t) + 8 * half;
      const int row = block * kBlockQ + within;
      if (row >= p.seq) continue;
      const bool empty = p.softmax[2 * (int64_t{ptx::block_id()} * kBlockQ + within)] == INFINITY;
      ptx::Words4 pairs;
      FASTATTN_UNROLL
      for (int i = 0; i < 4; ++i) {  // E8
        const ptx::Floats4& x = fragments[i];
        const uint32_t pair = half == 0 ? ptx::pack<T>(x.x * p.scale, x.y * p.scale)
                                        : ptx::pack<T>(x.z * p.scale, x.w * p.scale);
        pairs.word[i] = empty ? 0 : pair;
      }
      store_elements(grad_q + row * p.grad_q.row_stride + column, p.dim - column, pairs);
    }
  }
}

}  // namespace fastattn::cuda
