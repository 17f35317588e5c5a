// Attention backward, E6 to E10, for 16-bit types on sm_90a. Persistent: a block takes tiles of 128
// keys of a key head and walks the queries that see them, kBlockQ at a time, of every query head of
// the group. Warpgroup 0 has two threads at work: one loads, one adds dQ to global memory.
// Warpgroups 1 and 2 have 64 keys each and keep dK and dV in registers; scores are transposed
// (keys x queries), so that P^T and dS^T are operands as they lie. dS goes through shared memory
// for dQ, half of which each warpgroup multiplies. dQ [kBlockQ, kDim] of a block of queries is
// added up in global memory in a fixed order, from the last block of keys to the first. A block
// takes its tiles in that order from a counter, and so waits for running blocks alone.
// Shared memory: k, v [kDim / 64][128][64], which dk, dv take at the end; q, do
// [2][kDim / 64][kBlockQ][64]; ds [2][kBlockQ / 64][128][64]; dq [2][8][128][4];
// softmax [2][kBlockQ][2]; delta [2][kBlockQ]; barriers.
#pragma once

#include "cuda/tile/softmax.h"

namespace fastattn::cuda {

struct AttentionBackwardParameters {
  ptx::TensorMap q, k, v, grad_out;  // [batch, heads, seq, dim]; boxes of kBlockQ or 128 x 64
  ptx::TensorMap grad_k, grad_v;     // boxes of 64 x 64
  // [batch, heads_q, padded_q][2]: a row's maximum, +inf for one that sees nothing, and the
  // logarithm in base 2 of its sum
  const float* softmax;
  const float* delta;  // [batch, heads_q, padded_q]
  float* grad_q;       // [batch, heads_q, blocks_q][2][8][128][4]
  int* turns;          // [batch, heads_q, blocks_q], 0 at launch
  int* next_tile;      // 0 at launch
  Band band;
  HeadBlocks tiles;  // of keys
  bool empty_rows;   // whether a query may see no key
  int heads_k, group, blocks_q;
  float scale, scale_log2;
};

template <class T, int kDim_, int kBlockQ_, bool kKeyWords>
struct AttentionBackward {
  static constexpr int kDim = kDim_, kBlockQ = kBlockQ_, kBlockK = 128, kStages = 2;
  static constexpr int kThreads = 3 * kWarpgroup, kChunks = kDim / kRowElements;
  static constexpr int kBytesK = kBlockK * kDim * 2, kBytesQ = kBlockQ * kDim * 2;
  static constexpr int kChunkK = kBlockK * kRowBytes, kChunkQ = kBlockQ * kRowBytes;
  static constexpr int kBytesS = kBlockK * kBlockQ * 2, kBytesDq = kBlockQ * kDim * 4;
  static constexpr int kBytesDelta = kBlockQ * 4, kBytesSoftmax = 2 * kBytesDelta;
  static constexpr int kSharedBytes = 2 * kBytesK +
                                      kStages * (2 * kBytesQ + kBytesSoftmax + kBytesDelta) +
                                      2 * kBytesS + kBytesDq + (4 * kStages + 5) * 8;
  static_assert(kBlockQ * kDim == kGradQueryBlock);
  static_assert(kSharedBytes <= kMostSharedBytes);

  struct Shared {
    char *k, *v, *q, *grad_out, *ds, *dq, *softmax, *delta;
    ptx::Barrier *kv_full, *kv_empty, *dq_full, *dq_empty, *q_full, *q_empty, *o_full, *o_empty;
    int* tile;  // beside full k, v: the block's tile, or -1 at the end

    FASTATTN_DEVICE explicit Shared(char* smem) {
      k = smem;
      v = k + kBytesK;
      q = v + kBytesK;
      grad_out = q + kStages * kBytesQ;
      ds = grad_out + kStages * kBytesQ;
      dq = ds + 2 * kBytesS;
      softmax = dq + kBytesDq;
      delta = softmax + kStages * kBytesSoftmax;
      kv_full = reinterpret_cast<ptx::Barrier*>(delta + kStages * kBytesDelta);
      kv_empty = kv_full + 1;
      dq_full = kv_empty + 1;
      dq_empty = dq_full + 1;
      q_full = dq_empty + 1;
      q_empty = q_full + kStages;
      o_full = q_empty + kStages;
      o_empty = o_full + kStages;
      tile = reinterpret_cast<int*>(o_empty + kStages);
    }
  };

  // A tile: its key head, its keys, the query blocks [first, last) that see some of them.
  struct Tile {
    int batch, head, block, k0, first, last;
    bool hidden, partial;  // by their words all keys are hidden, or some

    FASTATTN_DEVICE Tile(const AttentionBackwardParameters& p, int tile) {
      p.tiles.locate(tile, head, block);
      batch = head / p.heads_k;
      head %= p.heads_k;
      block = p.tiles.blocks - 1 - block;
      k0 = block * kBlockK;
      first = p.band.first_query_block<kBlockQ>(k0);
      last = k0 < p.band.seq_k ? p.band.last_query_block<kBlockQ>(k0, kBlockK) : first;
      const KeyWords<kBlockK, kKeyWords> words(p.band, batch, block);
      hidden = words.none();
      partial = !hidden && !words.all();
    }
    // Query head g of the group, over all batch elements.
    FASTATTN_DEVICE int head_q(const AttentionBackwardParameters& p, int g) const {
      return (batch * p.heads_k + head) * p.group + g;
    }
  };

  FASTATTN_DEVICE static void run(const AttentionBackwardParameters& p) {
    const Shared smem(ptx::dynamic_shared_memory());
    const int thread = ptx::thread_id(), warpgroup = ptx::uniform(thread / kWarpgroup);
    if (thread == 0) {
      ptx::barrier_init(smem.kv_full, 1);
      ptx::barrier_init(smem.kv_empty, 2 + 1);
      ptx::barrier_init(smem.dq_full, 2 * kWarpgroup);
      ptx::barrier_init(smem.dq_empty, 1);
      for (int s = 0; s < kStages; ++s) {
        ptx::barrier_init(smem.q_full + s, 1);
        ptx::barrier_init(smem.o_full + s, 1);
        ptx::barrier_init(smem.q_empty + s, 2 * kWarpgroup);
        ptx::barrier_init(smem.o_empty + s, 2 * kWarpgroup);
      }
      ptx::barrier_init_fence();
    }
    ptx::block_sync();  // the barriers are there
    if (warpgroup == 0) {
      ptx::registers_decrease<load_registers(2)>();
      if (thread == 0) load(p, smem);
      if (thread == 32) add_dq(p, smem);
    } else {
      ptx::registers_increase<multiply_registers(2)>();
      consume(p, smem, warpgroup - 1, thread % kWarpgroup);
    }
  }

 private:
  FASTATTN_DEVICE static void load(const AttentionBackwardParameters& p, const Shared& smem) {
    Ring<kStages> ring(1);
    int parity = 1;
    const auto load_queries = [&](ptx::Barrier* full, ptx::Barrier* empty, char* to,
                                  const ptx::TensorMap* map, char* row_to, const float* row_from,
                                  int row_bytes, const Tile& tile, int head, int block) {
      ptx::barrier_wait(empty + ring.stage, ring.parity);  // its last products have been done
      ptx::barrier_arrive_expect(full + ring.stage, kBytesQ + row_bytes);
      FASTATTN_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_load(to + ring.stage * kBytesQ + c * kChunkQ, map, full + ring.stage,
                      c * kRowElements, block * kBlockQ, tile.head * p.group + head, tile.batch);
      }
      const int64_t place = int64_t{tile.head_q(p, head)} * p.blocks_q + block;
      ptx::bulk_load(row_to + ring.stage * row_bytes, row_from + place * (row_bytes / 4),
                     full + ring.stage, row_bytes);
    };
    const int tiles = p.tiles.tiles();
    const auto next = [&] { return ptx::fetch_increment(p.next_tile); };
    for (int index = next(); index < tiles; index = next()) {
      const Tile tile(p, index);
      ptx::barrier_wait(smem.kv_empty, parity);  // the last tile's dk and dv have left it
      parity ^= 1;
      *smem.tile = index;
      ptx::barrier_arrive_expect(smem.kv_full, 2 * kBytesK);
      FASTATTN_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        ptx::tma_load(smem.k + c * kChunkK, &p.k, smem.kv_full, c * kRowElements, tile.k0,
                      tile.head, tile.batch);
        ptx::tma_load(smem.v + c * kChunkK, &p.v, smem.kv_full, c * kRowElements, tile.k0,
                      tile.head, tile.batch);
      }
      if (tile.hidden) continue;
      for (int head = 0; head < p.group; ++head) {
        for (int block = tile.first; block < tile.last; ++block, ring.advance()) {
          load_queries(smem.q_full, smem.q_empty, smem.q, &p.q, smem.softmax, p.softmax,
                       kBytesSoftmax, tile, head, block);
          load_queries(smem.o_full, smem.o_empty, smem.grad_out, &p.grad_out, smem.delta, p.delta,
                       kBytesDelta, tile, head, block);
        }
      }
    }
    ptx::barrier_wait(smem.kv_empty, parity);  // the last tile's number has been read
    *smem.tile = -1;
    ptx::barrier_arrive(smem.kv_full);
  }

  // E8's sums over keys, a block of queries at a time in its turn.
  FASTATTN_DEVICE static void add_dq(const AttentionBackwardParameters& p, const Shared& smem) {
    int dq_parity = 0;
    for (int parity = 0;; parity ^= 1) {
      ptx::barrier_wait(smem.kv_full, parity);  // the tile's number is there
      const int index = *smem.tile;
      if (index < 0) break;
      ptx::barrier_arrive(smem.kv_empty);
      const Tile tile(p, index);
      for (int head = 0; head < p.group; ++head) {
        for (int block = tile.first; block < tile.last; ++block) {
          const int64_t place = int64_t{tile.head_q(p, head)} * p.blocks_q + block;
          const int before =
              p.band.last_key_block<kBlockK>(block * kBlockQ, kBlockQ) - 1 - tile.block;
          float* to = p.grad_q + place * (kBlockQ * kDim);
          if (!tile.hidden) {
            ptx::barrier_wait(smem.dq_full, dq_parity);  // dq is there
            dq_parity ^= 1;
          }
          ptx::counter_wait(p.turns + place, before);
          if (!tile.hidden) {
            ptx::fence_async_proxy_global();
            if (before == 0 && !kKeyWords) {
              ptx::bulk_store(to, smem.dq, kBytesDq);
            } else {
              ptx::bulk_add(to, smem.dq, kBytesDq);
            }
            ptx::bulk_commit();
            ptx::bulk_wait_read();
            ptx::barrier_arrive(smem.dq_empty);
            ptx::bulk_wait();  // it is in global memory before the next one's turn
            ptx::fence_async_proxy_global();
          }
          ptx::counter_release(p.turns + place);
        }
      }
    }
  }

  FASTATTN_DEVICE static void consume(const AttentionBackwardParameters& p, const Shared& smem,
                                      int warpgroup, int t) {
    static_assert(kStages == 2);  // of ds too
    Ring<kStages> ring(0);
    for (int parity = 0;; parity ^= 1) {
      ptx::barrier_wait(smem.kv_full, parity);  // k, v and the tile's number are there
      const int index = *smem.tile;
      if (index < 0) break;
      const Tile tile(p, index);
      const int steps = tile.hidden ? 0 : (tile.last - tile.first) * p.group;
      const int k0 = tile.k0 + 64 * warpgroup;
      float dk[kDim / 2] = {}, dv[kDim / 2] = {};
      // Bit h: the key of row row_of(t) + 8 h is hidden.
      const int hidden_rows = zero_hidden_rows(p, smem, tile, warpgroup, t);
      int block = tile.first;
      for (int step = 0; step < steps; ++step) {
        const char* q_smem = smem.q + ring.stage * kBytesQ;
        const char* o_smem = smem.grad_out + ring.stage * kBytesQ;
        char* ds_smem = smem.ds + ring.stage * kBytesS;
        uint32_t probabilities[kBlockQ / 4], scores[kBlockQ / 4];
        {
          float s[kBlockQ / 2], dp[kBlockQ / 2];
          ptx::barrier_wait(smem.q_full + ring.stage, ring.parity);  // q and softmax are there
          ptx::wgmma_fence();
          multiply_transposed(smem.k, warpgroup, q_smem, s);         // E1
          ptx::barrier_wait(smem.o_full + ring.stage, ring.parity);  // grad_out, delta are there
          if (p.empty_rows) zero_empty_rows(smem, ring.stage, warpgroup, t);
          multiply_transposed(smem.v, warpgroup, o_smem, dp);  // E7
          ptx::wgmma_wait<1>();                                // s is there
          const int q0 = block * kBlockQ;
          if (tile.partial || !p.band.whole(q0, kBlockQ, k0, 64))
            hide_transposed<kBlockQ>(p.band, hidden_rows, q0, k0, t, s);
          const char* softmax = smem.softmax + ring.stage * kBytesSoftmax;
          const char* delta = smem.delta + ring.stage * kBytesDelta;
          FASTATTN_UNROLL
          for (int i = 0; i < kBlockQ / 2; i += 2) {  // E6
            const ptx::Floats4 rows = column_pair(softmax, t, i);
            s[i] = weight(s[i], p.scale_log2, rows.x, rows.y);
            s[i + 1] = weight(s[i + 1], p.scale_log2, rows.z, rows.w);
          }
          settle(s);             // the powers run beside the products of dp, whose wait is here:
          ptx::wgmma_wait<0>();  // dp is there
          FASTATTN_UNROLL
          for (int i = 0; i < kBlockQ / 2; i += 2) {  // s and dp give way to what is kept of them
            probabilities[i / 2] = ptx::pack<T>(s[i], s[i + 1]);
            scores[i / 2] =
                ptx::pack<T>(s[i] * (dp[i] - column_value(delta, t, i)),
                             s[i + 1] * (dp[i + 1] - column_value(delta, t, i + 1)));  // E7
          }
        }
        store_tile<kBlockQ>(ds_smem + 64 * warpgroup * kRowBytes, kChunkK, t, scores);
        ptx::fence_async_proxy();  // the products for dq see it
        float dq[32];
        ptx::wgmma_fence();
        multiply_queries(o_smem, probabilities, dv);              // E10
        ptx::named_sync(BackwardBarrier::kBoth, 2 * kWarpgroup);  // both warpgroups' ds is there
        multiply_dq(smem, ds_smem, warpgroup, dq);                // E8
        multiply_queries(q_smem, scores, dk);                     // E9
        ptx::wgmma_wait<1>();                                     // dv and dq are there
        ptx::barrier_arrive(smem.o_empty + ring.stage);
        ptx::barrier_wait(smem.dq_empty, ring.stage ^ 1);  // the last dq has been read
        FASTATTN_UNROLL
        for (int i = 0; i < 8; ++i) {
          ptx::store_shared(smem.dq + ((warpgroup * 8 + i) * 128 + t) * 16,
                            ptx::Floats4{dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]});
        }
        ptx::fence_async_proxy();  // the addition sees it
        ptx::barrier_arrive(smem.dq_full);
        ptx::wgmma_wait<0>();  // dk is there
        ptx::barrier_arrive(smem.q_empty + ring.stage);
        ring.advance();
        if (++block == tile.last) block = tile.first;
      }
      ptx::named_sync(BackwardBarrier::kKeysRead, 2 * kWarpgroup);  // and so k may be overwritten
      store(p, smem, tile, k0, warpgroup, t, dk, dv);
    }
  }

  // The same number for a column of the fragment's queries.
  FASTATTN_DEVICE static float column_value(const char* row, int t, int i) {
    return reinterpret_cast<const float*>(row)[8 * (i / 4) + column_of(t) + i % 2];
  }

  // Maxima and sums of the queries of columns i and i + 1.
  FASTATTN_DEVICE static ptx::Floats4 column_pair(const char* rows, int t, int i) {
    return reinterpret_cast<const ptx::Floats4*>(rows)[(8 * (i / 4) + column_of(t)) / 2];
  }

  // d [64 keys, kBlockQ] = this warpgroup's rows of `keys` times the transpose of `queries`
  FASTATTN_DEVICE static void multiply_transposed(const char* keys, int warpgroup,
                                                  const char* queries, float (&d)[kBlockQ / 2]) {
    const Operand a = k_major(keys + ptx::fresh(64 * warpgroup * kRowBytes)), b = k_major(queries);
    FASTATTN_UNROLL
    for (int x = 0; x < kDim; x += 16) {
      const int chunk = x / kRowElements, within = x % kRowElements * 2;
      ptx::wgmma_ss<T, kBlockQ>(d, a.at(chunk * kChunkK + within), b.at(chunk * kChunkQ + within),
                                x > 0);
    }
    ptx::wgmma_commit();
  }

  // d [64 keys, kDim] += a [64 keys, kBlockQ] times `queries`
  FASTATTN_DEVICE static void multiply_queries(const char* queries,
                                               const uint32_t (&a)[kBlockQ / 4],
                                               float (&d)[kDim / 2]) {
    const Operand b = mn_major(queries, kChunkQ);
    FASTATTN_UNROLL
    for (int x = 0; x < kBlockQ; x += 16)
      ptx::wgmma_rs<T, kDim, true>(d, a + x / 4, b.at(x * kRowBytes), true);
    ptx::wgmma_commit();
  }

  // dq [64, 64], this warpgroup's half of dS K
  FASTATTN_DEVICE static void multiply_dq(const Shared& smem, const char* ds_smem, int warpgroup,
                                          float (&dq)[32]) {
    const Operand a = mn_major(ds_smem + (kBlockQ == 128 ? warpgroup : 0) * kChunkK, kChunkK);
    const Operand b = mn_major(smem.k + (kDim == 128 ? warpgroup : 0) * kChunkK, kChunkK);
    FASTATTN_UNROLL
    for (int k = 0; k < kBlockK; k += 16)
      ptx::wgmma_ss<T, 64, true, true>(dq, a.at(k * kRowBytes), b.at(k * kRowBytes), k > 0);
    ptx::wgmma_commit();
  }

  // Clears the rows of hidden keys, as 0 * NaN = NaN.
  FASTATTN_DEVICE static int zero_hidden_rows(const AttentionBackwardParameters& p,
                                              const Shared& smem, const Tile& tile, int warpgroup,
                                              int t) {
    if (!kKeyWords || !tile.partial) return 0;
    const uint32_t* words = p.band.key_words + int64_t{tile.batch} * p.band.words;
    const int key = tile.k0 + t;
    if (!(words[key / 32] >> key % 32 & 1)) {
      char* rows = warpgroup == 0 ? smem.k : smem.v;
      for (int i = 0; i < kChunks * 8; ++i)
        ptx::store_shared(rows + i / 8 * kChunkK + t * kRowBytes + i % 8 * 16, ptx::Words4{});
    }
    ptx::fence_async_proxy();                                 // the products see them
    ptx::named_sync(BackwardBarrier::kBoth, 2 * kWarpgroup);  // all rows are done
    int hidden = 0;
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int own = tile.k0 + 64 * warpgroup + row_of(t) + 8 * half;
      hidden |= static_cast<int>(~words[own / 32] >> own % 32 & 1) << half;
    }
    return hidden;
  }

  // Clears queries that see nothing, and their gradients, as 0 * NaN = NaN; their scores are hidden
  // too. Every warpgroup writes the same zeros, so that no barrier between them is needed.
  FASTATTN_DEVICE static void zero_empty_rows(const Shared& smem, int stage, int warpgroup, int t) {
    const int row = t % kBlockQ;
    if (reinterpret_cast<const float*>(smem.softmax + stage * kBytesSoftmax)[2 * row] == INFINITY) {
      for (int i = t / kBlockQ; i < 2 * kChunks * 8; i += kWarpgroup / kBlockQ) {
        char* rows = (i % 2 == 0 ? smem.q : smem.grad_out) + stage * kBytesQ;
        ptx::store_shared(rows + i / 16 * kChunkQ + row * kRowBytes + i / 2 % 8 * 16,
                          ptx::Words4{});
      }
    }
    ptx::fence_async_proxy();                                        // the products see them
    ptx::named_sync(BackwardBarrier::kOwn + warpgroup, kWarpgroup);  // all rows are done
  }

  // dk and dv take the place of this warpgroup's k and v.
  FASTATTN_DEVICE static void store(const AttentionBackwardParameters& p, const Shared& smem,
                                    const Tile& tile, int k0, int warpgroup, int t,
                                    float (&dk)[kDim / 2], float (&dv)[kDim / 2]) {
    const int rows = 64 * warpgroup * kRowBytes;
    uint32_t words[kDim / 4];
    pack_pairs<T>(dv, words);
    store_tile<kDim>(smem.v + rows, kChunkK, t, words);
    FASTATTN_UNROLL
    for (int i = 0; i < kDim / 2; ++i) dk[i] *= p.scale;  // E9
    pack_pairs<T>(dk, words);
    store_tile<kDim>(smem.k + rows, kChunkK, t, words);
    ptx::fence_async_proxy();                                        // the stores see them
    ptx::named_sync(BackwardBarrier::kOwn + warpgroup, kWarpgroup);  // all of them are there
    if (t != 0) return;
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const int at = c * kChunkK + rows, column = c * kRowElements;
      ptx::tma_store(&p.grad_k, smem.k + at, column, k0, tile.head, tile.batch);
      ptx::tma_store(&p.grad_v, smem.v + at, column, k0, tile.head, tile.batch);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read();
    ptx::barrier_arrive(smem.kv_empty);
  }
};

}  // namespace fastattn::cuda
