// What is done for attention row by row, beside the kernels that multiply: the bits of a key mask,
// the backward's LSE and delta before it, dQ's conversion behind it. Bound by memory.
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

// Bits of a mask over keys, a thread a word.
struct KeyWordsParameters {
  static constexpr int kMostDims = 6;
  const uint8_t* mask;  // [*batch, seq_k]: 1 where the key is seen
  int dims, sizes[kMostDims];
  int64_t strides[kMostDims], key_stride;
  int batch, seq_k, words;
  uint32_t* key_words;  // [batch, words]
};

FASTATTN_DEVICE void key_words(const KeyWordsParameters& p) {
  const int64_t index = int64_t{ptx::block_id()} * kRowThreads + ptx::thread_id();
  if (index >= int64_t{p.batch} * p.words) return;
  const int first = static_cast<int>(index % p.words) * 32;
  int64_t offset = 0;
  int rest = static_cast<int>(index / p.words);
  for (int d = p.dims - 1; d >= 0; --d) {
    offset += rest % p.sizes[d] * p.strides[d];
    rest /= p.sizes[d];
  }
  uint32_t word = 0;
  for (int j = 0; j < 32 && first + j < p.seq_k; ++j)
    word |= static_cast<uint32_t>(p.mask[offset + (first + j) * p.key_stride] != 0) << j;
  p.key_words[index] = word;
}

// E6's Δ = rowsum(dO∘O) − dLSE, and LSE in base 2, a warp a row. Rows that see nothing and rows
// behind the last have LSE +inf: their powers are 0.
struct DeltaParameters {
  Rows out, grad_out;
  const float* lse;       // [batch, heads, seq]
  const float* grad_lse;  // likewise, or absent
  int batch, heads, seq, padded, dim;
  float* lse_log2;  // [batch, heads, padded]
  float* delta;     // [batch, heads, padded]
};

template <class T>
FASTATTN_DEVICE void delta(const DeltaParameters& p) {
  constexpr int kWarps = kRowThreads / 32;
  const int64_t index = int64_t{ptx::block_id()} * kWarps + ptx::thread_id() / 32;
  if (index >= int64_t{p.batch} * p.heads * p.padded) return;
  const int lane = ptx::thread_id() % 32, i = static_cast<int>(index % p.padded);
  const int head = static_cast<int>(index / p.padded % p.heads);
  const int batch = static_cast<int>(index / p.padded / p.heads);
  const int64_t at = (int64_t{batch} * p.heads + head) * p.seq + i;
  const bool empty = i >= p.seq || p.lse[at] == -INFINITY;
  float sum = 0.0f;
  if (!empty) {
    const T* o = p.out.row<T>(batch, head, i);
    const T* grad = p.grad_out.row<T>(batch, head, i);
    for (int d = lane; d < p.dim; d += 32)
      sum += static_cast<float>(o[d]) * static_cast<float>(grad[d]);
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  if (lane != 0) return;
  p.lse_log2[index] = empty ? INFINITY : p.lse[at] * 1.44269504f;
  p.delta[index] = empty ? 0.0f : sum - (p.grad_lse == nullptr ? 0.0f : p.grad_lse[at]);
}

// dQ from the order of fragments in which the backward adds it up; a block of threads a block of
// queries.
struct GradQueryParameters {
  const float* sums;      // [batch, heads, blocks][2][8][128][4]
  const float* lse_log2;  // [batch, heads, padded]
  Rows grad_q;
  int heads, seq, blocks, dim;
  float scale;
};

template <class T, int kDim>
FASTATTN_DEVICE void grad_query(const GradQueryParameters& p) {
  constexpr int kBlockQ = 8192 / kDim;
  const int block = ptx::block_id() % p.blocks, head = ptx::block_id() / p.blocks;
  const int warpgroup = ptx::thread_id() / 128, t = ptx::thread_id() % 128;
  const float* sums = p.sums + int64_t{ptx::block_id()} * (kBlockQ * kDim);
  for (int half = 0; half < 2; ++half) {
    const int row = block * kBlockQ + (kDim == 64 ? 64 * warpgroup : 0) + row_of(t) + 8 * half;
    if (row >= p.seq) continue;
    const bool empty = p.lse_log2[int64_t{head} * p.blocks * kBlockQ + row] == INFINITY;
    T* to = p.grad_q.row<T>(head / p.heads, head % p.heads, row);
    for (int c = 0; c < 8; ++c) {
      const int column = (kDim == 128 ? 64 * warpgroup : 0) + 8 * c + column_of(t);
      const float* pair = sums + ((warpgroup * 8 + c) * 128 + t) * 4 + 2 * half;
      for (int i = 0; i < 2; ++i) {
        if (column + i < p.dim)
          to[column + i] = static_cast<T>(empty ? 0.0f : pair[i] * p.scale);  // E8
      }
    }
  }
}

}  // namespace fastattn::cuda
