// What the passes behind the forward one share: packed operands of one head, and tiles of P and dS
// recomputed from the forward's SoftmaxRows (E1, E6, E7).
#pragma once

#include "cpu/attention_common.h"
#include "cpu/softmax.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kBlockK = 192;  // a multiple of the panel width (<= 64) and of the strip height 6

// P and dS of kBlockQ x kBlockK scores, and what is needed to make them. Operands overwrite the
// scores in place: where operands are pairs, the words of rows 2r and 2r + 1 go into row 2r, and dS
// is also kept by its rows.
template <class T>
struct ScoreTile {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kPanelKeys = kPanel<A>;
  // An odd number of cache lines, so that the rows spread over all sets of L1.
  static constexpr int64_t kStride = kBlockK + 64 / static_cast<int64_t>(sizeof(A));

  const AttentionProblem& p;
  const Dropout& dropout;
  A* probs;              // [kBlockQ, kStride] Z * P
  A* dscores;            // [kBlockQ, kStride] dS, of the products unless `before_softcap` is false
  A* z;                  // [kBlockK]
  A* capped;             // [kBlockK] the softcap's tanh
  E* dscore_rows_store;  // [kBlockQ, kStride / 2], of pairs
  bool before_softcap = true;

  static int64_t elements() {
    return (kPaired<E> ? 5 : 4) * kBlockQ * kStride / 2 + 2 * (kBlockK + 64);
  }
  ScoreTile(const AttentionProblem& problem, const Dropout& drop, A* scratch)
      : p(problem),
        dropout(drop),
        probs(scratch),
        dscores(probs + kBlockQ * kStride),
        z(dscores + kBlockQ * kStride),
        capped(z + kBlockK + 64),
        dscore_rows_store(reinterpret_cast<E*>(capped + kBlockK + 64)) {}

  // Operands of dQ = dS K: rows from `strip` on, keys from `from` on, whole words.
  FASTATTN_INLINE Strided<E> dscore_rows(int64_t strip, int64_t from) const {
    if constexpr (kPaired<E>) {
      return {dscore_rows_store + strip * (kStride / 2) + from / 2, kStride / 2, 1};
    } else {
      return {dscores + strip * kStride + from, kStride, 1};
    }
  }
  // Operands of dK = dS^T Q and dV = P^T dO: keys from `strip` on, rows from `from` on.
  FASTATTN_INLINE Strided<E> transposed(const A* scores, int64_t strip, int64_t from) const {
    return {reinterpret_cast<const E*>(scores) + from * kStride + strip, 1, kDepth<E> * kStride};
  }

  // A block of scores: rows [i0, i0 + rows), keys [j0, j0 + keys) of one head.
  struct Block {
    int64_t batch, head;
    const Band& band;
    const ScoreTerms<T>& terms;
    int64_t i0, rows, j0, keys;

    // Row i of the block sees of its keys [from(i), to(i)), without regard to the mask.
    FASTATTN_INLINE int64_t from(int64_t i) const {
      return min64(keys, max64(0, band.first_key(i0 + i) - j0));
    }
    FASTATTN_INLINE int64_t to(int64_t i) const {
      return max64(0, min64(keys, band.end_key(i0 + i) - j0));
    }
    // Key j of the block is seen by its rows [first_row(j), end_row(j)).
    FASTATTN_INLINE int64_t first_row(int64_t j) const {
      return max64(0, band.first_query(j0 + j) - i0);
    }
    FASTATTN_INLINE int64_t end_row(int64_t j) const {
      return min64(rows, band.end_query(j0 + j) - i0);
    }
    bool empty() const {
      return from(0) >= to(rows - 1) ||
             !any_attends(terms.mask, i0, i0 + rows, j0 + from(0), j0 + to(rows - 1));
    }
  };

  // q [rows, q_stride], grad_out [rows, go_stride] and the panels are packed. take(r) sees row r of
  // dscores before it is made an operand.
  template <class Take>
  void compute(const Block& block, const E* q, int64_t q_stride, const E* grad_out,
               int64_t go_stride, const E* k_panels, const E* v_panels,
               const SoftmaxRows<A>& softmax, const A* delta, const Take& take) const {
    const int64_t dim_words = words<E>(p.head_dim), dim_v_words = words<E>(p.head_dim_v);
    for (int64_t strip = 0; strip < block.rows; strip += kRows) {
      const int strip_rows = static_cast<int>(min64(kRows, block.rows - strip));
      A* strip_probs = probs + strip * kStride;
      A* strip_dscores = dscores + strip * kStride;
      const int64_t from = block.from(strip), to = block.to(strip + strip_rows - 1);
      for (int64_t c = from / kPanelKeys * kPanelKeys; c < to; c += kPanelKeys) {
        const int vecs = static_cast<int>(ceil_div(min64(kPanelKeys, to - c), kWidth<A>));
        micro_kernel<Start::kZero>(strip_rows, vecs, dim_words,
                                   Strided<E>{q + strip * q_stride, q_stride, 1},  // E1
                                   k_panels + c * dim_words, kPanelKeys, strip_probs + c, kStride);
        micro_kernel<Start::kZero>(strip_rows, vecs, dim_v_words,
                                   Strided<E>{grad_out + strip * go_stride, go_stride, 1},  // E7
                                   v_panels + c * dim_v_words, kPanelKeys, strip_dscores + c,
                                   kStride);
      }
      for (int r = 0; r < strip_rows; ++r) {
        const int64_t i = strip + r;
        row(block, i, softmax[i], delta[i], strip_probs + r * kStride, strip_dscores + r * kStride);
        take(i);
      }
      if constexpr (kPaired<E>) make_operands(strip, strip_rows);
    }
  }

 private:
  void make_operands(int64_t strip, int rows) const {
    for (int64_t r = strip; r < strip + rows; r += 2) {
      A *low = dscores + r * kStride, *high = low + kStride, *p_low = probs + r * kStride;
      if (r + 1 == strip + rows) {
        for (int64_t j = 0; j < kBlockK; ++j) high[j] = p_low[kStride + j] = A(0);
      }
      round_row(dscore_rows_store + r * (kStride / 2), low, kBlockK);
      round_row(dscore_rows_store + (r + 1) * (kStride / 2), high, kBlockK);
      round_two_rows(reinterpret_cast<E*>(low), low, high, kBlockK);
      round_two_rows(reinterpret_cast<E*>(p_low), p_low, p_low + kStride, kBlockK);
    }
  }

  FASTATTN_INLINE void row(const Block& block, int64_t i, const SoftmaxRow<A>& softmax, A delta,
                           A* s, A* ds) const {
    const int64_t from = block.from(i);
    int64_t to = max64(from, block.to(i));
    if (softmax.sees_nothing()) to = from;  // nothing to attend to: every gradient is 0
    // Whole vectors around what the row sees.
    const int64_t begin = from / kWidth<A> * kWidth<A>, end = round_up(to, kWidth<A>);
    const bool with_softcap = before_softcap && p.softcap != 0;
    if (!ScoreTerms<T>::only_scale(p)) {
      block.terms.apply(s + begin, block.i0 + i, block.j0 + begin, to - begin,
                        with_softcap ? capped : nullptr);
    }
    row_weights(s + begin, end - begin, ScoreTerms<T>::factor(p), softmax);  // E6
    const Vec<A> shift = broadcast(delta);
    if (dropout.active) {
      dropout.fill(z, block.batch, block.head, block.i0 + i, block.j0 + begin, end - begin);
      for (int64_t j = begin; j < end; j += kWidth<A>) {  // E7
        const Vec<A> prob = load(s + j), keep = load(z + j - begin);
        store(ds + j, prob * (keep * load(ds + j) - shift));
        store(s + j, prob * keep);
      }
    } else {
      for (int64_t j = begin; j < end; j += kWidth<A>)
        store(ds + j, load(s + j) * (load(ds + j) - shift));  // E7
    }
    for (int64_t j = begin; with_softcap && j < end; j += kWidth<A>) {
      const Vec<A> t = load(capped + j - begin);
      store(ds + j, load(ds + j) * (broadcast(A(1)) - t * t));
    }
    for (int64_t j = 0; j < from; ++j) s[j] = ds[j] = A(0);
    for (int64_t j = to; j < kBlockK; ++j) s[j] = ds[j] = A(0);
  }
};

// dst [rows, cols] = factor * src, which changes.
template <class T>
void write_rows(T* dst, int64_t dst_stride, Acc<T>* src, int64_t src_stride, int64_t rows,
                int64_t cols, Acc<T> factor) {
  for (int64_t i = 0; i < rows; ++i) {
    Acc<T>* row = src + i * src_stride;
    for (int64_t d = 0; d < cols; ++d) row[d] *= factor;
    convert(dst + i * dst_stride, row, cols);
  }
}

// Query rows [first, first + count) of one head as operands, and what is known of each. Rows with
// nothing to attend to are cleared, so that a NaN in them reaches nobody.
template <class T>
struct QueryRows {
  using A = Acc<T>;
  using E = Operand<T>;
  int64_t dim_padded, dim_v_padded;
  int64_t q_stride, grad_out_stride;
  E *q, *grad_out;              // [count, stride]: depth runs along the head dimension
  E *q_depth, *grad_out_depth;  // [words(count), D or Dv padded]: depth runs along the rows
  A* delta;
  SoftmaxRows<A> softmax;

  static int64_t elements(const AttentionProblem& p, int64_t count) {
    const int64_t padded = round_up(p.head_dim, kWidth<A>) + round_up(p.head_dim_v, kWidth<A>);
    return (kPaired<E> ? 2 : 1) * (count + 1) * padded + count;
  }

  QueryRows(const AttentionBackwardProblem& b, int64_t batch, int64_t head, int64_t first,
            int64_t count, A* scratch)
      : softmax(b.forward, batch, head, first) {
    const AttentionProblem& p = b.forward;
    dim_padded = round_up(p.head_dim, kWidth<A>);
    dim_v_padded = round_up(p.head_dim_v, kWidth<A>);
    q = reinterpret_cast<E*>(scratch);
    grad_out = q + count * dim_padded;
    A* end = scratch + count * (dim_padded + dim_v_padded);
    if constexpr (kPaired<E>) {
      q_stride = words<E>(p.head_dim);
      grad_out_stride = words<E>(p.head_dim_v);
      q_depth = reinterpret_cast<E*>(end);
      grad_out_depth = q_depth + words<E>(count) * dim_padded;
      end += words<E>(count) * (dim_padded + dim_v_padded);
    } else {
      q_stride = dim_padded;
      grad_out_stride = dim_v_padded;
      q_depth = q;
      grad_out_depth = grad_out;
    }
    delta = end;
    const int64_t offset = lse_offset(p, batch, head) + first;
    const A* grad_lse =
        b.grad_lse == nullptr ? nullptr : static_cast<const A*>(b.grad_lse) + offset;
    const T* q_src = query_rows<T>(p, p.q, batch, head) + first * p.q.row_stride;
    const T* go_src = query_rows<T>(p, b.grad_out, batch, head) + first * b.grad_out.row_stride;
    const T* out = query_rows<T>(p, p.out, batch, head) + first * p.out.row_stride;
    pack_rows(q, q_stride, q_src, p.q.row_stride, count, p.head_dim);
    pack_rows(grad_out, grad_out_stride, go_src, b.grad_out.row_stride, count, p.head_dim_v);
    if constexpr (kPaired<E>) {
      pack_depth_rows(q_depth, dim_padded, q_src, p.q.row_stride, count, p.head_dim);
      pack_depth_rows(grad_out_depth, dim_v_padded, go_src, b.grad_out.row_stride, count,
                      p.head_dim_v);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (softmax[i].sees_nothing()) {
        for (int64_t d = 0; d < q_stride; ++d) q[i * q_stride + d] = E{};
        for (int64_t d = 0; d < grad_out_stride; ++d) grad_out[i * grad_out_stride + d] = E{};
        if constexpr (kPaired<E>) {
          clear_depth_row(q_depth, dim_padded, i);
          clear_depth_row(grad_out_depth, dim_v_padded, i);
        }
        delta[i] = A(0);
        continue;
      }
      delta[i] = row_dot(go_src + i * b.grad_out.row_stride, out + i * p.out.row_stride,
                         p.head_dim_v) -  // E6
                 (grad_lse == nullptr ? A(0) : grad_lse[i]);
    }
  }
};

// Keys [first, first + count) of one head: panels for S and dP, rows for dQ.
template <class T>
struct KeyRange {
  using A = Acc<T>;
  using E = Operand<T>;
  int64_t dim_padded, dim_words, dim_v_words;
  E* k_panels;  // [panels][words(D)][kPanel]
  E* v_panels;  // [panels][words(Dv)][kPanel]
  E* k_rows;    // [words(count), D padded]: depth runs along the keys

  static int64_t elements(const AttentionProblem& p, int64_t count) {
    const int64_t padded = round_up(count, kPanel<A>);
    return padded * (p.head_dim + p.head_dim_v + 2 + round_up(p.head_dim, kWidth<A>));
  }

  KeyRange(const AttentionProblem& p, int64_t count, A* scratch) {
    const int64_t padded = round_up(count, kPanel<A>);
    dim_padded = round_up(p.head_dim, kWidth<A>);
    dim_words = words<E>(p.head_dim);
    dim_v_words = words<E>(p.head_dim_v);
    k_panels = reinterpret_cast<E*>(scratch);
    v_panels = k_panels + padded * dim_words;
    k_rows = v_panels + padded * dim_v_words;
  }

  // `hidden_from`: clear the keys that this mask hides from every query.
  void pack(const AttentionProblem& p, int64_t batch, int64_t head_k, int64_t first, int64_t count,
            const HeadMask<T>* hidden_from) {
    E* staging = thread_scratch<E>(Scratch::kStaging, kPanel<A> * max64(dim_words, dim_v_words));
    const T* k = key_rows<T>(p, p.k, batch, head_k) + first * p.k.row_stride;
    const T* v = key_rows<T>(p, p.v, batch, head_k) + first * p.v.row_stride;
    const Band band(p, batch);
    pack_key_panels(k_panels, k, p.k.row_stride, count, p.head_dim, staging);
    pack_key_panels(v_panels, v, p.v.row_stride, count, p.head_dim_v, staging);
    pack_depth_rows(k_rows, dim_padded, k, p.k.row_stride, count, p.head_dim);
    clear_unseen_neighbours(band, k_rows, dim_padded, first, count);
    if (hidden_from == nullptr) return;
    for (int64_t j = 0; j < count; ++j) {
      if (!key_is_hidden(band, *hidden_from, first + j)) continue;
      const int64_t panel = j / kPanel<A> * kPanel<A>, lane = j % kPanel<A>;
      for (int64_t d = 0; d < dim_words; ++d)
        k_panels[panel * dim_words + d * kPanel<A> + lane] = E{};
      for (int64_t d = 0; d < dim_v_words; ++d)
        v_panels[panel * dim_v_words + d * kPanel<A> + lane] = E{};
      clear_depth_row(k_rows, dim_padded, j);
    }
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
