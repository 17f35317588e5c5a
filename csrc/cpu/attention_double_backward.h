// Forward mode and the second derivative of attention, E12-E14: the tangent of the output in a
// direction of q, k, v and the mask, and what backward's gradients become in it. A task owns query
// rows of a key head's group; a block of them keeps its scores, two arrays or four, for all keys it
// sees between two passes: five products a tile for the tangent alone, twelve for all. dK and dV
// are summed in the task, and where query rows are split over tasks, in buffers that are added up
// in a fixed order. Memory is O(S).
#pragma once

#include "cpu/attention_own_forward.h"
#include "cpu/attention_second_mask.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
class AttentionDoubleBackward {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kStride = SecondTile<T>::kStride;
  // Of a block of query rows: their scores (160 KB a block of keys) are read again from L2 or L3.
  static constexpr int64_t kMostRows = 48;
  static constexpr int64_t kScoreBytes = int64_t{32} << 20;

 public:
  AttentionDoubleBackward(const AttentionDoubleBackwardProblem& problem, const Parallel& parallel)
      : s_(problem),
        b_(problem.backward),
        p_(problem.backward.forward),
        parallel_(parallel),
        dropout_(p_),
        operands_(p_, problem.tangents) {}

  void run() {
    const int64_t units = p_.batch * p_.heads_k;
    if (units == 0) return;
    clear_hidden_ = must_clear_hidden_keys<T>(p_, parallel_, s_.tangents);
    gradient_ = s_.needs_gradient_of_scores();
    dim_padded_ = round_up(p_.head_dim, kWidth<A>);
    dim_v_padded_ = round_up(p_.head_dim_v, kWidth<A>);
    key_blocks_ = max64(1, ceil_div(p_.seq_k, kBlockK));
    // So many rows that their scores stay near.
    const int64_t row_bytes =
        SecondTile<T>::elements(p_, gradient_, 1) * key_blocks_ * static_cast<int64_t>(sizeof(A));
    block_rows_ = max64(2 * kRows, min64(kMostRows, kScoreBytes / row_bytes / kRows * kRows));
    const int64_t blocks = max64(1, ceil_div(p_.seq_q, block_rows_));
    const int64_t part = elements_of_keys();
    int64_t ranges = 1;
    if (units < 4 * parallel_.threads && units % parallel_.threads != 0) {
      ranges = min64(parallel_.threads, blocks);
      const int64_t bytes = max64(1, units * part * static_cast<int64_t>(sizeof(A)));
      ranges = max64(1, min64(ranges, kPartialBytes / bytes));
    }
    parts_ = ranges > 1 && part > 0 ? thread_scratch<A>(Scratch::kParts, units * ranges * part)
                                    : nullptr;
    parallel_tasks(parallel_, units * ranges, [&](int64_t task) {
      const int64_t unit = task % units, range = task / units;
      A* sums = parts_ == nullptr ? nullptr : parts_ + (range * units + unit) * part;
      rows_of_one_head(unit / p_.heads_k, unit % p_.heads_k, range, ranges, sums);
    });
    if (parts_ == nullptr) return;
    parallel_tasks(parallel_, units, [&](int64_t unit) {
      A* sum = parts_ + unit * part;
      for (int64_t range = 1; range < ranges; ++range) {
        const A* other = sum + range * units * part;
        for (int64_t e = 0; e < part; ++e) sum[e] += other[e];
      }
      write_keys(unit / p_.heads_k, unit % p_.heads_k, sum);
    });
  }

 private:
  // The blocks of query rows `range`, range + ranges, ... of a group of heads.
  void rows_of_one_head(int64_t batch, int64_t head_k, int64_t range, int64_t ranges,
                        A* sums) const {
    const Band band(p_, batch);
    const int64_t sharing = p_.heads_q / p_.heads_k;
    const int64_t part = elements_of_keys();
    const int64_t key_elements = round_up(SecondKeyRange<T>::elements(p_, p_.seq_k), 16);
    const int64_t query_elements = round_up(SecondQueryRows<T>::elements(p_, block_rows_), 16);
    const int64_t tile_elements = round_up(SecondTile<T>::elements(p_, gradient_, block_rows_), 16);
    const int64_t row_elements =
        kPaired<E> ? 2 * block_rows_ * kStride : 0;  // four arrays as rows of pairs
    A* scratch = thread_scratch<A>(Scratch::kBlock,
                                   key_elements + query_elements + row_elements +
                                       block_rows_ * (dim_padded_ + dim_v_padded_) +
                                       (sums == nullptr ? part : 0) + key_blocks_ * tile_elements);
    Work w(SecondKeyRange<T>(p_, operands_, p_.seq_k, scratch));
    w.query_scratch = scratch + key_elements;
    w.row_store = reinterpret_cast<E*>(w.query_scratch + query_elements);
    w.gq = w.query_scratch + query_elements + row_elements;
    w.t_out = w.gq + block_rows_ * dim_padded_;
    A* end = w.t_out + block_rows_ * dim_v_padded_;
    w.gk = sums == nullptr ? end : sums;
    w.gv = w.gk + p_.seq_k * dim_padded_;
    w.tiles = sums == nullptr ? end + part : end;
    w.tile_elements = tile_elements;
    for (int64_t e = 0; e < part; ++e) w.gk[e] = A(0);
    if (!clear_hidden_) pack(w, band, batch, head_k, nullptr);
    for (int64_t head = head_k * sharing; head < (head_k + 1) * sharing; ++head) {
      const TangentTerms<T> terms(p_, s_.tangents, batch, head);
      if (clear_hidden_) pack(w, band, batch, head_k, &terms.terms.mask);
      for (int64_t i0 = range * block_rows_; i0 < band.seq_q; i0 += ranges * block_rows_)
        query_block(batch, head, band, terms, i0, min64(block_rows_, band.seq_q - i0), w);
    }
    if (sums == nullptr) write_keys(batch, head_k, w.gk);
  }

  // Of the sums of a key head's keys.
  int64_t elements_of_keys() const {
    if (!b_.needs_k && !b_.needs_v) return 0;
    return p_.seq_k * (dim_padded_ + dim_v_padded_);
  }

  // What a task works with.
  struct Work {
    explicit Work(const SecondKeyRange<T>& range) : keys(range) {}

    SecondKeyRange<T> keys;
    A* query_scratch;
    E* row_store;   // of pairs: [4][rows, kStride / 2]
    A *gq, *t_out;  // [rows, padded]
    A *gk, *gv;     // [Sk, padded]
    A* tiles;       // [blocks of keys]
    int64_t tile_elements;
  };

  void pack(Work& w, const Band& band, int64_t batch, int64_t head_k,
            const HeadMask<T>* hidden_from) const {
    w.keys.pack(s_, operands_, batch, head_k, 0, band.seq_k, b_.needs_q, s_.needs_tangents,
                hidden_from);
  }

  void query_block(int64_t batch, int64_t head, const Band& band, const TangentTerms<T>& terms,
                   int64_t i0, int64_t rows, const Work& w) const {
    const SecondQueryRows<T> q(s_, operands_, batch, head, i0, rows, true, w.query_scratch);
    const int64_t last = ceil_div(max64(0, band.end_key(i0 + rows - 1)), kBlockK);
    const int64_t first = band.first_key(i0) / kBlockK;
    const auto for_each_block = [&](const auto& body) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t j0 = n * kBlockK;
        const typename SecondTile<T>::Block block{
            batch, head, band, terms.terms, i0, rows, j0, min64(kBlockK, band.seq_k - j0)};
        if (block.empty()) continue;
        body(block,
             SecondTile<T>(s_, dropout_, block_rows_, w.tiles + (n - first) * w.tile_elements));
      }
    };
    for_each_block([&](const auto& block, const SecondTile<T>& tile) {
      tile.first(block, terms, operands_, q, 0, w.keys, block.j0);
    });
    const int64_t offset = lse_offset(p_, batch, head) + i0;
    for (int64_t i = 0; i < rows; ++i) {
      static_cast<A*>(s_.t_lse)[offset + i] = q.mu[i];
      if (!gradient_) continue;
      q.finish(i);
      static_cast<A*>(s_.rest)[offset + i] = q.rest[i];
      static_cast<A*>(s_.beta)[offset + i] = q.beta[i];
    }
    if (!s_.needs_tangents && !b_.needs_q && !b_.needs_k && !b_.needs_v) return;
    for (int64_t e = 0; e < rows * dim_padded_; ++e) w.gq[e] = A(0);
    for (int64_t e = 0; e < rows * dim_v_padded_; ++e) w.t_out[e] = A(0);
    for_each_block([&](const auto& block, const SecondTile<T>& tile) {
      tile.second_pass(block, q, 0, [](int64_t, const A*) {});
      if constexpr (kPaired<E>) make_operands(block, tile, w);
      products_of_rows(block, tile, w);
      products_of_keys(block, tile, q, w);
    });
    if (s_.needs_tangents) {
      write_rows(query_rows<T>(p_, s_.t_out, batch, head) + i0 * s_.t_out.row_stride,
                 s_.t_out.row_stride, w.t_out, dim_v_padded_, rows, p_.head_dim_v, A(1));
    }
    if (b_.needs_q) {
      write_rows(query_rows<T>(p_, b_.grad_q, batch, head) + i0 * b_.grad_q.row_stride,
                 b_.grad_q.row_stride, w.gq, dim_padded_, rows, p_.head_dim,
                 static_cast<A>(p_.scale));
    }
  }

  static constexpr int kProbs = 0, kTangents = 1, kDscores = 2, kSecond = 3;
  static A* array(const SecondTile<T>& tile, int which) {
    A* const arrays[] = {tile.probs, tile.tangents, tile.dscores, tile.second};
    return arrays[which];
  }

  // Pairs of keys in row_store, pairs of rows over the arrays.
  void make_operands(const typename SecondTile<T>::Block& block, const SecondTile<T>& tile,
                     const Work& w) const {
    const bool of_keys = b_.needs_k || b_.needs_v;
    for (int which = kProbs; which <= (gradient_ ? kSecond : kTangents); ++which) {
      if (which == kProbs && !s_.tangents.v.data) continue;
      A* values = array(tile, which);
      E* store = w.row_store + which * block_rows_ * (kStride / 2);
      for (int64_t r = 0; r < block.rows; ++r) {
        round_row(store + r * (kStride / 2), values + r * kStride, kBlockK);
      }
      if (!of_keys || which == kProbs) continue;  // no product of keys takes P
      if (block.rows % 2 != 0) {
        A* last = values + block.rows * kStride;
        for (int64_t j = 0; j < kBlockK; ++j) last[j] = A(0);
      }
      for (int64_t r = 0; r < block.rows; r += 2) {
        A* low = values + r * kStride;
        round_two_rows(reinterpret_cast<E*>(low), low, low + kStride, kBlockK);
      }
    }
  }

  // Rows from `strip` on, keys from `from` on, whole words.
  FASTATTN_INLINE Strided<E> row_operand(const SecondTile<T>& tile, const Work& w, int which,
                                         int64_t strip, int64_t from) const {
    if constexpr (kPaired<E>) {
      const E* store = w.row_store + which * block_rows_ * (kStride / 2);
      return {store + strip * (kStride / 2) + from / 2, kStride / 2, 1};
    } else {
      return {array(tile, which) + strip * kStride + from, kStride, 1};
    }
  }
  // Keys from `strip` on, rows from `from` on.
  FASTATTN_INLINE Strided<E> key_operand(const SecondTile<T>& tile, int which, int64_t strip,
                                         int64_t from) const {
    return {reinterpret_cast<const E*>(array(tile, which)) + from * kStride + strip, 1,
            kDepth<E> * kStride};
  }

  // The tangent of the output and the derivative of dQ.
  void products_of_rows(const typename SecondTile<T>::Block& block, const SecondTile<T>& tile,
                        const Work& w) const {
    for (int64_t strip = 0; strip < block.rows; strip += kRows) {
      const int rows = static_cast<int>(min64(kRows, block.rows - strip));
      const int64_t from = block.from(strip), to = block.to(strip + rows - 1);
      if (from >= to) continue;
      const int64_t word = from / kDepth<E>, depth = words<E>(to) - word;
      const auto add = [&](int which, const E* x, int64_t padded, A* sum) {
        micro_kernel_wide<Start::kAdd>(
            rows, padded, depth, row_operand(tile, w, which, strip, word * kDepth<E>),
            x + (words<E>(block.j0) + word) * padded, padded, sum + strip * padded, padded);
      };
      if (s_.needs_tangents) {  // E12
        if (s_.tangents.of_scores()) add(kTangents, w.keys.v_rows, dim_v_padded_, w.t_out);
        if (s_.tangents.v.data) add(kProbs, w.keys.t_v_rows, dim_v_padded_, w.t_out);
      }
      if (b_.needs_q) {  // E14
        add(kSecond, w.keys.k_rows, dim_padded_, w.gq);
        if (s_.tangents.k.data) add(kDscores, w.keys.t_k_rows, dim_padded_, w.gq);
      }
    }
  }

  // The derivatives of dK and dV.
  void products_of_keys(const typename SecondTile<T>::Block& block, const SecondTile<T>& tile,
                        const SecondQueryRows<T>& q, const Work& w) const {
    if (!b_.needs_k && !b_.needs_v) return;
    for (int64_t strip = 0; strip < block.keys; strip += kRows) {
      const int rows = static_cast<int>(min64(kRows, block.keys - strip));
      const int64_t from = block.first_row(strip), to = block.end_row(strip + rows - 1);
      if (from >= to) continue;
      const int64_t word = from / kDepth<E>, depth = words<E>(to) - word;
      const auto add = [&](int which, const E* x, int64_t padded, A* sum) {
        micro_kernel_wide<Start::kAdd>(
            rows, padded, depth, key_operand(tile, which, strip, word * kDepth<E>),
            x + word * padded, padded, sum + (block.j0 + strip) * padded, padded);
      };
      if (b_.needs_k) {  // E14
        add(kSecond, q.q_depth, dim_padded_, w.gk);
        if (s_.tangents.q.data) add(kDscores, q.t_q_depth, dim_padded_, w.gk);
      }
      if (b_.needs_v) add(kTangents, q.grad_out_depth, dim_v_padded_, w.gv);  // E14
    }
  }

  void write_keys(int64_t batch, int64_t head_k, A* sums) const {
    const int64_t rows = Band(p_, batch).seq_k;
    if (b_.needs_k) {
      write_rows(key_rows<T>(p_, b_.grad_k, batch, head_k), b_.grad_k.row_stride, sums, dim_padded_,
                 rows, p_.head_dim, static_cast<A>(p_.scale));
    }
    if (b_.needs_v) {
      write_rows(key_rows<T>(p_, b_.grad_v, batch, head_k), b_.grad_v.row_stride,
                 sums + p_.seq_k * dim_padded_, dim_v_padded_, rows, p_.head_dim_v, A(1));
    }
  }

  static constexpr int64_t kPartialBytes = int64_t{64} << 20;

  const AttentionDoubleBackwardProblem& s_;
  const AttentionBackwardProblem& b_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  Dropout dropout_;
  ScoreOperands<T> operands_;
  bool clear_hidden_ = false, gradient_ = false;
  int64_t dim_padded_ = 0, dim_v_padded_ = 0, key_blocks_ = 1, block_rows_ = kBlockQ;
  A* parts_ = nullptr;
};

template <class T>
void attention_double_backward(const AttentionDoubleBackwardProblem& s, const Parallel& parallel) {
  const OwnForward<T> forward(s.backward.forward, parallel);
  AttentionDoubleBackwardProblem own = s;
  own.backward.forward = forward.problem;
  AttentionDoubleBackward<T>(own, parallel).run();
  if (s.backward.needs_mask) attention_second_mask_gradient<T>(own, parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
