// Attention forward, E1 to E5, for 16-bit types on sm_90a. Persistent: a block takes tiles of
// 64 kConsumers queries of a head, the longest first. Warpgroup 0 loads Q, and K and V through
// rings, from the last key block down; every other warpgroup has 64 queries. While the tensor cores
// multiply Q with the next K, and P with V, a warpgroup has the softmax of the block before; and
// warpgroups take turns, so that one's softmax runs beside another's products.
// Shared memory: q [kConsumers][kDim / 64][64][64], which o takes at the end; k, v
// [kStages][kDim / 64][kBlockK][64]; barriers.
#pragma once

#include "cuda/tile/softmax.h"

namespace fastattn::cuda {

struct AttentionForwardParameters {
  // [batch, heads, seq, dim]; boxes of 64 x 64, for k and v of kBlockK x 64
  ptx::TensorMap q, k, v, o;
  float *lse, *row_max, *log_sum;  // [batch, heads_q, seq_q]
  int* next_tile;                  // 0 at launch
  Band band;
  HeadBlocks tiles;
  int heads_q, group;  // query heads; query heads for each key head
  float scale, scale_log2;
};

template <class T, int kDim_, int kBlockK_, int kConsumers_, int kStages_, bool kKeyWords,
          int kPolynomial, int kSlack>
struct AttentionForward {
  static constexpr int kDim = kDim_, kBlockK = kBlockK_, kConsumers = kConsumers_;
  static constexpr int kStages = kStages_, kBlockQ = 64 * kConsumers;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1), kChunks = kDim / kRowElements;
  static constexpr int kBytesQ = 64 * kDim * 2, kBytesK = kBlockK * kDim * 2;
  static constexpr int kChunkQ = 64 * kRowBytes, kChunkK = kBlockK * kRowBytes;
  static constexpr int kSharedBytes =
      kConsumers * kBytesQ + 2 * kStages * kBytesK + (4 * kStages + 3) * 8;
  static constexpr bool kTakeTurns = kDim <= 128;
  using Softmax = OnlineSoftmax<kPolynomial, kSlack>;
  static_assert(kSharedBytes <= kMostSharedBytes);

  struct Shared {
    char *q, *k, *v;
    ptx::Barrier *q_full, *q_empty, *k_full, *k_empty, *v_full, *v_empty;
    int* tile;  // beside a full q: the block's tile, or -1 at the end

    FASTATTN_DEVICE explicit Shared(char* smem) {
      q = smem;
      k = q + kConsumers * kBytesQ;
      v = k + kStages * kBytesK;
      q_full = reinterpret_cast<ptx::Barrier*>(v + kStages * kBytesK);
      q_empty = q_full + 1;
      k_full = q_empty + 1;
      k_empty = k_full + kStages;
      v_full = k_empty + kStages;
      v_empty = v_full + kStages;
      tile = reinterpret_cast<int*>(v_empty + kStages);
    }
  };

  // A tile: its head, its queries, the key blocks [first, last) that they may see.
  struct Tile {
    int batch, head, q0, first, last;

    FASTATTN_DEVICE Tile(const AttentionForwardParameters& p, int tile) {
      int block;
      p.tiles.locate(tile, head, block);
      batch = head / p.heads_q;
      head %= p.heads_q;
      q0 = (p.tiles.blocks - 1 - block) * kBlockQ;
      first = p.band.first_key_block<kBlockK>(q0);
      last = p.band.last_key_block<kBlockK>(q0, kBlockQ);
    }
  };

  FASTATTN_DEVICE static void run(const AttentionForwardParameters& p) {
    const Shared smem(ptx::dynamic_shared_memory());
    const int thread = ptx::thread_id(), warpgroup = ptx::uniform(thread / kWarpgroup);
    if (thread == 0) {
      ptx::barrier_init(smem.q_full, 1);
      ptx::barrier_init(smem.q_empty, kConsumers);
      for (int s = 0; s < kStages; ++s) {
        ptx::barrier_init(smem.k_full + s, 1);
        ptx::barrier_init(smem.v_full + s, 1);
        ptx::barrier_init(smem.k_empty + s, kWarpgroup * kConsumers);
        ptx::barrier_init(smem.v_empty + s, kWarpgroup * kConsumers);
      }
      ptx::barrier_init_fence();
    }
    ptx::block_sync();  // the barriers are there
    if (warpgroup == 0) {
      ptx::registers_decrease<load_registers(kConsumers)>();
      if (thread == 0) produce(p, smem);
    } else {
      ptx::registers_increase<multiply_registers(kConsumers)>();
      consume(p, smem, warpgroup - 1, thread % kWarpgroup);
    }
  }

 private:
  FASTATTN_DEVICE static void produce(const AttentionForwardParameters& p, const Shared& smem) {
    Ring<kStages> k_ring(1), v_ring(1);
    int q_parity = 1;
    const auto load = [&](Ring<kStages>& ring, ptx::Barrier* full, ptx::Barrier* empty, char* to,
                          const ptx::TensorMap* map, const Tile& tile, int block) {
      ptx::barrier_wait(empty + ring.stage, ring.parity);  // its last products have been done
      ptx::barrier_arrive_expect(full + ring.stage, kBytesK);
      FASTATTN_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_load(to + ring.stage * kBytesK + c * kChunkK, map, full + ring.stage,
                      c * kRowElements, block * kBlockK, tile.head / p.group, tile.batch);
      }
      ring.advance();
    };
    const auto load_k = [&](const Tile& tile, int block) {
      load(k_ring, smem.k_full, smem.k_empty, smem.k, &p.k, tile, block);
    };
    const int tiles = p.tiles.tiles();
    for (int index = ptx::block_id(); index < tiles;
         index = ptx::fetch_increment(p.next_tile) + ptx::grid_blocks()) {
      const Tile tile(p, index);
      int block = block_below<kBlockK, kKeyWords>(p.band, tile.batch, tile.first, tile.last);
      if (block >= tile.first) load_k(tile, block);
      ptx::barrier_wait(smem.q_empty, q_parity);  // the last tile's o has left it
      q_parity ^= 1;
      *smem.tile = index;
      ptx::barrier_arrive_expect(smem.q_full, kConsumers * kBytesQ);
      for (int i = 0; i < kConsumers * kChunks; ++i) {
        ptx::tma_load(smem.q + i * kChunkQ, &p.q, smem.q_full, i % kChunks * kRowElements,
                      tile.q0 + i / kChunks * 64, tile.head, tile.batch);
      }
      while (block >= tile.first) {
        const int next = block_below<kBlockK, kKeyWords>(p.band, tile.batch, tile.first, block);
        if (next >= tile.first) load_k(tile, next);
        load(v_ring, smem.v_full, smem.v_empty, smem.v, &p.v, tile, block);
        block = next;
      }
    }
    ptx::barrier_wait(smem.q_empty, q_parity);  // the last tile's number has been read
    *smem.tile = -1;
    ptx::barrier_arrive(smem.q_full);
  }

  FASTATTN_DEVICE static void consume(const AttentionForwardParameters& p, const Shared& smem,
                                      int warpgroup, int t) {
    Ring<kStages> k_ring(0), v_ring(0);
    char* const q_smem = smem.q + warpgroup * kBytesQ;
    if (kTakeTurns && warpgroup == kConsumers - 1)
      ptx::named_arrive(ForwardBarrier::kTurn, 2 * kWarpgroup);
    for (int q_parity = 0;; q_parity ^= 1) {
      ptx::barrier_wait(smem.q_full, q_parity);  // q and the tile's number are there
      if (*smem.tile < 0) break;
      const Tile tile(p, *smem.tile);
      const int q0 = tile.q0 + 64 * warpgroup;
      Softmax softmax;
      float o[kDim / 2] = {}, s[kBlockK / 2], rescale[2];
      uint32_t probabilities[kBlockK / 4];
      const auto hidden = [&](int block) {
        const KeyWords<kBlockK, kKeyWords> words(p.band, tile.batch, block);
        if (!words.all() || !p.band.whole(q0, 64, block * kBlockK, kBlockK))
          hide(p.band, words, q0, block * kBlockK, t, s);
      };
      int block = block_below<kBlockK, kKeyWords>(p.band, tile.batch, tile.first, tile.last);
      if (block >= tile.first) {
        ptx::barrier_wait(smem.k_full + k_ring.stage, k_ring.parity);  // k is there
        ptx::wgmma_fence();
        multiply_k(smem, q_smem, k_ring.stage, s);  // E1
        ptx::wgmma_wait<0>();
        ptx::barrier_arrive(smem.k_empty + k_ring.stage);
        k_ring.advance();
        hidden(block);
        softmax.step(p.scale_log2, s, rescale);
        pack_pairs<T>(s, probabilities);
        for (int next;; block = next) {
          next = block_below<kBlockK, kKeyWords>(p.band, tile.batch, tile.first, block);
          if (next < tile.first) break;
          ptx::barrier_wait(smem.k_full + k_ring.stage, k_ring.parity);  // k is there
          if (kTakeTurns) ptx::named_sync(ForwardBarrier::kTurn + warpgroup, 2 * kWarpgroup);
          ptx::wgmma_fence();
          multiply_k(smem, q_smem, k_ring.stage, s);                     // E1
          ptx::barrier_wait(smem.v_full + v_ring.stage, v_ring.parity);  // v is there
          zero_hidden_rows(p, smem.v + v_ring.stage * kBytesK, tile.batch, block, warpgroup, t);
          multiply_v(smem, v_ring.stage, probabilities, o);  // E4
          const int next_turn = ForwardBarrier::kTurn + (warpgroup + 1) % kConsumers;
          if (kTakeTurns) ptx::named_arrive(next_turn, 2 * kWarpgroup);
          ptx::wgmma_wait<1>();  // s is there
          ptx::barrier_arrive(smem.k_empty + k_ring.stage);
          k_ring.advance();
          hidden(next);
          const bool same = softmax.step(p.scale_log2, s, rescale);
          settle(softmax.sum);   // the powers run beside the products of o, whose wait is here:
          ptx::wgmma_wait<0>();  // o is there
          ptx::barrier_arrive(smem.v_empty + v_ring.stage);
          v_ring.advance();
          if (!same) {
            FASTATTN_UNROLL
            for (int i = 0; i < kDim / 2; ++i) o[i] *= rescale[i / 2 % 2];  // E4
          }
          pack_pairs<T>(s, probabilities);
        }
        ptx::barrier_wait(smem.v_full + v_ring.stage, v_ring.parity);  // v is there
        zero_hidden_rows(p, smem.v + v_ring.stage * kBytesK, tile.batch, block, warpgroup, t);
        ptx::wgmma_fence();
        multiply_v(smem, v_ring.stage, probabilities, o);  // E4
        ptx::wgmma_wait<0>();
        ptx::barrier_arrive(smem.v_empty + v_ring.stage);
        v_ring.advance();
      }
      finish(p, tile, q0, t, softmax, o);
      store(p, smem, tile, q_smem, q0, warpgroup, t, o);
    }
  }

  // s = Q K^T
  FASTATTN_DEVICE static void multiply_k(const Shared& smem, const char* q_smem, int stage,
                                         float (&s)[kBlockK / 2]) {
    const Operand q = k_major(q_smem), k = k_major(smem.k + stage * kBytesK);
    FASTATTN_UNROLL
    for (int d = 0; d < kDim; d += 16) {
      const int chunk = d / kRowElements, within = d % kRowElements * 2;
      ptx::wgmma_ss<T, kBlockK>(s, q.at(chunk * kChunkQ + within), k.at(chunk * kChunkK + within),
                                d > 0);
    }
    ptx::wgmma_commit();
  }

  // o += P V
  FASTATTN_DEVICE static void multiply_v(const Shared& smem, int stage,
                                         const uint32_t (&probabilities)[kBlockK / 4],
                                         float (&o)[kDim / 2]) {
    const Operand v = mn_major(smem.v + stage * kBytesK, kChunkK);
    FASTATTN_UNROLL
    for (int k = 0; k < kBlockK; k += 16) {
      ptx::wgmma_rs<T, kDim, true>(o, probabilities + k / 4, v.at(k * kRowBytes), true);
    }
    ptx::wgmma_commit();
  }

  // Clears the rows of V of hidden keys, as 0 * NaN = NaN. Every warpgroup writes the same zeros,
  // so that no barrier between warpgroups is needed.
  FASTATTN_DEVICE static void zero_hidden_rows(const AttentionForwardParameters& p, char* v_smem,
                                               int batch, int block, int warpgroup, int t) {
    if (!kKeyWords) return;
    const KeyWords<kBlockK, kKeyWords> words(p.band, batch, block);
    if (words.all()) return;
    const uint32_t word =
        p.band.key_words[int64_t{batch} * p.band.words + (block * kBlockK + t % kBlockK) / 32];
    if (!(word >> t % 32 & 1)) {
      for (int i = t / kBlockK; i < kChunks * 8; i += kWarpgroup / kBlockK) {
        ptx::store_shared(v_smem + i / 8 * kChunkK + t % kBlockK * kRowBytes + i % 8 * 16,
                          ptx::Words4{});
      }
    }
    ptx::fence_async_proxy();                                       // the products see them
    ptx::named_sync(ForwardBarrier::kOwn + warpgroup, kWarpgroup);  // all rows are done
  }

  // E5
  FASTATTN_DEVICE static void finish(const AttentionForwardParameters& p, const Tile& tile, int q0,
                                     int t, const Softmax& softmax, float (&o)[kDim / 2]) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(softmax.sum[half]);
      const int row = q0 + row_of(t) + 8 * half;
      // What sees nothing is 0; what sees scores of -inf alone, products that overflowed, is NaN,
      // as a softmax of them is.
      const bool none = sum == 0.0f && !p.band.sees_a_key(tile.batch, row, kKeyWords);
      const float inverse = none ? 0.0f : sum == 0.0f ? NAN : 1.0f / sum;
      FASTATTN_UNROLL
      for (int i = 2 * half; i < kDim / 2; i += 4) {
        o[i] *= inverse;
        o[i + 1] *= inverse;
      }
      if (t % 4 == 0 && row < p.band.seq_q) {
        const int64_t at = (int64_t{tile.batch} * p.heads_q + tile.head) * p.band.seq_q + row;
        const float log_sum =
            none ? 0.0f : softmax.log_sum(half, sum == 0.0f ? NAN : sum, p.scale_log2);
        const float max = log_sum == log_sum ? softmax.max[half] : NAN;
        p.lse[at] = max * p.scale + log_sum;
        p.row_max[at] = max;
        p.log_sum[at] = log_sum;
      }
    }
  }

  // o takes the place of this warpgroup's q.
  FASTATTN_DEVICE static void store(const AttentionForwardParameters& p, const Shared& smem,
                                    const Tile& tile, char* q_smem, int q0, int warpgroup, int t,
                                    const float (&o)[kDim / 2]) {
    uint32_t words[kDim / 4];
    pack_pairs<T>(o, words);
    store_tile<kDim>(q_smem, kChunkQ, t, words);
    ptx::fence_async_proxy();                                       // the store sees it
    ptx::named_sync(ForwardBarrier::kOwn + warpgroup, kWarpgroup);  // all of o is there
    if (t != 0) return;
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      ptx::tma_store(&p.o, q_smem + c * kChunkQ, c * kRowElements, q0, tile.head, tile.batch);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read();
    ptx::barrier_arrive(smem.q_empty);
  }
};

}  // namespace fastattn::cuda
