// The derivative of the float mask's gradient: E of E14, reduced to the mask's own shape.
#pragma once

#include "cpu/attention_mask_gradient.h"
#include "cpu/attention_second_tiles.h"

namespace fastattn::cpu::FASTATTN_ISA {

// E of blocks; the sums of all rows are there.
template <class T>
struct SecondGradientTiles {
  using A = Acc<T>;
  using Problem = AttentionDoubleBackwardProblem;
  using Block = typename ScoreTile<T>::Block;
  const Problem& s;
  const AttentionProblem& p;
  ScoreOperands<T> operands;
  SecondTile<T> tile;
  SecondKeyRange<T> range;
  A* query_scratch;

  static int64_t elements(const Problem& s) {
    const AttentionProblem& p = s.backward.forward;
    return tile_elements(p) + range_elements(p) + SecondQueryRows<T>::elements(p, kBlockQ);
  }
  SecondGradientTiles(const Problem& problem, const Dropout& dropout, A* scratch)
      : s(problem),
        p(s.backward.forward),
        operands(p, s.tangents),
        tile(s, dropout, kBlockQ, scratch),
        range(p, operands, kBlockK, scratch + tile_elements(p)),
        query_scratch(scratch + tile_elements(p) + range_elements(p)) {}

  static const AttentionBackwardProblem& backward(const Problem& problem) {
    return problem.backward;
  }
  static AttentionTangents tangents(const Problem& problem) { return problem.tangents; }

  void keys(int64_t batch, int64_t head, int64_t j0, int64_t count, const HeadMask<T>* hidden) {
    range.pack(s, operands, batch, head / (p.heads_q / p.heads_k), j0, count, false, false, hidden);
  }

  template <class Take>
  void rows(const Block& block, const Take& take) const {
    const SecondQueryRows<T> q(s, operands, block.batch, block.head, block.i0, block.rows, false,
                               query_scratch);
    tile.first(block, TangentTerms<T>(p, s.tangents, block.batch, block.head), operands, q, 0,
               range, 0);
    const int64_t offset = lse_offset(p, block.batch, block.head) + block.i0;
    for (int64_t i = 0; i < block.rows; ++i) {
      q.mu[i] = static_cast<const A*>(s.t_lse)[offset + i];
      q.rest[i] = static_cast<const A*>(s.rest)[offset + i];
      q.beta[i] = static_cast<const A*>(s.beta)[offset + i];
    }
    tile.second_pass(block, q, 0, take);
  }

 private:
  static int64_t tile_elements(const AttentionProblem& p) {
    return round_up(SecondTile<T>::elements(p, true, kBlockQ), 16);
  }
  static int64_t range_elements(const AttentionProblem& p) {
    return round_up(SecondKeyRange<T>::elements(p, kBlockK), 16);
  }
};

template <class T>
void attention_second_mask_gradient(const AttentionDoubleBackwardProblem& s,
                                    const Parallel& parallel) {
  AttentionMaskGradient<T, SecondGradientTiles<T>>(s, parallel).run();
}

}  // namespace fastattn::cpu::FASTATTN_ISA
