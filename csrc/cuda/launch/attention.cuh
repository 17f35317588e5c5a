// What the launches of attention share.
#pragma once

#include <algorithm>

#include "cuda/kernels/attention_rows.h"
#include "cuda/launch/config.cuh"
#include "cuda/launch/runtime.cuh"

namespace fastattn::cuda {

inline int narrow(int64_t value) { return static_cast<int>(value); }

// Keys from here on nobody sees.
inline int64_t reached_keys(const AttentionProblem& p) {
  return std::min(p.seq_k, p.seq_q + std::min<int64_t>(p.right, kNoBound));
}

// The kernels' head dim.
inline int padded_dim(const AttentionProblem& p) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

inline CUtensorMap map_of(const AttentionProblem& p, const TensorView& view, int64_t heads,
                          int64_t rows, int64_t dim, int box_rows) {
  return tensor_map<4>(p.dtype, view.data, {dim, rows, heads, p.batch},
                       {view.row_stride, view.head_stride, view.batch_strides[0]}, box_rows);
}

inline Rows rows_of(const TensorView& view) {
  return {view.data, view.batch_strides[0], view.head_stride, view.row_stride};
}

inline Band band_of(const AttentionProblem& p, const uint32_t* words, int count) {
  return {narrow(p.seq_q),
          narrow(reached_keys(p)),
          narrow(std::min<int64_t>(p.left, kNoBound)),
          narrow(std::min<int64_t>(p.right, kNoBound)),
          words,
          count};
}

// Words a batch element, for whole blocks of keys.
inline int words_of(const AttentionProblem& p) {
  if (p.mask_kind == MaskKind::kNone) return 0;
  return narrow((p.seq_k + kKeyWordBlock - 1) / kKeyWordBlock * kKeyWordBlock / 32);
}

// Blocks of `rows` of all heads; `streamed` bytes of a head go by while its blocks run.
inline HeadBlocks blocks_of(int64_t heads, int64_t rows, int block, int64_t streamed,
                            int64_t alike) {
  const int64_t section = std::max<int64_t>(1, kSectionBytes / std::max<int64_t>(1, streamed));
  return {narrow(heads), narrow(std::min(heads, section * alike)),
          narrow((rows + block - 1) / block)};
}

}  // namespace fastattn::cuda
