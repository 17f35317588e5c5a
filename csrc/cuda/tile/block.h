// What a block of threads has of a multiprocessor of sm_90, and how its warpgroups share it:
// threads, shared memory, registers, named barriers.
#pragma once

#include "cuda/ptx/ptx.h"

namespace fastattn::cuda {

constexpr int kWarpgroup = 128;  // threads of four warps, for which wgmma multiplies

// A multiprocessor has 228 KB of shared memory, of which each block leaves 1 KB to the driver.
constexpr int kMostSharedBytes = 227 * 1024;

// Registers of a thread after setmaxnreg, where one warpgroup loads and `consumers` multiply. A
// block starts with 64 Ki over its threads, down to a multiple of 8: 168 for 3 warpgroups, 128 for
// 4. The loading warpgroup keeps what its addresses need, and the others get the rest: 40 + 2 x 232
// = 3 x 168, and 32 + 3 x 160 = 4 x 128.
FASTATTN_DEVICE constexpr int load_registers(int consumers) { return consumers == 2 ? 40 : 32; }
FASTATTN_DEVICE constexpr int multiply_registers(int consumers) {
  return consumers == 2 ? 232 : 160;
}

// Named barriers of the warpgroups that multiply; block_sync has number 0. A kernel counts its own
// from 1. kTurn and kOwn are the first of one for each warpgroup.
struct ForwardBarrier {
  static constexpr int kTurn = 1;  // it may issue its products: the one before has done so
  static constexpr int kOwn = 4;   // its threads have written shared memory
};
struct BackwardBarrier {
  static constexpr int kBoth = 1;      // both warpgroups have written shared memory
  static constexpr int kKeysRead = 2;  // both have read k for the last time
  static constexpr int kOwn = 3;       // as the forward's
};
struct MlpBarrier {
  static constexpr int kBoth = 1;  // both halves of a layer's result are in shared memory
};

// Elements of a block of dQ [queries, head dim] in the attention backward: a tile of 64 x 64 for
// each of the two warpgroups that multiply, whatever the head dim is.
constexpr int kGradQueryBlock = 2 * 64 * 64;

}  // namespace fastattn::cuda
