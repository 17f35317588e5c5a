// Which keys queries see: query i the keys from i - left to i + right, and of these, with key
// words, those whose bit is set. Blocks that nobody sees are left out.
#pragma once

#include "cuda/ptx/ptx.h"

namespace fastattn::cuda {

constexpr int kNoBound = 1 << 30;  // of left and right; sequences are shorter

struct Band {
  int seq_q, seq_k, left, right;
  const uint32_t* key_words;  // [batch, words], bit j % 32 of word j / 32 for key j, or none
  int words;                  // of a batch element: whole key blocks, 0 behind the last key

  // Blocks of kBlock keys that some query of [q0, q0 + rows) may see: [first, last).
  template <int kBlock>
  FASTATTN_DEVICE int first_key_block(int q0) const {
    return (q0 > left ? q0 - left : 0) / kBlock;
  }
  template <int kBlock>
  FASTATTN_DEVICE int last_key_block(int q0, int rows) const {
    const int beyond = q0 + rows + right < seq_k ? q0 + rows + right : seq_k;
    return (beyond + kBlock - 1) / kBlock;
  }
  // Blocks of kBlock queries that see some key of [k0, k0 + keys): [first, last).
  template <int kBlock>
  FASTATTN_DEVICE int first_query_block(int k0) const {
    return (k0 > right ? k0 - right : 0) / kBlock;
  }
  template <int kBlock>
  FASTATTN_DEVICE int last_query_block(int k0, int keys) const {
    const int beyond = k0 + keys + left < seq_q ? k0 + keys + left : seq_q;
    return (beyond + kBlock - 1) / kBlock;
  }
  // Whether every query of [q0, q0 + rows) sees every key of [k0, k0 + keys), but for the words.
  FASTATTN_DEVICE bool whole(int q0, int rows, int k0, int keys) const {
    return k0 + keys - 1 <= q0 + right && k0 >= q0 + rows - 1 - left && k0 + keys <= seq_k;
  }
  // Whether query i of a batch element sees a key.
  FASTATTN_DEVICE bool sees_a_key(int batch, int i, bool has_words) const {
    const int from = i > left ? i - left : 0, to = i + right + 1 < seq_k ? i + right + 1 : seq_k;
    if (!has_words) return from < to;
    const uint32_t* word = key_words + int64_t{batch} * words;
    for (int key = from; key < to; key = key / 32 * 32 + 32) {
      const uint32_t seen = word[key / 32] >> key % 32;
      if ((to - key < 32 ? seen & ((1u << (to - key)) - 1) : seen) != 0) return true;
    }
    return false;
  }
};

// The words of a block of kBlock keys; with none (!kHas) all keys are seen.
template <int kBlock, bool kHas>
struct KeyWords {
  static constexpr int kCount = kBlock / 32;
  uint32_t word[kCount];

  FASTATTN_DEVICE KeyWords(const Band& band, int batch, int block) {
    FASTATTN_UNROLL
    for (int i = 0; i < kCount; ++i)
      word[i] = kHas ? band.key_words[int64_t{batch} * band.words + block * kCount + i] : ~0u;
  }
  FASTATTN_DEVICE bool all() const {
    uint32_t both = 0xffffffffu;
    FASTATTN_UNROLL
    for (int i = 0; i < kCount; ++i) both &= word[i];
    return both == 0xffffffffu;
  }
  FASTATTN_DEVICE bool none() const {
    uint32_t either = 0;
    FASTATTN_UNROLL
    for (int i = 0; i < kCount; ++i) either |= word[i];
    return either == 0;
  }
};

// The nearest block below `block`, not below `first`, with a key that is seen; first - 1 if there
// is none.
template <int kBlock, bool kHas>
FASTATTN_DEVICE int block_below(const Band& band, int batch, int first, int block) {
  do {
    --block;
  } while (block >= first && KeyWords<kBlock, kHas>(band, batch, block).none());
  return block;
}

// Tiles of a grid in the order in which blocks take them: within a section of heads, whose operands
// stay in L2, all heads run their block 0, then all their block 1, ...
struct HeadBlocks {
  int heads, section, blocks;  // over all batch elements; heads in a section; blocks of a head

  FASTATTN_DEVICE int tiles() const { return heads * blocks; }
  FASTATTN_DEVICE void locate(int tile, int& head, int& block) const {
    const int first = tile / (section * blocks) * section;
    const int here = heads - first < section ? heads - first : section;
    const int rest = tile - first * blocks;
    block = rest / here;
    head = first + rest % here;
  }
};

}  // namespace fastattn::cuda
