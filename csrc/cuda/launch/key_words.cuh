// The launch that makes bits of a key mask.
#pragma once

#include "cuda/launch/attention.cuh"

namespace fastattn::cuda {

static __global__ void __launch_bounds__(kRowThreads)
    key_words_kernel(const __grid_constant__ KeyWordsParameters p) {
  key_words(p);
}

inline void launch_key_words(const AttentionProblem& p, uint32_t* key_words, int words,
                             cudaStream_t stream) {
  if (words == 0) return;
  KeyWordsParameters parameters{};
  parameters.mask = reinterpret_cast<const uint8_t*>(p.mask.data);
  parameters.dims = p.batch_dims;
  for (int d = 0; d < p.batch_dims; ++d) {
    parameters.sizes[d] = narrow(p.batch_sizes[d]);
    parameters.strides[d] = p.mask.batch_strides[d];
  }
  parameters.key_stride = p.mask.col_stride;
  parameters.batch = narrow(p.batch);
  parameters.seq_k = narrow(p.seq_k);
  parameters.words = words;
  parameters.key_words = key_words;
  const int64_t blocks = (p.batch * words + kRowThreads - 1) / kRowThreads;
  key_words_kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(parameters);
  check(cudaGetLastError(), "launch of key_words");
}

}  // namespace fastattn::cuda
