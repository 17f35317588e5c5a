// The products of linear+ReLU for 16-bit types on sm_90a: y = relu(x w^T + b) with the ReLU's bits,
// E15, and with G = dY∘R the gradients dX = G W, dW = Gᵀ X and db = colsum G, E16. Persistent: a
// block takes tiles of kBlockM x kBlockN of the result, or of a part of the sum where there are few
// tiles. Warpgroup 0 loads both operands, 64 deep at a time, through a ring; warpgroups 1 and 2
// multiply, 64 rows each. dY is masked on its way to the tensor cores: they take it from registers.
// Shared memory: a [kStages][2][64][64] or [kStages][128][64], b [kStages][kBlockN][64] or
// [kStages][kBlockN / 64][64][64]; full, empty [kStages].
#pragma once

#include "cuda/tile/fragment.h"

namespace fastattn::cuda {

enum class LinearPass : int { kForward, kGradInput, kGradWeight };

struct LinearParameters {
  // forward: x [m, k] and w [n, k]; gradients of x: grad_y [m, n] and w; of w: grad_y and x.
  ptx::TensorMap a, b;
  int64_t rows, cols, depth;  // of the result, and what is summed over
  int splits;                 // parts of the depth, each with sums of its own
  const void* bias;           // forward: [cols], may be absent
  void* out;                  // [rows, cols] contiguous; absent where splits > 1
  float* sums;                // [splits, rows, cols] where splits > 1
  uint8_t* relu_mask;         // [m, mask_bytes]: the forward writes it, others read it if there
  int64_t mask_bytes;
  void* grad_bias;   // gradient of w: [rows], may be absent, as out
  float* bias_sums;  // [splits, rows], as sums
};

template <class T, LinearPass kPass, int kBlockN_, int kStages_>
struct Linear {
  static constexpr int kBlockM = 128, kBlockN = kBlockN_, kBlockK = 64, kStages = kStages_;
  static constexpr int kThreads = 3 * kWarpgroup, kGroup = 8;  // row tiles that share columns in L2
  static constexpr int kBytesA = kBlockM * kRowBytes, kBytesB = kBlockN * kRowBytes;
  static constexpr int kSharedBytes = kStages * (kBytesA + kBytesB + 16);
  static constexpr bool kForward = kPass == LinearPass::kForward;
  static constexpr bool kGradWeight = kPass == LinearPass::kGradWeight;
  static_assert(kSharedBytes <= kMostSharedBytes);

  // A tile of the result: its first row and column, and its steps through the depth.
  struct Tile {
    int64_t row, col;
    int split, first, last;

    FASTATTN_DEVICE Tile(const LinearParameters& p, int64_t index) {
      const int64_t rows = (p.rows + kBlockM - 1) / kBlockM,
                    cols = (p.cols + kBlockN - 1) / kBlockN;
      split = static_cast<int>(index / (rows * cols));
      index %= rows * cols;
      const int64_t group = index / (kGroup * cols) * kGroup;
      const int64_t here = rows - group < kGroup ? rows - group : kGroup;
      index -= group * cols;
      row = (group + index % here) * kBlockM;
      col = index / here * kBlockN;
      const int64_t steps = (p.depth + kBlockK - 1) / kBlockK;
      first = static_cast<int>(steps * split / p.splits);
      last = static_cast<int>(steps * (split + 1) / p.splits);
    }
    FASTATTN_DEVICE static int64_t count(const LinearParameters& p) {
      return (p.rows + kBlockM - 1) / kBlockM * ((p.cols + kBlockN - 1) / kBlockN) * p.splits;
    }
  };

  FASTATTN_DEVICE static void run(const LinearParameters& p) {
    char* a_smem = ptx::dynamic_shared_memory();
    char* b_smem = a_smem + kStages * kBytesA;
    auto* full = reinterpret_cast<ptx::Barrier*>(b_smem + kStages * kBytesB);
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
    const int64_t tiles = Tile::count(p);
    if (warpgroup == 0) {
      ptx::registers_decrease<load_registers(2)>();
      if (thread != 0) return;
      Ring<kStages> ring(1);
      for (int64_t index = ptx::block_id(); index < tiles; index += ptx::grid_blocks()) {
        const Tile tile(p, index);
        for (int step = tile.first; step < tile.last; ++step, ring.advance()) {
          ptx::barrier_wait(empty + ring.stage, ring.parity);  // its last products have been done
          ptx::barrier_arrive_expect(full + ring.stage, kBytesA + kBytesB);
          load(p, tile, step * kBlockK, a_smem + ring.stage * kBytesA,
               b_smem + ring.stage * kBytesB, full + ring.stage);
        }
      }
    } else {
      ptx::registers_increase<multiply_registers(2)>();
      Ring<kStages> ring(0);
      for (int64_t index = ptx::block_id(); index < tiles; index += ptx::grid_blocks()) {
        const Tile tile(p, index);
        float acc[kBlockN / 2] = {}, bias_sum[2] = {};
        if constexpr (kForward) {
          multiply(a_smem, b_smem, full, empty, tile, warpgroup - 1, ring, acc);
        } else {
          multiply_masked(p, a_smem, b_smem, full, empty, tile, warpgroup - 1, thread % kWarpgroup,
                          ring, acc, bias_sum);
        }
        const int64_t row = tile.row + 64 * (warpgroup - 1) + row_of(thread % kWarpgroup);
        FASTATTN_UNROLL
        for (int half = 0; half < 2; ++half) {
          store(p, tile, row + 8 * half, half, thread % kWarpgroup, acc);
          if (kGradWeight && tile.col == 0)
            store_bias(p, tile, row + 8 * half, thread % 4, row_sum(bias_sum[half]));
        }
      }
    }
  }

 private:
  FASTATTN_DEVICE static void load(const LinearParameters& p, const Tile& tile, int depth, char* a,
                                   char* b, ptx::Barrier* full) {
    const int row = static_cast<int>(tile.row), col = static_cast<int>(tile.col);
    if constexpr (kGradWeight) {
      for (int c = 0; c < kBlockM / 64; ++c)
        ptx::tma_load(a + c * 64 * kRowBytes, &p.a, full, row + 64 * c, depth);
    } else {
      ptx::tma_load(a, &p.a, full, depth, row);
    }
    if constexpr (kForward) {
      ptx::tma_load(b, &p.b, full, depth, col);
    } else {
      for (int c = 0; c < kBlockN / 64; ++c)
        ptx::tma_load(b + c * 64 * kRowBytes, &p.b, full, col + 64 * c, depth);
    }
  }

  // Both operands from shared memory; a step's products run while the next step's are issued.
  FASTATTN_DEVICE static void multiply(const char* a_smem, const char* b_smem, ptx::Barrier* full,
                                       ptx::Barrier* empty, const Tile& tile, int warpgroup,
                                       Ring<kStages>& ring, float (&acc)[kBlockN / 2]) {
    int previous = -1;
    for (int step = tile.first; step < tile.last; ++step, ring.advance()) {
      ptx::barrier_wait(full + ring.stage, ring.parity);  // a and b are there
      const Operand a = k_major(a_smem + ring.stage * kBytesA + warpgroup * 64 * kRowBytes);
      const Operand b = k_major(b_smem + ring.stage * kBytesB);
      ptx::wgmma_fence();
      FASTATTN_UNROLL
      for (int k = 0; k < kBlockK; k += 16)
        ptx::wgmma_ss<T, kBlockN>(acc, a.at(2 * k), b.at(2 * k), true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (previous >= 0) ptx::barrier_arrive(empty + previous);
      previous = ring.stage;
    }
    ptx::wgmma_wait<0>();
    if (previous >= 0) ptx::barrier_arrive(empty + previous);
  }

  // dY through registers, where its mask is applied; the other warpgroup's products run meanwhile.
  FASTATTN_DEVICE static void multiply_masked(const LinearParameters& p, const char* a_smem,
                                              const char* b_smem, ptx::Barrier* full,
                                              ptx::Barrier* empty, const Tile& tile, int warpgroup,
                                              int t, Ring<kStages>& ring, float (&acc)[kBlockN / 2],
                                              float (&bias_sum)[2]) {
    for (int step = tile.first; step < tile.last; ++step, ring.advance()) {
      uint32_t a[16];
      uint32_t bits[kGradWeight ? 16 : 4];
      if constexpr (kGradWeight) {
        bits_of_columns(p, step * kBlockK, tile.row + 64 * warpgroup, t, bits);
      } else {
        bits_of_rows(p, tile.row + 64 * warpgroup, step * kBlockK, t, bits);
      }
      ptx::barrier_wait(full + ring.stage, ring.parity);  // a and b are there
      // 16 deep are four 8 x 8 matrices; each lane names a row of one.
      const char* tile_a = a_smem + ring.stage * kBytesA + warpgroup * 64 * kRowBytes;
      const Operand b = mn_major(b_smem + ring.stage * kBytesB, 64 * kRowBytes);
      const int matrix = t % 32 / 8, within = t % 8;
      FASTATTN_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int row =
            kGradWeight ? 16 * k + matrix / 2 * 8 + within : t / 32 * 16 + matrix % 2 * 8 + within;
        const int chunk = kGradWeight ? t / 32 * 2 + matrix % 2 : 2 * k + matrix / 2;
        ptx::load_matrices<kGradWeight>(a + 4 * k,
                                        tile_a + row * kRowBytes + (chunk ^ within) * 16);
        FASTATTN_UNROLL
        for (int i = 0; i < 4; ++i) a[4 * k + i] &= halves(bits, k, i, t);
        if (kGradWeight && tile.col == 0 && p.grad_bias != nullptr) {
          FASTATTN_UNROLL
          for (int i = 0; i < 4; ++i) bias_sum[i % 2] += ptx::sum_of_pair<T>(a[4 * k + i]);
        }
      }
      ptx::wgmma_fence();
      FASTATTN_UNROLL
      for (int k = 0; k < 4; ++k)
        ptx::wgmma_rs<T, kBlockN, true>(acc, a + 4 * k, b.at(16 * k * kRowBytes), true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::barrier_arrive(empty + ring.stage);
    }
  }

  // kBytes bytes of a row of the mask, 0 outside; at once where they lie at multiples of kBytes.
  template <class Word, int kBytes>
  FASTATTN_DEVICE static uint32_t mask_word(const LinearParameters& p, int64_t rows, int64_t row,
                                            int64_t byte) {
    if (p.relu_mask == nullptr) return 0xffffffffu;
    if (row >= rows || byte >= p.mask_bytes) return 0;
    const uint8_t* from = p.relu_mask + row * p.mask_bytes + byte;
    if (p.mask_bytes % kBytes == 0) return *reinterpret_cast<const Word*>(from);
    uint32_t word = 0;
    FASTATTN_UNROLL
    for (int i = 0; i < kBytes; ++i) {
      if (byte + i < p.mask_bytes) word |= static_cast<uint32_t>(from[i]) << 8 * i;
    }
    return word;
  }
  // The bits of 64 columns of dY's rows row_of(t) and 8 below, two words each.
  FASTATTN_DEVICE static void bits_of_rows(const LinearParameters& p, int64_t m0, int64_t n0, int t,
                                           uint32_t (&bits)[4]) {
    FASTATTN_UNROLL
    for (int i = 0; i < 4; ++i)
      bits[i] = mask_word<uint32_t, 4>(p, p.rows, m0 + row_of(t) + i / 2 * 8, n0 / 8 + i % 2 * 4);
  }
  // The ReLU's bits of this thread's 16 rows of a step of 64, for the 16 columns of its warp.
  FASTATTN_DEVICE static void bits_of_columns(const LinearParameters& p, int64_t m0, int64_t n0,
                                              int t, uint32_t (&bits)[16]) {
    FASTATTN_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int64_t row = m0 + i / 2 * 8 + column_of(t) + i % 2;
      bits[i] = mask_word<uint16_t, 2>(p, p.depth, row, (n0 + t / 32 * 16) / 8);
    }
  }
  // All ones in the halves of word i of step k whose bit is set.
  template <int kCount>
  FASTATTN_DEVICE static uint32_t halves(const uint32_t (&bits)[kCount], int k, int i, int t) {
    uint32_t low, high;
    if constexpr (kGradWeight) {
      const int bit = t % 32 / 4 + i % 2 * 8;
      low = bits[4 * k + i / 2 * 2] >> bit;
      high = bits[4 * k + i / 2 * 2 + 1] >> bit;
    } else {
      low = bits[i % 2 * 2 + k / 2] >> (k % 2 * 16 + i / 2 * 8 + column_of(t));
      high = low >> 1;
    }
    return (low & 1) * 0xffffu | (high & 1) * 0xffff0000u;
  }

  FASTATTN_DEVICE static void store(const LinearParameters& p, const Tile& tile, int64_t row,
                                    int half, int t, const float (&acc)[kBlockN / 2]) {
    const bool in_row = row < p.rows;
    FASTATTN_UNROLL
    for (int c = 0; c < kBlockN / 8; ++c) {
      const int64_t col = tile.col + 8 * c + column_of(t);
      float v[2] = {acc[4 * c + 2 * half], acc[4 * c + 2 * half + 1]};
      const int64_t at = row * p.cols + col;
      if (p.splits > 1) {
        FASTATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (in_row && col + i < p.cols) p.sums[tile.split * p.rows * p.cols + at + i] = v[i];
        }
        continue;
      }
      uint32_t bits = 0;
      if constexpr (kForward) {
        FASTATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (p.bias != nullptr && col + i < p.cols)
            v[i] += static_cast<float>(static_cast<const T*>(p.bias)[col + i]);
          v[i] = v[i] <= 0.0f ? 0.0f : v[i];  // a NaN stays
        }
      }
      const uint32_t pair = ptx::pack<T>(v[0], v[1]);
      if (in_row)
        store_pair(static_cast<T*>(p.out) + row * p.cols, col, p.cols, p.cols % 2 == 0, pair);
      if constexpr (kForward) {
        // What is not 0 once it is rounded; neither is ever -0.
        if (col < p.cols) bits |= static_cast<uint32_t>((pair & 0xffff) != 0) << column_of(t);
        if (col + 1 < p.cols) bits |= static_cast<uint32_t>(pair >> 16 != 0) << (column_of(t) + 1);
        bits |= ptx::shuffle_xor(bits, 1);
        bits |= ptx::shuffle_xor(bits, 2);
        if (t % 4 == 0 && in_row && col < p.cols)
          p.relu_mask[row * p.mask_bytes + col / 8] = static_cast<uint8_t>(bits);
      }
    }
  }

  FASTATTN_DEVICE static void store_bias(const LinearParameters& p, const Tile& tile, int64_t row,
                                         int lane, float sum) {
    if (p.grad_bias == nullptr || lane != 0 || row >= p.rows) return;
    if (p.splits > 1) {
      p.bias_sums[tile.split * p.rows + row] = sum;
    } else {
      static_cast<T*>(p.grad_bias)[row] = static_cast<T>(sum);
    }
  }
};

constexpr int kSplitThreads = 256;

// Adds up the parts of a result in order, a thread 8 columns of a row; of the forward it then does
// what the epilogue does elsewhere.
template <class T, LinearPass kPass>
FASTATTN_DEVICE void add_splits(const LinearParameters& p) {
  const int64_t chunks = (p.cols + 7) / 8;
  const int64_t index = int64_t{ptx::block_id()} * kSplitThreads + ptx::thread_id();
  const int64_t row = index / chunks, col = index % chunks * 8;
  if (row >= p.rows) return;
  uint32_t bits = 0;
  for (int i = 0; i < 8 && col + i < p.cols; ++i) {
    float v = 0.0f;
    for (int s = 0; s < p.splits; ++s) v += p.sums[(s * p.rows + row) * p.cols + col + i];
    if constexpr (kPass == LinearPass::kForward) {
      if (p.bias != nullptr) v += static_cast<float>(static_cast<const T*>(p.bias)[col + i]);
      v = v <= 0.0f ? 0.0f : v;
    }
    const T rounded = static_cast<T>(v);
    static_cast<T*>(p.out)[row * p.cols + col + i] = rounded;
    bits |= static_cast<uint32_t>(!(static_cast<float>(rounded) <= 0.0f)) << i;
  }
  if constexpr (kPass == LinearPass::kForward)
    p.relu_mask[row * p.mask_bytes + col / 8] = static_cast<uint8_t>(bits);
  if (kPass == LinearPass::kGradWeight && p.grad_bias != nullptr && col == 0) {
    float v = 0.0f;
    for (int s = 0; s < p.splits; ++s) v += p.bias_sums[s * p.rows + row];
    static_cast<T*>(p.grad_bias)[row] = static_cast<T>(v);
  }
}

}  // namespace fastattn::cuda
