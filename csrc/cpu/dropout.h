// Dropout's keep-mask: Philox4x32-10 (Salmon et al., SC'11) keyed by the seed, its counters (column
// / 4, row, head, batch), a vector of counters at a time.
#pragma once

#include "common/philox.h"
#include "common/problem.h"
#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

// The high and low words of x * factor.
#if defined(FASTATTN_AVX512)
FASTATTN_INLINE void multiply_words(Words x, uint32_t factor, Words& high, Words& low) {
  const __m512i a = (__m512i)x, f = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32(a, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), f);
  low = (Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
#elif defined(FASTATTN_AVX2)
FASTATTN_INLINE void multiply_words(Words x, uint32_t factor, Words& high, Words& low) {
  const __m256i a = (__m256i)x, f = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32(a, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), f);
  low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
#else
FASTATTN_INLINE void multiply_words(Words x, uint32_t factor, Words& high, Words& low) {
  for (int l = 0; l < kWords; ++l) {
    const uint64_t product = uint64_t{x[l]} * factor;
    high[l] = static_cast<uint32_t>(product >> 32);
    low[l] = static_cast<uint32_t>(product);
  }
}
#endif

struct Dropout {
  static constexpr int kGroups = 16 / kWords;  // vectors of counters for 64 columns

  bool active;
  const int64_t* seeds;
  int64_t each;  // batch elements of a seed
  uint32_t threshold;
  double keep_scale;

  explicit Dropout(const AttentionProblem& p)
      : active(p.dropout_p > 0),
        seeds(p.seeds),
        each(max64(1, p.batch / p.seed_count)),
        threshold(static_cast<uint32_t>(philox_keep_threshold(p.dropout_p))),
        keep_scale(1.0 / (1.0 - p.dropout_p)) {}

  // z[0, n) = keep-mask / (1 - p) of columns [j0, j0 + n); j0 is a multiple of 4 and z has room for
  // round_up(n, 64).
  template <class A>
  void fill(A* z, int64_t batch, int64_t head, int64_t i, int64_t j0, int64_t n) const {
    const auto seed = static_cast<uint64_t>(seeds[batch / each]);
    batch %= each;
    for (int64_t j = 0; j < n; j += 64) {
      Words c[kGroups][4];
      Words lane;
      for (int l = 0; l < kWords; ++l) lane[l] = static_cast<uint32_t>(l);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        c[g][0] = lane + (static_cast<uint32_t>((j0 + j) / 4) + static_cast<uint32_t>(g * kWords));
        c[g][1] = broadcast_word(static_cast<uint32_t>(i));
        c[g][2] = broadcast_word(static_cast<uint32_t>(head));
        c[g][3] = broadcast_word(static_cast<uint32_t>(batch));
      }
      uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          Words high0, low0, high1, low1;
          multiply_words(c[g][0], 0xD2511F53u, high0, low0);
          multiply_words(c[g][2], 0xCD9E8D57u, high1, low1);
          c[g][0] = high1 ^ c[g][1] ^ k0;
          c[g][1] = low1;
          c[g][2] = high0 ^ c[g][3] ^ k1;
          c[g][3] = low0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) interleave(z + j + g * 4 * kWords, c[g]);
    }
  }

 private:
  // z[4 l + w] = the multiplier of word w of lane l.
  void interleave(double* z, const Words (&c)[4]) const {
    for (int w = 0; w < 4; ++w) {
      for (int l = 0; l < kWords; ++l) z[4 * l + w] = c[w][l] >= threshold ? keep_scale : 0.0;
    }
  }
#if defined(FASTATTN_AVX2)
  FASTATTN_INLINE void interleave(float* z, const Words (&c)[4]) const {
    const float kept = static_cast<float>(keep_scale);
    Words keep_bits[4];
    uint32_t kept_bits;
    __builtin_memcpy(&kept_bits, &kept, 4);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w)
      keep_bits[w] = (Words)(c[w] >= broadcast_word(threshold)) & broadcast_word(kept_bits);
    // Within each 128 bits: pairs of words, then all four; row k then holds lanes k, k + 4, ...
    const Words a = unpack_low(keep_bits[0], keep_bits[1]),
                b = unpack_low(keep_bits[2], keep_bits[3]);
    const Words d = unpack_high(keep_bits[0], keep_bits[1]),
                e = unpack_high(keep_bits[2], keep_bits[3]);
    store_lanes(z, pairs_low(a, b));
    store_lanes(z + 4, pairs_high(a, b));
    store_lanes(z + 8, pairs_low(d, e));
    store_lanes(z + 12, pairs_high(d, e));
  }
  // The 128-bit parts of v, 16 floats apart.
#if defined(FASTATTN_AVX512)
  static FASTATTN_INLINE void store_lanes(float* z, Words v) {
    _mm_storeu_ps(z, _mm512_extractf32x4_ps((__m512)v, 0));
    _mm_storeu_ps(z + 16, _mm512_extractf32x4_ps((__m512)v, 1));
    _mm_storeu_ps(z + 32, _mm512_extractf32x4_ps((__m512)v, 2));
    _mm_storeu_ps(z + 48, _mm512_extractf32x4_ps((__m512)v, 3));
  }
#define FASTATTN_UNPACK(name, intrinsic)                      \
  static FASTATTN_INLINE Words name(Words a, Words b) {       \
    return (Words)_mm512_##intrinsic((__m512i)a, (__m512i)b); \
  }
#else
  static FASTATTN_INLINE void store_lanes(float* z, Words v) {
    _mm_storeu_ps(z, _mm256_castps256_ps128((__m256)v));
    _mm_storeu_ps(z + 16, _mm256_extractf128_ps((__m256)v, 1));
  }
#define FASTATTN_UNPACK(name, intrinsic)                      \
  static FASTATTN_INLINE Words name(Words a, Words b) {       \
    return (Words)_mm256_##intrinsic((__m256i)a, (__m256i)b); \
  }
#endif
  FASTATTN_UNPACK(unpack_low, unpacklo_epi32)
  FASTATTN_UNPACK(unpack_high, unpackhi_epi32)
  FASTATTN_UNPACK(pairs_low, unpacklo_epi64)
  FASTATTN_UNPACK(pairs_high, unpackhi_epi64)
#undef FASTATTN_UNPACK
#else
  void interleave(float* z, const Words (&c)[4]) const {
    const float kept = static_cast<float>(keep_scale);
    for (int w = 0; w < 4; ++w) {
      for (int l = 0; l < kWords; ++l) z[4 * l + w] = c[w][l] >= threshold ? kept : 0.0f;
    }
  }
#endif
};

}  // namespace fastattn::cpu::FASTATTN_ISA
