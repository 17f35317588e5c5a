// y = relu(x w^T + b) and the ReLU's bits, E15. Persistent: a block takes tiles of kBlockM x
// kBlockN in order. Warpgroup 0 loads x and w, kBlockK deep at a time, into a ring of kStages;
// warpgroups 1 and 2 multiply, 64 rows each. Shared memory: x [kStages][kBlockM][64], w
// [kStages][kBlockN][64] (128-byte swizzle), full [kStages], empty [kStages].
#pragma once

#include "cuda/tile/operand.h"

namespace fastattn::cuda {

struct LinearParameters {
  ptx::TensorMap x, w;  // [m, k], [n, k]; boxes of kBlockM x 64 and kBlockN x 64
  const void* bias;     // [n], may be absent
  void* y;              // [m, n] contiguous
  uint8_t* relu_mask;   // [m, ceil(n / 8)], may be absent
  int64_t m, n, k;
};

template <class T, int kBlockN_, int kStages_>
struct LinearForward {
  static constexpr int kBlockN = kBlockN_, kStages = kStages_, kBlockM = 128, kBlockK = 64,
                       kThreads = 384;
  static constexpr int kBytesX = kBlockM * kBlockK * 2, kBytesW = kBlockN * kBlockK * 2;
  static constexpr int kSharedBytes = kStages * (kBytesX + kBytesW + 16);
  static_assert(kSharedBytes <= 227 * 1024);

  FASTATTN_DEVICE static void run(const LinearParameters& p) {
    char* smem = ptx::dynamic_shared_memory();
    char* x_smem = smem;                        // [kStages][kBlockM][64]
    char* w_smem = x_smem + kStages * kBytesX;  // [kStages][kBlockN][64]
    auto* full = reinterpret_cast<ptx::Barrier*>(w_smem + kStages * kBytesW);
    auto* empty = full + kStages;
    const int thread = ptx::thread_id(), warpgroup = thread / 128;
    if (thread == 0) {
      for (int s = 0; s < kStages; ++s) {
        ptx::barrier_init(full + s, 1);
        ptx::barrier_init(empty + s, 2 * 128);
      }
      ptx::barrier_init_fence();
    }
    ptx::block_sync();  // the barriers are there
    const int64_t tiles_n = (p.n + kBlockN - 1) / kBlockN;
    const int64_t tiles = (p.m + kBlockM - 1) / kBlockM * tiles_n;
    const int steps = static_cast<int>((p.k + kBlockK - 1) / kBlockK);
    if (warpgroup == 0) {
      ptx::registers_decrease<40>();
      if (thread != 0) return;
      int stage = 0, parity = 1;
      for (int64_t tile = ptx::block_id(); tile < tiles; tile += ptx::grid_blocks()) {
        const int m0 = static_cast<int>(tile / tiles_n) * kBlockM;
        const int n0 = static_cast<int>(tile % tiles_n) * kBlockN;
        for (int step = 0; step < steps; ++step) {
          ptx::barrier_wait(empty + stage, parity);  // its last products have been done
          ptx::barrier_arrive_expect(full + stage, kBytesX + kBytesW);
          ptx::tma_load(x_smem + stage * kBytesX, &p.x, full + stage, step * kBlockK, m0);
          ptx::tma_load(w_smem + stage * kBytesW, &p.w, full + stage, step * kBlockK, n0);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
      return;
    }
    ptx::registers_increase<232>();
    int stage = 0, parity = 0;
    for (int64_t tile = ptx::block_id(); tile < tiles; tile += ptx::grid_blocks()) {
      float acc[kBlockN / 2] = {};
      int previous = -1;
      for (int step = 0; step < steps; ++step) {
        ptx::barrier_wait(full + stage, parity);  // x and w are there
        const char* x_tile = x_smem + stage * kBytesX + (warpgroup - 1) * 64 * 128;
        const char* w_tile = w_smem + stage * kBytesW;
        ptx::wgmma_fence();
        FASTATTN_UNROLL
        for (int k = 0; k < kBlockK; k += 16) {
          ptx::wgmma_ss<T, kBlockN>(acc, k_major(x_tile + 2 * k), k_major(w_tile + 2 * k),
                                    step > 0 || k > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (previous >= 0) ptx::barrier_arrive(empty + previous);
        previous = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      ptx::wgmma_wait<0>();
      if (previous >= 0) ptx::barrier_arrive(empty + previous);
      store(p, tile / tiles_n * kBlockM + (warpgroup - 1) * 64, tile % tiles_n * kBlockN,
            thread % 128, acc);
    }
  }

 private:
  // Thread t holds of rows t / 32 * 16 + t % 32 / 4 and 8 below, columns 2 (t % 4) and 1 after of
  // every 8.
  FASTATTN_DEVICE static void store(const LinearParameters& p, int64_t m0, int64_t n0, int t,
                                    const float (&acc)[kBlockN / 2]) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t row = m0 + t / 32 * 16 + t % 32 / 4 + 8 * half;
      FASTATTN_UNROLL
      for (int c = 0; c < kBlockN / 8; ++c) {
        const int64_t column = n0 + 8 * c + 2 * (t % 4);
        uint32_t bits = 0;
        FASTATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (row >= p.m || column + i >= p.n) continue;
          float v = acc[4 * c + 2 * half + i];
          if (p.bias != nullptr) v += static_cast<float>(static_cast<const T*>(p.bias)[column + i]);
          const T y = static_cast<T>(v <= 0.0f ? 0.0f : v);  // a NaN stays
          static_cast<T*>(p.y)[row * p.n + column + i] = y;
          bits |= static_cast<uint32_t>(!(static_cast<float>(y) <= 0.0f)) << (2 * (t % 4) + i);
        }
        if (p.relu_mask == nullptr) continue;
        bits |= ptx::shuffle_xor(bits, 1);
        bits |= ptx::shuffle_xor(bits, 2);
        if (t % 4 == 0 && row < p.m && column < p.n)
          p.relu_mask[row * ((p.n + 7) / 8) + column / 8] = static_cast<uint8_t>(bits);
      }
    }
  }
};

}  // namespace fastattn::cuda
