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

// The same of transposed scores [64 keys, kBlockQ queries]; bit h of hidden_rows hides the key of
// row row_of(t) + 8 h from all.
template <int kBlockQ>
FASTATTN_DEVICE void hide_transposed(const Band& band, int hidden_rows, int q0, int k0, int t,
                                     float (&s)[kBlockQ / 2]) {
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int key = k0 + row_of(t) + 8 * half, query = q0 + column_of(t);
    const int from = key - band.right - query;
    const int to = key < band.seq_k && !(hidden_rows >> half & 1) ? key + band.left - query : -1;
    FASTATTN_UNROLL
    for (int i = 2 * half; i < kBlockQ / 2; i += 4) {
      FASTATTN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int at = 8 * (i / 4) + j;
        if (at < from || at > to) s[i + j] = -INFINITY;
      }
    }
  }
}

// 2^x in multiply-adds, x <= 127. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low
// bits; 127 more biases it as an exponent. Minimax polynomial of degree 4 on |f| <= 1/2 that is 1
// at 0: relative error 2.9e-6, of which rounding to 16 bits leaves nothing. Below 2^-126.5 it is 0;
// NaN stays.
FASTATTN_DEVICE float exp2_by_polynomial(float x) {
  constexpr float kMagic = 12582912.0f + 127.0f;
  x = ptx::max_or_nan(x, -127.0f);  // its power comes out as an exponent field of 0
  const float shifted = x + kMagic;
  const float f = x - (shifted - kMagic);
  float p = 9.582852945e-03f;
  p = p * f + 5.590642616e-02f;
  p = p * f + 2.402409911e-01f;
  p = p * f + 6.931241751e-01f;
  p = p * f + 1.0f;
  return p * ptx::of_bits(ptx::bits_of(shifted) << 23);
}

constexpr float kLn2 = 0.693147181f;

// Where a row's powers have their origin: the product of its maximum and the scale in base 2,
// rounded. All powers of a row are off by what rounding took, which log_sum makes good; from kLarge
// on they might overflow, and the difference is taken first.
constexpr float kLarge = 16777216.0f;
FASTATTN_DEVICE float origin_of(float max, float scale_log2) {
  return max == -INFINITY ? 0.0f : ptx::product(max, scale_log2);
}
FASTATTN_DEVICE bool is_large(float origin) { return !(ptx::absolute(origin) < kLarge); }

// A score's P, from its row's numbers. The difference first: it is exact near the largest score,
// however large that is.  // E6
FASTATTN_DEVICE float weight(float score, float scale_log2, float max, float log_sum_log2) {
  return ptx::exp2(ptx::multiply_add(score - max, scale_log2, -log_sum_log2));
}

// Of every 16 groups of 8 columns kPolynomial take their powers by polynomial: the units for powers
// have less to do, those for multiply-adds more. A row's maximum stays what it was until it has
// grown by more than a factor of 2^kSlack: sums are then seldom scaled again, and powers are at
// most 2^kSlack, as exact as others.
template <int kPolynomial, int kSlack>
struct OnlineSoftmax {
  float max[2] = {-INFINITY, -INFINITY};  // of a row's scores, but for the slack
  float sum[2] = {};                      // of 2^(score - origin), this thread's share

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
      const bool keep = !((most - max[half]) * scale_log2 > float{kSlack});
      if (keep) most = max[half];
      const float origin = origin_of(most, scale_log2);
      const bool large = is_large(origin);
      const float grown =
          large ? (max[half] - most) * scale_log2 : ptx::product(max[half], scale_log2) - origin;
      rescale[half] = keep ? 1.0f : ptx::exp2(grown);
      max[half] = most;
      if (large) {  // seldom: scores are products of 10^7
        FASTATTN_UNROLL
        for (int i = 2 * half; i < kCount; i += 4) {
          s[i] = (s[i] - most) * scale_log2;
          s[i + 1] = (s[i + 1] - most) * scale_log2;
        }
      } else {
        FASTATTN_UNROLL
        for (int i = 2 * half; i < kCount; i += 4) {
          s[i] = ptx::multiply_add(s[i], scale_log2, -origin);
          s[i + 1] = ptx::multiply_add(s[i + 1], scale_log2, -origin);
        }
      }
      float total = 0.0f;
      FASTATTN_UNROLL
      for (int i = 2 * half; i < kCount; i += 4) {
        FASTATTN_UNROLL
        for (int j = i; j < i + 2; ++j)
          s[j] = i / 4 % 16 < kPolynomial ? exp2_by_polynomial(s[j]) : ptx::exp2(s[j]);
        total += s[i] + s[i + 1];
      }
      sum[half] = sum[half] * rescale[half] + total;  // E3
    }
    return !ptx::any(rescale[0] != 1.0f || rescale[1] != 1.0f);
  }

  // The logarithm of the sum of e^(score - max) in the row of `half`, from the sum over all
  // threads.
  FASTATTN_DEVICE float log_sum(int half, float of_all, float scale_log2) const {
    const float origin = origin_of(max[half], scale_log2);
    const float rest = is_large(origin) ? 0.0f : ptx::multiply_add(max[half], scale_log2, -origin);
    return ptx::log(of_all) - rest * kLn2;
  }
};

}  // namespace fastattn::cuda
