// Operand tiles in shared memory: rows of 64 elements of 16 bits with the 128-byte swizzle, as TMA
// leaves them; wider tiles are such columns one after another. A tile begins at a multiple of 1024.
#pragma once

#include "cuda/ptx/ptx.h"

namespace fastattn::cuda {

constexpr int kRowBytes = 128, kRowElements = 64;

// wgmma's 64-bit descriptors. `bytes` leads from a group of 8 rows to the next (K-major: always
// 1024), `apart` from 64 columns to the next (used where more than 64 are along M or N).
FASTATTN_DEVICE uint64_t descriptor(const void* tile, int apart) {
  const uint64_t address = ptx::shared_address(tile);
  return (address >> 4 & 0x3fff) | static_cast<uint64_t>(apart >> 4) << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
// M or N along rows, K along columns.
FASTATTN_DEVICE uint64_t k_major(const void* tile) { return descriptor(tile, 16); }
// K along rows, M or N along columns, `apart` bytes for each 64 of them.
FASTATTN_DEVICE uint64_t mn_major(const void* tile, int apart) { return descriptor(tile, apart); }

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
