// The online softmax of a warpgroup's scores [64, N] in base 2, E2 and E3.
#pragma once

#include "cuda/tile/band.h"
#include "cuda/tile/fragment.h"

namespace fastattn::cuda {

// Scores that row row_of(t) + 8 h of the queries from q0 does not see become -inf.
template <int kBlock, bool kHas>
FASTATTN_DEVICE void hide(const Band& band, const KeyWords<kBlock, kHas>& words, int q0, int k0,
                          int t, float (&s)[kBlock / 2]) {
  uint32_t seen[words.kCount];
  FASTATTN_UNROLL
  for (int i = 0; i < words.kCount; ++i) seen[i] = kHas ? words.word[i] >> column_of(t) : ~0u;
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = q0 + row_of(t) + 8 * half, column = k0 + column_of(t);
    const int from = row - band.left - column;
    const int to = (row + band.right < band.seq_k ? row + band.right : band.seq_k - 1) - column;
    FASTATTN_UNROLL
    for (int c = 0; c < kBlock / 8; ++c) {
      FASTATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * c + i;
        const bool bit = seen[at / 32] >> at % 32 & 1;
        if (at < from || at > to || !bit) s[4 * c + 2 * half + i] = -INFINITY;
      }
    }
  }
}

struct OnlineSoftmax {
  float max[2] = {-INFINITY, -INFINITY};  // of a row's scores
  float sum[2] = {};                      // of e^(score - max), this thread's share

  // Scores become their powers; rescale is what sums so far must be multiplied by. Returns whether
  // that is 1 for all rows of the warp.
  template <int kCount>
  FASTATTN_DEVICE bool step(float scale_log2, float (&s)[kCount], float (&rescale)[2]) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float most = max[half];
      FASTATTN_UNROLL
      for (int i = 2 * half; i < kCount; i += 4)
        most = ptx::max(most, ptx::max(s[i], s[i + 1]));  // E2
      most = row_max(most);
      const float origin = most == -INFINITY ? 0.0f : most * scale_log2;
      rescale[half] = ptx::exp2(max[half] * scale_log2 - origin);
      max[half] = most;
      float total = 0.0f;
      FASTATTN_UNROLL
      for (int i = 2 * half; i < kCount; i += 4) {
        s[i] = ptx::exp2(s[i] * scale_log2 - origin);
        s[i + 1] = ptx::exp2(s[i + 1] * scale_log2 - origin);
        total += s[i] + s[i + 1];
      }
      sum[half] = sum[half] * rescale[half] + total;  // E3
    }
    return !ptx::any(rescale[0] != 1.0f || rescale[1] != 1.0f);
  }
};

}  // namespace fastattn::cuda
