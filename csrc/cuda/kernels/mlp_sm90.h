// A chain of linear layers for 16-bit types on sm_90a whose widths, but for the first input's, are
// at most kBlockN: the whole forward of a small MLP, h_l = relu(h_{l-1} w_l^T + b_l) (no ReLU after
// the last), E15; or the chain of its gradients, g_{l-1} = (g_l w_l) where h_{l-1} > 0, E16. A
// block has 64 rows. Warpgroup 0 loads the first input and all weights, 64 deep at a time, through
// a ring; warpgroups 1 and 2 multiply half of the columns each. Between the layers rows stay in
// shared memory; they are written to global memory beside that. Shared memory: a [kStages][64][64],
// b [kStages][kBlockN][64] or [kStages][kBlockN / 64][64][64]; h [2][kBlockN / 64][64][64]; full,
// empty [kStages].
#pragma once

#include "cuda/tile/fragment.h"

namespace fastattn::cuda {

struct MlpLayer {
  // Forward: w [columns, depth], boxes of kBlockN x 64; gradients: w [depth, columns], of 64 x 64.
  ptx::TensorMap w;
  const void* bias;       // forward: [columns], may be absent
  const void* activated;  // gradients: [rows, columns] contiguous, kept where it is above 0
  void* out;              // [rows, columns], rows out_stride apart; may be absent
  int64_t out_stride;
  int columns, depth;
};

struct MlpParameters {
  static constexpr int kMostLayers = 8;
  ptx::TensorMap first;  // [rows, layers[0].depth], boxes of 64 x 64
  MlpLayer layers[kMostLayers];
  int count;
  int64_t rows;
};

template <class T, bool kForward, int kBlockN_, int kStages_>
struct Mlp {
  static constexpr int kBlockM = 64, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kHalf = kBlockN / 2;  // the columns of a warpgroup
  static constexpr int kChunk = 64 * kRowBytes, kBytesB = kBlockN * kRowBytes;
  static constexpr int kBytesH = kBlockN / 64 * kChunk;
  static constexpr int kSharedBytes = kStages * (kChunk + kBytesB + 16) + 2 * kBytesH;
  static_assert(kSharedBytes <= kMostSharedBytes);

  FASTATTN_DEVICE static void run(const MlpParameters& p) {
    char* a_smem = ptx::dynamic_shared_memory();
    char* b_smem = a_smem + kStages * kChunk;
    char* h_smem = b_smem + kStages * kBytesB;
    auto* full = reinterpret_cast<ptx::Barrier*>(h_smem + 2 * kBytesH);
    auto* empty = full + kStages;
    const int thread = ptx::thread_id(), warpgroup = ptx::uniform(thread / kWarpgroup);
    if (thread == 0) {
      for (int s = 0; s < kStages; ++s) {
        ptx::barrier_init(full + s, 1);
        ptx::barrier_init(empty + s, 2 * kWarpgroup);
      }
      ptx::barrier_init_fence();
    }
    ptx::block_sync();  // the barriers are there
    const int row = ptx::block_id() * kBlockM;
    if (warpgroup == 0) {
      ptx::registers_decrease<load_registers(2)>();
      if (thread != 0) return;
      Ring<kStages> ring(1);
      for (int l = 0; l < p.count; ++l) {
        for (int depth = 0; depth < p.layers[l].depth; depth += 64, ring.advance()) {
          ptx::Barrier* barrier = full + ring.stage;
          char* b = b_smem + ring.stage * kBytesB;
          ptx::barrier_wait(empty + ring.stage, ring.parity);  // its last products have been done
          ptx::barrier_arrive_expect(barrier, (l == 0 ? kChunk : 0) + kBytesB);
          if (l == 0) ptx::tma_load(a_smem + ring.stage * kChunk, &p.first, barrier, depth, row);
          if constexpr (kForward) {
            ptx::tma_load(b, &p.layers[l].w, barrier, depth, 0);
          } else {
            for (int c = 0; c < kBlockN / 64; ++c)
              ptx::tma_load(b + c * kChunk, &p.layers[l].w, barrier, 64 * c, depth);
          }
        }
      }
    } else {
      ptx::registers_increase<multiply_registers(2)>();
      Ring<kStages> ring(0);
      for (int l = 0; l < p.count; ++l) {
        float acc[kHalf / 2] = {};
        const char* h = l == 0 ? nullptr : h_smem + (l - 1) % 2 * kBytesH;
        multiply(p.layers[l], h, a_smem, b_smem, full, empty, warpgroup - 1, ring, acc);
        finish(p, l, row, h_smem + l % 2 * kBytesH, warpgroup - 1, thread % kWarpgroup, acc);
        if (l + 1 < p.count) {
          ptx::fence_async_proxy();                            // the next layer's products see it
          ptx::named_sync(MlpBarrier::kBoth, 2 * kWarpgroup);  // both halves are there
        }
      }
    }
  }

 private:
  FASTATTN_DEVICE static void multiply(const MlpLayer& layer, const char* h, const char* a_smem,
                                       const char* b_smem, ptx::Barrier* full, ptx::Barrier* empty,
                                       int warpgroup, Ring<kStages>& ring,
                                       float (&acc)[kHalf / 2]) {
    int previous = -1;
    for (int depth = 0; depth < layer.depth; depth += 64, ring.advance()) {
      ptx::barrier_wait(full + ring.stage, ring.parity);  // a and b are there
      const char* b_part = b_smem + ring.stage * kBytesB + warpgroup * kHalf * kRowBytes;
      const Operand a =
          k_major(h == nullptr ? a_smem + ring.stage * kChunk : h + depth / 64 * kChunk);
      const Operand b = kForward ? k_major(b_part) : mn_major(b_part, kChunk);
      ptx::wgmma_fence();
      FASTATTN_UNROLL
      for (int k = 0; k < 64; k += 16) {
        ptx::wgmma_ss<T, kHalf, false, !kForward>(acc, a.at(2 * k),
                                                  b.at(k * (kForward ? 2 : kRowBytes)), true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (previous >= 0) ptx::barrier_arrive(empty + previous);
      previous = ring.stage;
    }
    ptx::wgmma_wait<0>();
    if (previous >= 0) ptx::barrier_arrive(empty + previous);
  }

  FASTATTN_DEVICE static void finish(const MlpParameters& p, int l, int row0, char* h_smem,
                                     int warpgroup, int t, const float (&acc)[kHalf / 2]) {
    const MlpLayer& layer = p.layers[l];
    const bool last = l + 1 == p.count, aligned = layer.out_stride % 2 == 0;
    uint32_t words[kHalf / 4];
    FASTATTN_UNROLL
    for (int w = 0; w < kHalf / 4; ++w) {
      const int column = warpgroup * kHalf + w / 2 * 8 + column_of(t);
      const int64_t row = row0 + row_of(t) + w % 2 * 8;
      float v[2] = {acc[2 * w], acc[2 * w + 1]};
      FASTATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool there = column + i < layer.columns;
        if constexpr (kForward) {
          if (there && layer.bias != nullptr)
            v[i] += static_cast<float>(static_cast<const T*>(layer.bias)[column + i]);
          if (!last && v[i] <= 0.0f) v[i] = 0.0f;  // a NaN stays
        } else {
          const int64_t at = row * layer.columns + column + i;
          const bool kept =
              there && row < p.rows &&
              !(static_cast<float>(static_cast<const T*>(layer.activated)[at]) <= 0.0f);
          if (!kept) v[i] = 0.0f;
        }
        if (!there) v[i] = 0.0f;
      }
      words[w] = ptx::pack<T>(v[0], v[1]);
      if (row < p.rows && layer.out != nullptr)
        store_pair(static_cast<T*>(layer.out) + row * layer.out_stride, column, layer.columns,
                   aligned, words[w]);
    }
    if (!last) store_tile<kHalf>(h_smem + warpgroup * kHalf / 64 * kChunk, kChunk, t, words);
  }
};

}  // namespace fastattn::cuda
