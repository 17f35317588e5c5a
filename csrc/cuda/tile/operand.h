// Operand tiles in shared memory: rows of 64 elements of 16 bits with the 128-byte swizzle, as TMA
// leaves them; wider tiles are such columns one after another. A tile begins at a multiple of 1024.
#pragma once

#include "cuda/ptx/ptx.h"

namespace fastattn::cuda {

constexpr int kRowBytes = 128, kRowElements = 64;

// An operand of wgmma: the lower half of its 64-bit descriptor, which is all that products of a
// tile differ in.
struct Operand {
  uint32_t low;

  // `bytes` leads from a group of 8 rows to the next (K-major: always 1024), `apart` from 64
  // columns to the next (used where more than 64 are along M or N).
  FASTATTN_DEVICE Operand(const void* tile, int apart)
      : low((ptx::shared_address(tile) >> 4 & 0x3fff) | static_cast<uint32_t>(apart >> 4) << 16) {}
  // The descriptor from `bytes` further on. Nothing carries, as shared memory ends below 2^18.
  FASTATTN_DEVICE uint64_t at(int bytes) const {
    constexpr uint32_t kHigh = 1024 >> 4 | 1 << 30;
    return uint64_t{kHigh} << 32 | (low + static_cast<uint32_t>(bytes >> 4));
  }
};
// M or N along rows, K along columns.
FASTATTN_DEVICE Operand k_major(const void* tile) { return {tile, 16}; }
// K along rows, M or N along columns, `apart` bytes for each 64 of them.
FASTATTN_DEVICE Operand mn_major(const void* tile, int apart) { return {tile, apart}; }

// A ring of stages between a producer and consumers.
template <int kStages>
struct Ring {
  int stage = 0, parity;

  FASTATTN_DEVICE explicit Ring(int first_parity) : parity(first_parity) {}
  FASTATTN_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace fastattn::cuda
