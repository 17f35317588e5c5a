// Gradient of a float mask, E11, reduced to the mask's own shape, where the backward pass cannot
// give it (attention_backward.h), and its derivative. A task owns one tile of the gradient and
// walks every batch, head, row and key that the mask was broadcast to, in a fixed order: O(1)
// memory, no atomics, reproducible. What was broadcast over rows or heads is summed in double:
// there may be millions of terms.
#pragma once

#include "cpu/attention_tiles.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Query rows of an owned tile: the packed keys serve four blocks of them.
constexpr int64_t kMaskRows = 4 * kBlockQ;

// dS of blocks whose keys are packed a range at a time.
template <class T>
struct GradientTiles {
  using A = Acc<T>;
  using Problem = AttentionBackwardProblem;
  using Block = typename ScoreTile<T>::Block;
  const Problem& b;
  ScoreTile<T> tile;
  KeyRange<T> range;
  A* query_scratch;

  static int64_t elements(const Problem& b) {
    return ScoreTile<T>::elements() + range_elements(b) +
           QueryRows<T>::elements(b.forward, kBlockQ);
  }
  GradientTiles(const Problem& problem, const Dropout& dropout, A* scratch)
      : b(problem),
        tile(b.forward, dropout, scratch),
        range(b.forward, kBlockK, scratch + ScoreTile<T>::elements()),
        query_scratch(scratch + ScoreTile<T>::elements() + range_elements(b)) {
    tile.before_softcap = false;  // the mask is added behind it
  }

  static const AttentionBackwardProblem& backward(const Problem& problem) { return problem; }
  static AttentionTangents tangents(const Problem&) { return {}; }

  void keys(int64_t batch, int64_t head, int64_t j0, int64_t count, const HeadMask<T>* hidden) {
    const AttentionProblem& p = b.forward;
    range.pack(p, batch, head / (p.heads_q / p.heads_k), j0, count, hidden);
  }

  // take(r, ds) sees every row of the block.
  template <class Take>
  void rows(const Block& block, const Take& take) const {
    const QueryRows<T> q(b, block.batch, block.head, block.i0, block.rows, query_scratch);
    tile.compute(block, q.q, q.q_stride, q.grad_out, q.grad_out_stride, range.k_panels,
                 range.v_panels, q.softmax, q.delta,
                 [&](int64_t r) { take(r, tile.dscores + r * tile.kStride); });
  }

 private:
  static int64_t range_elements(const Problem& b) {
    return round_up(KeyRange<T>::elements(b.forward, kBlockK), 16);
  }
};

// The linear index into the mask's batch dimensions that `batch` reads.
inline int64_t mask_batch_of(const AttentionBackwardProblem& b, int64_t batch) {
  const AttentionProblem& p = b.forward;
  int64_t index = 0, factor = 1;
  for (int d = p.batch_dims - 1; d >= 0; --d) {
    if (b.mask_batch_sizes[d] != 1) index += batch % p.batch_sizes[d] * factor;
    factor *= b.mask_batch_sizes[d];
    batch /= p.batch_sizes[d];
  }
  return index;
}
inline int64_t mask_batches(const AttentionBackwardProblem& b) {
  int64_t batches = 1;
  for (int d = 0; d < b.forward.batch_dims; ++d) batches *= b.mask_batch_sizes[d];
  return batches;
}

template <class T, class Tiles>
class AttentionMaskGradient {
  using A = Acc<T>;

 public:
  AttentionMaskGradient(const typename Tiles::Problem& problem, const Parallel& parallel)
      : problem_(problem),
        b_(Tiles::backward(problem)),
        p_(b_.forward),
        parallel_(parallel),
        dropout_(p_) {}

  void run() {
    clear_hidden_ =
        p_.seq_k > 0 && must_clear_hidden_keys<T>(p_, parallel_, Tiles::tangents(problem_));
    // The backward pass sums over the batch alone, in its own precision; both give the same bits.
    const bool over_batch_alone =
        b_.mask_heads == p_.heads_q && b_.mask_rows == p_.seq_q && b_.mask_cols == p_.seq_k;
    const int64_t row_tiles = b_.mask_rows == 1 ? 1 : ceil_div(b_.mask_rows, kMaskRows);
    const int64_t col_tiles = b_.mask_cols == 1 ? 1 : ceil_div(b_.mask_cols, kBlockK);
    parallel_tasks(parallel_, mask_batches(b_) * b_.mask_heads * row_tiles * col_tiles,
                   [&](int64_t task) {
                     const int64_t col = task % col_tiles, row = task / col_tiles % row_tiles;
                     const int64_t head = task / (col_tiles * row_tiles) % b_.mask_heads;
                     const int64_t batch = task / (col_tiles * row_tiles * b_.mask_heads);
                     if (over_batch_alone) {
                       own_tile<A>(batch, head, row, col);
                     } else {
                       own_tile<double>(batch, head, row, col);
                     }
                   });
  }

 private:
  template <class Sum>
  void own_tile(int64_t mask_batch, int64_t mask_head, int64_t row_tile, int64_t col_tile) const {
    const bool per_row = b_.mask_rows != 1, per_col = b_.mask_cols != 1;
    const int64_t i_begin = per_row ? row_tile * kMaskRows : 0;
    const int64_t i_end = per_row ? min64(p_.seq_q, i_begin + kMaskRows) : p_.seq_q;
    const int64_t j_begin = per_col ? col_tile * kBlockK : 0;
    const int64_t j_end = per_col ? min64(p_.seq_k, j_begin + kBlockK) : p_.seq_k;
    const int64_t elements = round_up(Tiles::elements(problem_), 16);
    const int64_t sum_rows = per_row ? i_end - i_begin : 1;
    const int64_t sum_elements = sum_rows * kBlockK * static_cast<int64_t>(sizeof(Sum) / sizeof(A));
    A* scratch = thread_scratch<A>(Scratch::kBlock, elements + sum_elements + kBlockK);
    Tiles tiles(problem_, dropout_, scratch);
    Sum* sum = reinterpret_cast<Sum*>(scratch + elements);  // [sum_rows, kBlockK]
    A* rounded = scratch + elements + sum_elements;         // [kBlockK]
    for (int64_t e = 0; e < sum_rows * kBlockK; ++e) sum[e] = Sum(0);

    for (int64_t batch = 0; batch < p_.batch; ++batch) {
      if (mask_batch_of(b_, batch) != mask_batch) continue;
      const Band band(p_, batch);
      const int64_t head_begin = b_.mask_heads == 1 ? 0 : mask_head;
      const int64_t head_end = b_.mask_heads == 1 ? p_.heads_q : mask_head + 1;
      for (int64_t head = head_begin; head < head_end; ++head) {
        const ScoreTerms<T> terms(p_, batch, head);
        for (int64_t j0 = j_begin; j0 < j_end; j0 += kBlockK) {
          const int64_t count = min64(kBlockK, j_end - j0);
          tiles.keys(batch, head, j0, count, clear_hidden_ ? &terms.mask : nullptr);
          for (int64_t i0 = i_begin; i0 < i_end; i0 += kBlockQ) {
            const int64_t rows = min64(kBlockQ, i_end - i0);
            const typename ScoreTile<T>::Block block{batch, head, band, terms, i0, rows, j0, count};
            if (block.empty()) continue;
            tiles.rows(block, [&](int64_t r, const A* ds) {  // E11
              Sum* row = sum + (per_row ? i0 - i_begin + r : 0) * kBlockK;
              if (per_col) {
                for (int64_t j = 0; j < count; ++j) row[j] += ds[j];
              } else {
                Sum total = Sum(0);
                for (int64_t j = 0; j < count; ++j) total += ds[j];
                row[0] += total;
              }
            });
          }
        }
      }
    }

    T* out = static_cast<T*>(b_.grad_mask);
    const int64_t cols = per_col ? j_end - j_begin : 1;
    for (int64_t r = 0; r < sum_rows; ++r) {
      const int64_t row =
          (mask_batch * b_.mask_heads + mask_head) * b_.mask_rows + (per_row ? i_begin + r : 0);
      for (int64_t j = 0; j < cols; ++j) rounded[j] = static_cast<A>(sum[r * kBlockK + j]);
      convert(out + row * b_.mask_cols + (per_col ? j_begin : 0), rounded, cols);
    }
  }

  const typename Tiles::Problem& problem_;
  const AttentionBackwardProblem& b_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  Dropout dropout_;
  bool clear_hidden_ = false;
};

// The same of a mask with one column for all keys. It moves every score of a row alike, which
// nothing but the LSE notices: the row's dS, whose sum is that of P (dP - dO . out) + P dLSE, add
// up to dLSE. A NaN or an infinity of the row is a NaN here too.
template <class T>
void attention_column_gradient(const AttentionBackwardProblem& b, const Parallel& parallel) {
  using A = Acc<T>;
  const AttentionProblem& p = b.forward;
  parallel_tasks(parallel, mask_batches(b) * b.mask_heads, [&](int64_t task) {
    const int64_t mask_batch = task / b.mask_heads, mask_head = task % b.mask_heads;
    const int64_t head_begin = b.mask_heads == 1 ? 0 : mask_head;
    const int64_t head_end = b.mask_heads == 1 ? p.heads_q : mask_head + 1;
    double* sum = thread_scratch<double>(Scratch::kBlock, b.mask_rows);
    for (int64_t i = 0; i < b.mask_rows; ++i) sum[i] = 0;
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      if (mask_batch_of(b, batch) != mask_batch) continue;
      const int64_t rows = Band(p, batch).seq_q;
      for (int64_t head = head_begin; head < head_end; ++head) {
        const T* grad_out = query_rows<T>(p, b.grad_out, batch, head);
        const T* out = query_rows<T>(p, p.out, batch, head);
        const int64_t offset = lse_offset(p, batch, head);
        const SoftmaxRows<A> softmax(p, batch, head, 0);
        const A* grad_lse =
            b.grad_lse == nullptr ? nullptr : static_cast<const A*>(b.grad_lse) + offset;
        for (int64_t i = 0; i < rows; ++i) {
          if (softmax[i].sees_nothing()) continue;  // nothing to attend to
          const A delta = row_dot(grad_out + i * b.grad_out.row_stride, out + i * p.out.row_stride,
                                  p.head_dim_v);
          sum[b.mask_rows == 1 ? 0 : i] +=
              (grad_lse == nullptr ? A(0) : grad_lse[i]) + A(0) * (delta + softmax[i].max);
        }
      }
    }
    T* dst = static_cast<T*>(b.grad_mask) + task * b.mask_rows;
    for (int64_t i = 0; i < b.mask_rows; ++i) dst[i] = from_acc<T>(static_cast<A>(sum[i]));
  });
}

template <class T>
void attention_mask_gradient(const AttentionBackwardProblem& b, const Parallel& parallel) {
  if (b.mask_cols == 1) return attention_column_gradient<T>(b, parallel);
  AttentionMaskGradient<T, GradientTiles<T>>(b, parallel).run();
}

}  // namespace fastattn::cpu::FASTATTN_ISA
