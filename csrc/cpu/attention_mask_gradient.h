// Gradient of a float mask, E11, reduced to the mask's own shape, where the backward pass cannot
// give it (attention_backward.h), and its derivative. A task owns one tile of the gradient and
// walks every batch, head, row and key that the mask was broadcast to, in a fixed order: O(1)
// memory, no atomics, reproducible.
#pragma once

#include "cpu/attention_tiles.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kMaskRows =
    4 * kBlockQ;  // query rows of an owned tile: the packed keys serve four blocks

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
                 range.v_panels, q.lse, q.delta,
                 [&](int64_t r) { take(r, tile.dscores + r * tile.kStride); });
  }

 private:
  static int64_t range_elements(const Problem& b) {
    return round_up(KeyRange<T>::elements(b.forward, kBlockK), 16);
  }
};

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
    int64_t mask_batch = 1;
    for (int d = 0; d < p_.batch_dims; ++d) mask_batch *= b_.mask_batch_sizes[d];
    const int64_t row_tiles = b_.mask_rows == 1 ? 1 : ceil_div(b_.mask_rows, kMaskRows);
    const int64_t col_tiles = b_.mask_cols == 1 ? 1 : ceil_div(b_.mask_cols, kBlockK);
    parallel_tasks(parallel_, mask_batch * b_.mask_heads * row_tiles * col_tiles,
                   [&](int64_t task) {
                     const int64_t col = task % col_tiles, row = task / col_tiles % row_tiles;
                     const int64_t head = task / (col_tiles * row_tiles) % b_.mask_heads;
                     own_tile(task / (col_tiles * row_tiles * b_.mask_heads), head, row, col);
                   });
  }

 private:
  // The linear index into the mask's batch dimensions that `batch` reads.
  int64_t mask_batch_of(int64_t batch) const {
    int64_t index = 0, factor = 1;
    for (int d = p_.batch_dims - 1; d >= 0; --d) {
      if (b_.mask_batch_sizes[d] != 1) index += batch % p_.batch_sizes[d] * factor;
      factor *= b_.mask_batch_sizes[d];
      batch /= p_.batch_sizes[d];
    }
    return index;
  }

  void own_tile(int64_t mask_batch, int64_t mask_head, int64_t row_tile, int64_t col_tile) const {
    const bool per_row = b_.mask_rows != 1, per_col = b_.mask_cols != 1;
    const int64_t i_begin = per_row ? row_tile * kMaskRows : 0;
    const int64_t i_end = per_row ? min64(p_.seq_q, i_begin + kMaskRows) : p_.seq_q;
    const int64_t j_begin = per_col ? col_tile * kBlockK : 0;
    const int64_t j_end = per_col ? min64(p_.seq_k, j_begin + kBlockK) : p_.seq_k;
    const int64_t elements = round_up(Tiles::elements(problem_), 16);
    A* scratch = thread_scratch<A>(2, elements + kMaskRows * kBlockK);
    Tiles tiles(problem_, dropout_, scratch);
    A* sum = scratch + elements;  // [kMaskRows, kBlockK]
    for (int64_t e = 0; e < kMaskRows * kBlockK; ++e) sum[e] = A(0);

    for (int64_t batch = 0; batch < p_.batch; ++batch) {
      if (mask_batch_of(batch) != mask_batch) continue;
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
              A* row = sum + (per_row ? i0 - i_begin + r : 0) * kBlockK;
              if (per_col) {
                for (int64_t j = 0; j < count; ++j) row[j] += ds[j];
              } else {
                A total = A(0);
                for (int64_t j = 0; j < count; ++j) total += ds[j];
                row[0] += total;
              }
            });
          }
        }
      }
    }

    T* out = static_cast<T*>(b_.grad_mask);
    const int64_t rows = per_row ? i_end - i_begin : 1, cols = per_col ? j_end - j_begin : 1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row =
          (mask_batch * b_.mask_heads + mask_head) * b_.mask_rows + (per_row ? i_begin + r : 0);
      convert(out + row * b_.mask_cols + (per_col ? j_begin : 0), sum + r * kBlockK, cols);
    }
  }

  const typename Tiles::Problem& problem_;
  const AttentionBackwardProblem& b_;
  const AttentionProblem& p_;
  const Parallel& parallel_;
  Dropout dropout_;
  bool clear_hidden_ = false;
};

template <class T>
void attention_mask_gradient(const AttentionBackwardProblem& b, const Parallel& parallel) {
  AttentionMaskGradient<T, GradientTiles<T>>(b, parallel).run();
}

}  // namespace fastattn::cpu::FASTATTN_ISA
