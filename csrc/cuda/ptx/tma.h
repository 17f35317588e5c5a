// Tensor copies by the TMA unit.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/barrier.h"

namespace fastattn::cuda::ptx {

using TensorMap = CUtensorMap;

// The box at (c0, c1), innermost first; zeros outside of the tensor. Its bytes count towards
// `barrier`.
FASTATTN_DEVICE void tma_load(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

}  // namespace fastattn::cuda::ptx
