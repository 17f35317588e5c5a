// Attention forward, E1-E5. Keys and values are packed once per unit: a key head with the query
// heads that share it. Query rows go by in blocks of kBlockQ; a block takes the keys in steps of
// kStepKeys that stay in L2, and each step in tiles of kTileRows rows whose scores stay in L1.
// Memory is O(S).
#pragma once

#include "cpu/attention_few_queries.h"
#include "cpu/attention_softmax.h"
#include "cpu/attention_units.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kTileRows = 24;  // 24 x 272 fp32 scores: 26 KB

template <class T>
class AttentionForward {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kPanelKeys = kPanel<A>;
  // An odd number of cache lines: rows 1 KB apart would all fall into the same few sets of L1.
  static constexpr int64_t kStep = kStepKeys + 64 / static_cast<int64_t>(sizeof(A));
  static constexpr int64_t kPanelsPerStep = kStepKeys / kPanelKeys;

 public:
  AttentionForward(const AttentionProblem& problem, const Parallel& parallel)
      : p_(problem), parallel_(parallel), softmax_(problem) {}

  void run() {
    if (p_.batch == 0 || p_.heads_q == 0 || p_.seq_q == 0) return;
    clear_hidden_ = must_clear_hidden_keys<T>(p_, parallel_);
    if (!clear_hidden_ && AttentionFewQueries<T>::serves(p_)) {
      AttentionFewQueries<T>(p_, parallel_).run();
    } else {
      run_blocks();
    }
  }

  // However few the queries are.
  void run_blocks() {
    // Queries of one group of heads share packed keys, unless each head clears its own hidden keys.
    const int64_t sharing = p_.heads_q / p_.heads_k;
    const int64_t heads_per_unit = clear_hidden_ ? 1 : sharing;

    panels_ = ceil_div(p_.seq_k, kPanelKeys);
    dim_v_padded_ = round_up(p_.head_dim_v, kWidth<A>);
    dim_words_ = words<E>(p_.head_dim);
    key_words_ = words<E>(p_.seq_k);
    k_elements_ = round_up(panels_ * kPanelKeys * dim_words_, 16);
    v_panels_ = ceil_div(p_.head_dim_v, kPanelKeys);
    const int64_t unit_elements = k_elements_ + round_up(v_panels_ * kPanelKeys * key_words_, 16);
    QueryUnits<E>{p_, parallel_, heads_per_unit, unit_elements}.run(
        [&](int64_t batch, int64_t head, E* dst) { pack_unit(batch, head, dst); },
        [&](int64_t batch, int64_t head, int64_t i0, const E* packed) {
          query_block(batch, head, i0, packed);
        });
  }

 private:
  // Packed keys: K^T panels [panels][words(D)][kPanel], then V's columns as panels
  // [panels][words(Sk)][kPanel].
  void pack_unit(int64_t batch, int64_t head, E* dst) const {
    const int64_t head_k = head / (p_.heads_q / p_.heads_k);
    const Band band(p_, batch);
    E* staging = thread_scratch<E>(Scratch::kStaging, kPanelKeys * dim_words_);
    pack_key_panels(dst, key_rows<T>(p_, p_.k, batch, head_k), p_.k.row_stride, band.seq_k,
                    p_.head_dim, staging);
    E* v = dst + k_elements_;
    for (int64_t d = 0; d < p_.head_dim_v; d += kPanelKeys) {
      pack_depth_rows(v + d * key_words_, kPanelKeys, key_rows<T>(p_, p_.v, batch, head_k) + d,
                      p_.v.row_stride, band.seq_k, min64(kPanelKeys, p_.head_dim_v - d));
      clear_unseen_neighbours(band, v + d * key_words_, kPanelKeys, 0, band.seq_k);
    }
    if (!clear_hidden_) return;
    const HeadMask<T> mask = head_mask<T>(p_, batch, head);
    for (int64_t j = 0; j < p_.seq_k; ++j) {
      if (!key_is_hidden(band, mask, j)) continue;
      for (int64_t d = 0; d < v_panels_ * kPanelKeys; d += kPanelKeys)
        clear_depth_row(v + d * key_words_, kPanelKeys, j);
    }
  }

  void query_block(int64_t batch, int64_t head, int64_t i0, const E* packed) const {
    const Band band(p_, batch);
    const int64_t rows = min64(kBlockQ, band.seq_q - i0);
    if (rows <= 0) return;  // a shorter one of the packed sequences
    const int64_t q_elements = round_up(rows * dim_words_, 16);
    A* scratch = thread_scratch<A>(Scratch::kBlock, q_elements + kBlockQ * (dim_v_padded_ + 3) +
                                                        kTileRows * kStep + kStep + 64);
    E* q = reinterpret_cast<E*>(scratch);
    A* o = scratch + q_elements;         // [rows, Dv padded]
    A* m = o + kBlockQ * dim_v_padded_;  // [rows] running maximum
    A* l = m + kBlockQ;                  // [rows] running sum
    A* rescale = l + kBlockQ;            // [kTileRows] of the current step
    A* s = rescale + kBlockQ;            // [kTileRows, kStep]
    A* z = s + kTileRows * kStep;        // [kStep] dropout multipliers of one row
    pack_rows(q, dim_words_, query_rows<T>(p_, p_.q, batch, head) + i0 * p_.q.row_stride,
              p_.q.row_stride, rows, p_.head_dim);
    for (int64_t i = 0; i < rows; ++i) {
      m[i] = -kInf<A>;
      l[i] = A(0);
    }
    for (int64_t j = 0; j < rows * dim_v_padded_; ++j) o[j] = A(0);

    const ScoreTerms<T> terms(p_, batch, head);
    const int64_t last_panel = ceil_div(max64(0, band.end_key(i0 + rows - 1)), kPanelKeys);
    for (int64_t panel = band.first_key(i0) / kPanelKeys; panel < last_panel;) {
      // The next run of up to kPanelsPerStep panels that some row attends to.
      int64_t run = 0;
      while (run < kPanelsPerStep && panel + run < last_panel &&
             any_attends(terms.mask, i0, i0 + rows, (panel + run) * kPanelKeys,
                         min64((panel + run + 1) * kPanelKeys, band.seq_k))) {
        ++run;
      }
      if (run == 0) {
        ++panel;
        continue;
      }
      const int64_t j0 = panel * kPanelKeys, keys = min64(run * kPanelKeys, band.seq_k - j0);
      panel += run;

      for (int64_t tile = 0; tile < rows; tile += kTileRows) {
        const int64_t tile_rows = min64(kTileRows, rows - tile);
        const SoftmaxState<A> state{m + tile, l + tile, rescale};
        step(KeyStep<T>{batch, head, band, terms, j0, keys}, i0 + tile, tile_rows,
             q + tile * dim_words_, packed, s, z, state, o + tile * dim_v_padded_);
      }
    }
    softmax_.write(batch, head, i0, rows, o, dim_v_padded_, m, l);
  }

  // One online-softmax step of query rows [i, i + rows).
  void step(const KeyStep<T>& where, int64_t i, int64_t rows, const E* q, const E* packed, A* s,
            A* z, const SoftmaxState<A>& state, A* o) const {
    const int64_t j0 = where.j0;
    for (int64_t c = 0; c < where.keys; c += kPanelKeys) {  // E1
      for (int64_t strip = 0; strip < rows; strip += kRows) {
        const int strip_rows = static_cast<int>(min64(kRows, rows - strip));
        const int64_t seen = min64(kPanelKeys, where.to(i + strip + strip_rows - 1) - c);
        if (seen <= 0 || where.from(i + strip) >= c + kPanelKeys) continue;
        micro_kernel<Start::kZero>(strip_rows, static_cast<int>(ceil_div(seen, kWidth<A>)),
                                   dim_words_, Strided<E>{q + strip * dim_words_, dim_words_, 1},
                                   packed + (j0 + c) * dim_words_, kPanelKeys,
                                   s + strip * kStep + c, kStep);
      }
    }
    // Probabilities as operands, over the scores.
    const E* probs = reinterpret_cast<const E*>(s);
    for (int64_t strip = 0; strip < rows; strip += kRows) {
      const int64_t strip_rows = min64(kRows, rows - strip);
      const StripKeys seen = keys_of_strip<E>(where, i + strip, strip_rows);
      if (seen.from >= seen.to) continue;
      A* scores = s + strip * kStep;
      softmax_.rows(where, i + strip, strip_rows, seen.from, seen.to, scores, kStep,
                    state.m + strip, state.l + strip, state.rescale + strip, z);
      for (int64_t r = 0; r < strip_rows; ++r) {
        A* row = scores + r * kStep;
        round_row(reinterpret_cast<E*>(row), row, round_up(seen.to, kWidth<A>));
      }
    }
    for (int64_t d = 0; d < p_.head_dim_v; d += kPanelKeys) {  // E4
      const E* v = packed + k_elements_ + d * key_words_ + words<E>(j0) * kPanelKeys;
      const int vecs = static_cast<int>(ceil_div(min64(kPanelKeys, p_.head_dim_v - d), kWidth<A>));
      for (int64_t strip = 0; strip < rows; strip += kRows) {
        const int strip_rows = static_cast<int>(min64(kRows, rows - strip));
        const StripKeys seen = keys_of_strip<E>(where, i + strip, strip_rows);
        if (seen.from >= seen.to) continue;
        const int64_t first = seen.from / kDepth<E>;
        micro_kernel<Start::kScale>(
            strip_rows, vecs, words<E>(seen.to) - first,
            Strided<E>{probs + strip * kStep + first, kStep, 1}, v + first * kPanelKeys, kPanelKeys,
            o + strip * dim_v_padded_ + d, dim_v_padded_, state.rescale + strip);
      }
    }
  }

  const AttentionProblem& p_;
  const Parallel& parallel_;
  OnlineSoftmax<T> softmax_;
  bool clear_hidden_ = false;
  int64_t panels_ = 0, v_panels_ = 0, dim_v_padded_ = 0;
  int64_t dim_words_ = 0, key_words_ = 0, k_elements_ = 0;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
