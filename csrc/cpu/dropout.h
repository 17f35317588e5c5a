// Dropout's keep-mask: Philox4x32-10 (Salmon et al., SC'11) keyed by the seed, its counters (column
// / 4, row, head, batch), vectors of counters at a time.
#pragma once

#include "common/philox.h"
#include "common/problem.h"
#include "cpu/simd.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Words of counters, each in the low half of 64 bits: their products need no shuffles. The high
// halves hold anything.
typedef uint64_t WideWords __attribute__((vector_size(kVecBytes)));
constexpr int kCounters = kVecBytes / 8;

// The 64-bit products of the low halves.
#if defined(FASTATTN_AVX512)
FASTATTN_INLINE WideWords multiply_words(WideWords x, uint32_t factor) {
  return (WideWords)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
}
#elif defined(FASTATTN_AVX2)
FASTATTN_INLINE WideWords multiply_words(WideWords x, uint32_t factor) {
  return (WideWords)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
}
#else
FASTATTN_INLINE WideWords multiply_words(WideWords x, uint32_t factor) {
  WideWords product;
  for (int l = 0; l < kCounters; ++l) product[l] = uint64_t{static_cast<uint32_t>(x[l])} * factor;
  return product;
}
#endif

struct Dropout {
  static constexpr int kGroups = 2;  // vectors of counters at a time: their rounds overlap
  static constexpr int kGroupColumns = 4 * kCounters, kColumns = kGroups * kGroupColumns;

  bool active;
  const int64_t* seeds;
  int64_t each;  // batch elements of a seed, or rows
  uint32_t threshold;
  double keep_scale;

  Dropout(double dropout_p, const int64_t* seeds_, int64_t each_)
      : active(dropout_p > 0),
        seeds(seeds_),
        each(max64(1, each_)),
        threshold(static_cast<uint32_t>(philox_keep_threshold(dropout_p))),
        keep_scale(1.0 / (1.0 - dropout_p)) {}
  explicit Dropout(const AttentionProblem& p)
      : Dropout(p.dropout_p, p.seeds, p.batch / p.seed_count) {}

  // z[0, n) = keep-mask / (1 - p) of columns [j0, j0 + n); j0 is a multiple of 4 and z has room for
  // round_up(n, 64).
  template <class A>
  void fill(A* z, int64_t batch, int64_t head, int64_t i, int64_t j0, int64_t n) const {
    fill(static_cast<uint64_t>(seeds[batch / each]), z, batch % each, head, i, j0, n);
  }
  // The same for row `row` of a matrix: the counter is (column / 4, the row's number among those of
  // its seed as two words, 0).
  template <class A>
  void fill_row(A* z, int64_t row, int64_t j0, int64_t n) const {
    const int64_t i = row % each;
    fill(static_cast<uint64_t>(seeds[row / each]), z, 0, i >> 32, i, j0, n);
  }

 private:
  template <class A>
  void fill(uint64_t seed, A* z, int64_t batch, int64_t head, int64_t i, int64_t j0,
            int64_t n) const {
    uint32_t keys[10][2] = {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}};
    for (int round = 1; round < 10; ++round) {
      keys[round][0] = keys[round - 1][0] + 0x9E3779B9u;
      keys[round][1] = keys[round - 1][1] + 0xBB67AE85u;
    }
    // Pairs of 128 bits are interleaved at the end: the first half's counters are in even lanes.
    WideWords lane;
    for (int l = 0; l < kCounters; ++l)
      lane[l] = static_cast<uint64_t>(l / 2 + l % 2 * (kCounters / 2));
    for (int64_t j = 0; j < n; j += kColumns) {
      WideWords c[kGroups][4];
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        c[g][0] = lane + static_cast<uint64_t>((j0 + j) / 4 + g * kCounters);
        c[g][1] = (WideWords)broadcast_word(static_cast<uint32_t>(i));
        c[g][2] = (WideWords)broadcast_word(static_cast<uint32_t>(head));
        c[g][3] = (WideWords)broadcast_word(static_cast<uint32_t>(batch));
      }
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const WideWords k0 = (WideWords)broadcast_word(keys[round][0]);
        const WideWords k1 = (WideWords)broadcast_word(keys[round][1]);
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) {
          const WideWords product0 = multiply_words(c[g][0], 0xD2511F53u);
          const WideWords product1 = multiply_words(c[g][2], 0xCD9E8D57u);
          c[g][0] = product1 >> 32 ^ c[g][1] ^ k0;
          c[g][1] = product1;
          c[g][2] = product0 >> 32 ^ c[g][3] ^ k1;
          c[g][3] = product0;
        }
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        const WideWords a = join(c[g][0], c[g][1]), b = join(c[g][2], c[g][3]);
        store_kept(z + j + g * kGroupColumns, a, b);
      }
    }
  }

  // The low halves of `low` and `high` as the halves of 64 bits.
  static FASTATTN_INLINE WideWords join(WideWords low, WideWords high) {
#if defined(FASTATTN_AVX512)
    return (WideWords)_mm512_mask_blend_epi32(0xaaaa, (__m512i)low, (__m512i)(high << 32));
#elif defined(FASTATTN_AVX2)
    return (WideWords)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xaa);
#else
    return (low & 0xffffffffu) | high << 32;
#endif
  }

  // z[4 l + w] = the multiplier of word w of counter l; words 0 and 1 are in `a`, 2 and 3 in `b`.
  template <class A>
  void store_kept(A* z, WideWords a, WideWords b) const {
    const auto kept = static_cast<A>(keep_scale);
    for (int l = 0; l < kCounters; ++l) {
      A* counter = z + 4 * (l / 2 + l % 2 * (kCounters / 2));
      counter[0] = static_cast<uint32_t>(a[l]) >= threshold ? kept : A(0);
      counter[1] = static_cast<uint32_t>(a[l] >> 32) >= threshold ? kept : A(0);
      counter[2] = static_cast<uint32_t>(b[l]) >= threshold ? kept : A(0);
      counter[3] = static_cast<uint32_t>(b[l] >> 32) >= threshold ? kept : A(0);
    }
  }
#if defined(FASTATTN_AVX2)
  FASTATTN_INLINE void store_kept(float* z, WideWords a, WideWords b) const {
#if defined(FASTATTN_AVX512)
    const Words even = (Words)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
    const Words odd = (Words)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#else
    const Words even = (Words)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    const Words odd = (Words)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#endif
    store_multipliers(z, even);
    store_multipliers(z + kWords, odd);
  }
  FASTATTN_INLINE void store_multipliers(float* z, Words words) const {
    const Words kept = (Words)broadcast(static_cast<float>(keep_scale));
    store(z, (Vec<float>)((Words)(words >= broadcast_word(threshold)) & kept));
  }
#endif
};

}  // namespace fastattn::cpu::FASTATTN_ISA
