// Attention backward, E6-E10: one pass over the score tiles, five products a tile. A task owns a
// range of keys of one key head: it alone writes their dK and dV. With fewer key heads than threads
// the keys are split, and each range leaves its part of dQ in a buffer of its own, added up in a
// fixed order afterwards: bitwise reproducible, no atomics. The gradient of a float mask that is
// broadcast over no more than the batch is written on the way: the task then owns the head in every
// batch element, one after the other.
#pragma once

#include "cpu/attention_mask_gradient.h"
#include "cpu/attention_own_forward.h"
#include "cpu/attention_tiles.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kPartialDqBytes = int64_t{64} << 20;

template <class T>
class AttentionBackward {
  using A = Acc<T>;
  using E = Operand<T>;

 public:
  AttentionBackward(const AttentionBackwardProblem& problem, const Parallel& parallel)
      : b_(problem), p_(problem.forward), parallel_(parallel), dropout_(problem.forward) {}

  // Whether the mask's gradient, E11, needs no pass of its own.
  static bool gives_mask_gradient(const AttentionBackwardProblem& b) {
    const AttentionProblem& p = b.forward;
    if (!b.needs_mask || (!b.needs_q && !b.needs_k && !b.needs_v)) return false;
    if (p.batch == 0 || p.heads_k == 0 || p.softcap != 0 || b.mask_rows != p.seq_q ||
        b.mask_cols != p.seq_k || b.mask_cols == 1 || b.mask_heads != p.heads_q) {
      return false;
    }
    return mask_batches(b) == p.batch || (mask_batches(b) == 1 && sizeof(T) == sizeof(A));
  }

  void run() {
    // A mask shared by the batch: units are heads.
    const bool shared_mask =
        gives_mask_gradient(b_) && mask_batches(b_) == 1 && p_.heads_k >= parallel_.threads;
    own_mask_ = gives_mask_gradient(b_) && (shared_mask || mask_batches(b_) == p_.batch);
    const int64_t batches = shared_mask ? p_.batch : 1;  // of a unit
    const int64_t units = p_.batch * p_.heads_k / max64(1, batches);
    if (units == 0) return;
    if (own_mask_) clear_mask_gradient();
    clear_hidden_ = must_clear_hidden_keys<T>(p_, parallel_);
    dim_padded_ = round_up(p_.head_dim, kWidth<A>);
    dim_v_padded_ = round_up(p_.head_dim_v, kWidth<A>);
    const int64_t key_blocks = max64(1, ceil_div(p_.seq_k, kBlockK));
    const int64_t dq_elements = p_.heads_q * p_.batch * p_.seq_q * dim_padded_;
    int64_t ranges = 1;
    if (units < parallel_.threads && b_.needs_q) {
      ranges = min64(2 * ceil_div(parallel_.threads, units), key_blocks);
      const int64_t affordable =
          kPartialDqBytes / max64(1, dq_elements * static_cast<int64_t>(sizeof(A)));
      ranges = max64(1, min64(ranges, affordable));
    } else if (units < parallel_.threads) {
      ranges = min64(2 * ceil_div(parallel_.threads, units), key_blocks);
    }
    range_keys_ = ceil_div(key_blocks, ranges) * kBlockK;
    ranges = max64(1, ceil_div(p_.seq_k, range_keys_));
    partial_dq_ = ranges > 1 && b_.needs_q
                      ? thread_scratch<A>(Scratch::kParts, ranges * dq_elements)
                      : nullptr;

    parallel_tasks(parallel_, units * ranges, [&](int64_t task) {
      // Under a causal mask the first keys have the most queries.
      const int64_t range = task / units, unit = task % units;
      for (int64_t batch = 0; batch < batches; ++batch)
        keys_of_one_head(unit / p_.heads_k + batch, unit % p_.heads_k, range);
    });
    if (partial_dq_ == nullptr) return;
    parallel_tasks(parallel_, p_.batch * p_.heads_q, [&](int64_t h) {
      A* sum = partial_dq_ + h * p_.seq_q * dim_padded_;
      for (int64_t range = 1; range < ranges; ++range) {
        const A* part = sum + range * dq_elements;
        for (int64_t e = 0; e < p_.seq_q * dim_padded_; ++e) sum[e] += part[e];
      }
      const int64_t batch = h / p_.heads_q;
      write_rows(query_rows<T>(p_, b_.grad_q, batch, h % p_.heads_q), b_.grad_q.row_stride, sum,
                 dim_padded_, Band(p_, batch).seq_q, p_.head_dim, static_cast<A>(p_.scale));
    });
  }

  // Whether run() did so.
  bool gave_mask_gradient() const { return own_mask_; }

 private:
  void clear_mask_gradient() const {
    const int64_t bytes = b_.mask_rows * b_.mask_cols * static_cast<int64_t>(sizeof(T));
    parallel_tasks(parallel_, mask_batches(b_) * b_.mask_heads, [&](int64_t head) {
      __builtin_memset(static_cast<char*>(b_.grad_mask) + head * bytes, 0,
                       static_cast<size_t>(bytes));
    });
  }

  // dM (+)= row r of a block's dS.  // E11
  void add_mask_gradient(const typename ScoreTile<T>::Block& block, const ScoreTile<T>& tile,
                         int64_t r) const {
    const int64_t batch = mask_batches(b_) == 1 ? 0 : block.batch;
    T* row = static_cast<T*>(b_.grad_mask) +
             ((batch * p_.heads_q + block.head) * p_.seq_q + block.i0 + r) * p_.seq_k + block.j0;
    const A* ds = tile.dscores + r * tile.kStride;
    const int64_t from = block.from(r), to = block.to(r);
    if (from >= to) return;
    if constexpr (sizeof(T) == sizeof(A)) {
      for (int64_t j = from; j < to; ++j) row[j] += ds[j];
    } else {
      convert(row + from, ds + from, to - from);  // the only block with these elements
    }
  }

  void keys_of_one_head(int64_t batch, int64_t head_k, int64_t range) const {
    const Band band(p_, batch);
    const int64_t first = range * range_keys_,
                  count = max64(0, min64(range_keys_, band.seq_k - first));
    const int64_t sharing = p_.heads_q / p_.heads_k, padded = round_up(count, kBlockK);
    const int64_t dq_elements = p_.seq_q * dim_padded_;
    const int64_t key_elements = round_up(KeyRange<T>::elements(p_, count), 16);
    const int64_t query_elements = round_up(QueryRows<T>::elements(p_, p_.seq_q), 16);
    A* scratch = thread_scratch<A>(Scratch::kBlock,
                                   ScoreTile<T>::elements() + key_elements + query_elements +
                                       padded * (dim_padded_ + dim_v_padded_) + dq_elements);
    const ScoreTile<T> tile(p_, dropout_, scratch);
    KeyRange<T> keys(p_, count, scratch + ScoreTile<T>::elements());
    A* query_scratch = scratch + ScoreTile<T>::elements() + key_elements;
    A* dk = query_scratch + query_elements;   // [padded, D padded]
    A* dv = dk + padded * dim_padded_;        // [padded, Dv padded]
    A* own_dq = dv + padded * dim_v_padded_;  // [Sq, D padded]
    for (int64_t e = 0; e < padded * (dim_padded_ + dim_v_padded_); ++e) dk[e] = A(0);
    if (!clear_hidden_) keys.pack(p_, batch, head_k, first, count, nullptr);

    for (int64_t head = head_k * sharing; head < (head_k + 1) * sharing; ++head) {
      const ScoreTerms<T> terms(p_, batch, head);
      if (clear_hidden_) keys.pack(p_, batch, head_k, first, count, &terms.mask);
      const QueryRows<T> queries(b_, batch, head, 0, band.seq_q, query_scratch);
      A* dq = own_dq;
      if (partial_dq_ != nullptr) {
        dq = partial_dq_ + ((range * p_.batch + batch) * p_.heads_q + head) * dq_elements;
      }
      if (b_.needs_q) {
        for (int64_t e = 0; e < dq_elements; ++e) dq[e] = A(0);
      }
      for (int64_t j = 0; j < count; j += kBlockK) {
        key_block(batch, head, band, terms, first, j, min64(kBlockK, count - j), keys, queries,
                  tile, dq, dk, dv);
      }
      if (b_.needs_q && partial_dq_ == nullptr) {
        write_rows(query_rows<T>(p_, b_.grad_q, batch, head), b_.grad_q.row_stride, dq, dim_padded_,
                   band.seq_q, p_.head_dim, static_cast<A>(p_.scale));
      }
    }
    if (b_.needs_k) {
      write_rows(key_rows<T>(p_, b_.grad_k, batch, head_k) + first * b_.grad_k.row_stride,
                 b_.grad_k.row_stride, dk, dim_padded_, count, p_.head_dim,
                 static_cast<A>(p_.scale));
    }
    if (b_.needs_v) {
      write_rows(key_rows<T>(p_, b_.grad_v, batch, head_k) + first * b_.grad_v.row_stride,
                 b_.grad_v.row_stride, dv, dim_v_padded_, count, p_.head_dim_v, A(1));
    }
  }

  // Keys [first + j, first + j + count) against every query that may see them.
  void key_block(int64_t batch, int64_t head, const Band& band, const ScoreTerms<T>& terms,
                 int64_t first, int64_t j, int64_t count, const KeyRange<T>& keys,
                 const QueryRows<T>& queries, const ScoreTile<T>& tile, A* dq, A* dk, A* dv) const {
    const int64_t j0 = first + j, i_end = band.end_query(j0 + count - 1);
    for (int64_t i0 = band.first_query(j0) / kBlockQ * kBlockQ; i0 < i_end; i0 += kBlockQ) {
      const int64_t rows = min64(kBlockQ, i_end - i0);
      const typename ScoreTile<T>::Block block{batch, head, band, terms, i0, rows, j0, count};
      if (block.empty()) continue;
      tile.compute(block, queries.q + i0 * queries.q_stride, queries.q_stride,
                   queries.grad_out + i0 * queries.grad_out_stride, queries.grad_out_stride,
                   keys.k_panels + j * keys.dim_words, keys.v_panels + j * keys.dim_v_words,
                   queries.softmax.from(i0), queries.delta + i0, [&](int64_t r) {
                     if (own_mask_) add_mask_gradient(block, tile, r);
                   });
      if (b_.needs_q) {
        for (int64_t strip = 0; strip < rows; strip += kRows) {
          const int strip_rows = static_cast<int>(min64(kRows, rows - strip));
          const int64_t from = block.from(strip), to = block.to(strip + strip_rows - 1);
          if (from >= to) continue;
          const int64_t word = from / kDepth<E>;  // of the block; j is even
          micro_kernel_wide<Start::kAdd>(strip_rows, dim_padded_, words<E>(to) - word,
                                         tile.dscore_rows(strip, word * kDepth<E>),  // E8
                                         keys.k_rows + (words<E>(j) + word) * dim_padded_,
                                         dim_padded_, dq + (i0 + strip) * dim_padded_, dim_padded_);
        }
      }
      if (!b_.needs_k && !b_.needs_v) continue;
      for (int64_t strip = 0; strip < count; strip += kRows) {
        const int strip_rows = static_cast<int>(min64(kRows, count - strip));
        const int64_t from = block.first_row(strip), to = block.end_row(strip + strip_rows - 1);
        if (from >= to) continue;
        const int64_t word = from / kDepth<E>, depth = words<E>(to) - word;
        const int64_t row_word = words<E>(i0) + word;
        if (b_.needs_v) {
          micro_kernel_wide<Start::kAdd>(strip_rows, dim_v_padded_, depth,  // E10
                                         tile.transposed(tile.probs, strip, word * kDepth<E>),
                                         queries.grad_out_depth + row_word * dim_v_padded_,
                                         dim_v_padded_, dv + (j + strip) * dim_v_padded_,
                                         dim_v_padded_);
        }
        if (b_.needs_k) {
          micro_kernel_wide<Start::kAdd>(strip_rows, dim_padded_, depth,  // E9
                                         tile.transposed(tile.dscores, strip, word * kDepth<E>),
                                         queries.q_depth + row_word * dim_padded_, dim_padded_,
                                         dk + (j + strip) * dim_padded_, dim_padded_);
        }
      }
    }
  }

  const AttentionBackwardProblem& b_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  Dropout dropout_;
  bool clear_hidden_ = false, own_mask_ = false;
  int64_t dim_padded_ = 0, dim_v_padded_ = 0, range_keys_ = kBlockK;
  A* partial_dq_ = nullptr;
};

template <class T>
void attention_backward(const AttentionBackwardProblem& b, const Parallel& parallel) {
  const OwnForward<T> forward(b.forward, parallel);
  AttentionBackwardProblem own = b;
  own.forward = forward.problem;
  AttentionBackward<T> backward(own, parallel);
  if (b.needs_q || b.needs_k || b.needs_v) backward.run();
  if (b.needs_mask && !backward.gave_mask_gradient()) attention_mask_gradient<T>(own, parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
