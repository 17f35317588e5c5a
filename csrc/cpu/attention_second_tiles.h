// Tiles of forward mode and of the second derivative, E12-E14. A first pass leaves P, A, G - dO.O
// and H of a block of scores and what its rows add to their sums; once those are known, a second
// one turns them in place into
//   Z P, Z P (A - mu), dS and E.
// Large scores have large A, and A G is the larger the more weight its key has. The sums are thus
//   mu = sum(P A),  rest = sum(P (G - dO.O)),  beta = sum(P (A (G - dO.O) + H)) - mu rest:
// G - dO.O is small where P is 1, and `rest` is what the rounding of O leaves of Delta.
#pragma once

#include "cpu/attention_tangents.h"
#include "cpu/attention_tiles.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Query rows [first, first + count) of one head as operands, and what is known of each. Rows with
// nothing to attend to are cleared, so that a NaN in them reaches nobody.
template <class T>
struct SecondQueryRows {
  using A = Acc<T>;
  using E = Operand<T>;
  int64_t dim_padded, dim_v_padded, grad_out_stride;
  E *q, *grad_out;                          // [count, q_words], [count, grad_out_stride]
  E *q_depth, *t_q_depth, *grad_out_depth;  // [words(count), padded]: depth runs along the rows
  A *out_product, *grad_lse;                // [count]; out_product: rowsum(dO * O)
  A *mu, *rest, *beta;                      // [count]; `finish` completes them
  SoftmaxRows<A> softmax;

  static int64_t elements(const AttentionProblem& p, int64_t count) {
    const int64_t dim = round_up(p.head_dim, kWidth<A>), dim_v = round_up(p.head_dim_v, kWidth<A>);
    return (count + 1) * (4 * dim + 2 * dim_v) + 5 * count;
  }

  // of_keys: the products of keys are wanted, in which depth runs along the rows.
  SecondQueryRows(const AttentionDoubleBackwardProblem& s, const ScoreOperands<T>& operands,
                  int64_t batch, int64_t head, int64_t first, int64_t count, bool of_keys,
                  A* scratch)
      : softmax(s.backward.forward, batch, head, first) {
    const AttentionBackwardProblem& b = s.backward;
    const AttentionProblem& p = b.forward;
    dim_padded = round_up(p.head_dim, kWidth<A>);
    dim_v_padded = round_up(p.head_dim_v, kWidth<A>);
    grad_out_stride = words<E>(p.head_dim_v);
    const int64_t depth = words<E>(count);
    q = reinterpret_cast<E*>(scratch);
    grad_out = q + count * operands.q_words;
    q_depth = grad_out + count * grad_out_stride;
    t_q_depth = q_depth + depth * dim_padded;
    grad_out_depth = t_q_depth + depth * dim_padded;
    out_product = reinterpret_cast<A*>(grad_out_depth + depth * dim_v_padded);
    grad_lse = out_product + count;
    mu = grad_lse + count;
    rest = mu + count;
    beta = rest + count;

    const int64_t offset = lse_offset(p, batch, head) + first;
    const auto rows = [&](const TensorView& x) {
      return query_rows<T>(p, x, batch, head) + first * x.row_stride;
    };
    const bool of_scores = s.needs_gradient_of_scores();
    const bool t_q_of_keys = of_keys && b.needs_k && operands.t_q;
    const T* go = of_scores || b.needs_v ? rows(b.grad_out) : nullptr;
    const T* out = of_scores ? rows(p.out) : nullptr;
    operands.pack_queries(q, p, s.tangents, batch, head, first, count);
    if (of_scores) {
      pack_rows(grad_out, grad_out_stride, go, b.grad_out.row_stride, count, p.head_dim_v);
    }
    const auto depth_rows = [&](E* to, int64_t padded, const T* from, int64_t stride, int64_t dim) {
      pack_depth_rows(to, padded, from, stride, count, dim);
    };
    if (of_keys && b.needs_k)
      depth_rows(q_depth, dim_padded, rows(p.q), p.q.row_stride, p.head_dim);
    if (t_q_of_keys) {
      depth_rows(t_q_depth, dim_padded, rows(s.tangents.q), s.tangents.q.row_stride, p.head_dim);
    }
    if (of_keys && b.needs_v) {
      depth_rows(grad_out_depth, dim_v_padded, go, b.grad_out.row_stride, p.head_dim_v);
    }
    for (int64_t i = 0; i < count; ++i) {
      mu[i] = rest[i] = beta[i] = out_product[i] = grad_lse[i] = A(0);
      if (!softmax[i].sees_nothing()) {
        if (!of_scores) continue;
        out_product[i] =
            row_dot(go + i * b.grad_out.row_stride, out + i * p.out.row_stride, p.head_dim_v);
        if (b.grad_lse) grad_lse[i] = static_cast<const A*>(b.grad_lse)[offset + i];
        continue;
      }
      for (int64_t d = 0; d < operands.q_words; ++d) q[i * operands.q_words + d] = E{};
      if (of_scores) {
        for (int64_t d = 0; d < grad_out_stride; ++d) grad_out[i * grad_out_stride + d] = E{};
      }
      if (of_keys && b.needs_k) clear_depth_row(q_depth, dim_padded, i);
      if (t_q_of_keys) clear_depth_row(t_q_depth, dim_padded, i);
      if (of_keys && b.needs_v) clear_depth_row(grad_out_depth, dim_v_padded, i);
    }
  }

  // Of the sums over all keys: Delta but for dO.O, and beta.
  void finish(int64_t i) const {
    beta[i] -= mu[i] * rest[i];
    rest[i] -= grad_lse[i];  // E6
  }
};

// Keys [first, first + count) of one head with their tangents.
template <class T>
struct SecondKeyRange {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kPanelKeys = kPanel<A>;
  int64_t dim_padded, dim_v_padded, dim_v_words, padded, count = 0;
  E* score_panels;           // [panels][k_words][kPanel]
  E *v_panels, *t_v_panels;  // [panels][words(Dv)][kPanel]
  E *k_rows, *t_k_rows;      // [words(count), D padded]: depth runs along the keys
  E *v_rows, *t_v_rows;      // [words(count), Dv padded]

  static int64_t elements(const AttentionProblem& p, int64_t most) {
    const int64_t keys = round_up(most, kPanelKeys);
    return keys * 4 * (round_up(p.head_dim, kWidth<A>) + round_up(p.head_dim_v, kWidth<A>));
  }

  SecondKeyRange(const AttentionProblem& p, const ScoreOperands<T>& operands, int64_t most,
                 A* scratch)
      : dim_padded(round_up(p.head_dim, kWidth<A>)),
        dim_v_padded(round_up(p.head_dim_v, kWidth<A>)),
        dim_v_words(words<E>(p.head_dim_v)),
        padded(round_up(most, kPanelKeys)) {
    score_panels = reinterpret_cast<E*>(scratch);
    v_panels = score_panels + padded * operands.k_words;
    t_v_panels = v_panels + padded * dim_v_words;
    k_rows = t_v_panels + padded * dim_v_words;
    t_k_rows = k_rows + words<E>(padded) * dim_padded;
    v_rows = t_k_rows + words<E>(padded) * dim_padded;
    t_v_rows = v_rows + words<E>(padded) * dim_v_padded;
  }

  // `hidden_from`: clear the keys that this mask hides from every query. rows_k, rows_v: k_rows and
  // v_rows are wanted.
  void pack(const AttentionDoubleBackwardProblem& s, const ScoreOperands<T>& operands,
            int64_t batch, int64_t head_k, int64_t first, int64_t keys, bool rows_k, bool rows_v,
            const HeadMask<T>* hidden_from) {
    const AttentionProblem& p = s.backward.forward;
    const AttentionTangents& t = s.tangents;
    const Band band(p, batch);
    count = keys;
    operands.pack_keys(score_panels, p, t, batch, head_k, first, keys);
    const bool panels_v = s.needs_gradient_of_scores();
    E* staging = thread_scratch<E>(Scratch::kStaging, kPanelKeys * dim_v_words);
    const auto values = [&](E* panels, E* rows, const TensorView& x) {
      if (x.data == nullptr) return;
      const T* src = key_rows<T>(p, x, batch, head_k) + first * x.row_stride;
      if (panels_v) pack_key_panels(panels, src, x.row_stride, keys, p.head_dim_v, staging);
      if (!rows_v) return;
      pack_depth_rows(rows, dim_v_padded, src, x.row_stride, keys, p.head_dim_v);
      clear_unseen_neighbours(band, rows, dim_v_padded, first, keys);
    };
    const auto key = [&](E* rows, const TensorView& x) {
      if (x.data == nullptr || !rows_k) return;
      const T* src = key_rows<T>(p, x, batch, head_k) + first * x.row_stride;
      pack_depth_rows(rows, dim_padded, src, x.row_stride, keys, p.head_dim);
      clear_unseen_neighbours(band, rows, dim_padded, first, keys);
    };
    values(v_panels, v_rows, p.v);
    values(t_v_panels, t_v_rows, t.v);
    key(k_rows, p.k);
    key(t_k_rows, t.k);
    if (hidden_from == nullptr) return;
    for (int64_t j = 0; j < keys; ++j) {
      if (!key_is_hidden(band, *hidden_from, first + j)) continue;
      const int64_t panel = j / kPanelKeys * kPanelKeys, lane = j % kPanelKeys;
      const auto clear = [&](E* panels, int64_t depth) {
        for (int64_t d = 0; d < depth; ++d) panels[panel * depth + d * kPanelKeys + lane] = E{};
      };
      clear(score_panels, operands.k_words);
      if (panels_v) clear(v_panels, dim_v_words);
      if (panels_v && t.v.data) clear(t_v_panels, dim_v_words);
      if (rows_k) clear_depth_row(k_rows, dim_padded, j);
      if (rows_k && t.k.data) clear_depth_row(t_k_rows, dim_padded, j);
      if (rows_v) clear_depth_row(v_rows, dim_v_padded, j);
      if (rows_v && t.v.data) clear_depth_row(t_v_rows, dim_v_padded, j);
    }
  }
};

// The arrays of one block of scores, kBlockQ x kBlockK; a row's pass over them.
template <class T>
struct SecondTile {
  using A = Acc<T>;
  using E = Operand<T>;
  using Block = typename ScoreTile<T>::Block;
  static constexpr int64_t kPanelKeys = kPanel<A>;
  static constexpr int64_t kStride = ScoreTile<T>::kStride;

  const AttentionProblem& p;
  const Dropout& dropout;
  bool with_values;     // there are tangents of values
  bool with_gradient;   // G, H, dS and E are wanted
  A *probs, *tangents;  // [rows, kStride] P, then Z P; A, then Z P (A - mu)
  A *dscores, *second;  // with_gradient: [rows, kStride] G - dO.O, then dS; H, then E
  A *capped, *before;   // [rows, kStride] with a softcap: its tanh, and the tangent before it
  A* keep;              // [rows, kStride] with dropout: Z

  static int64_t elements(const AttentionProblem& p, bool gradient, int64_t rows) {
    const int64_t arrays =
        (gradient ? 4 : 2) + (p.softcap != 0 ? 2 : 0) + (p.dropout_p > 0 ? 1 : 0);
    return rows * kStride * arrays + 64;
  }

  SecondTile(const AttentionDoubleBackwardProblem& s, const Dropout& drop, int64_t rows, A* scratch)
      : p(s.backward.forward),
        dropout(drop),
        with_values(s.tangents.v.data != nullptr),
        with_gradient(s.needs_gradient_of_scores()) {
    const int64_t size = rows * kStride;
    probs = scratch;
    tangents = probs + size;
    dscores = tangents + size;
    second = dscores + size;
    A* end = with_gradient ? second + size : dscores;
    capped = before = keep = nullptr;
    if (p.softcap != 0) {
      capped = end;
      before = capped + size;
      end = before + size;
    }
    if (dropout.active) keep = end;
  }

  // The block's products with keys.first = block.j0 - offset, and their first pass.
  void first(const Block& block, const TangentTerms<T>& terms, const ScoreOperands<T>& operands,
             const SecondQueryRows<T>& q, int64_t row0, const SecondKeyRange<T>& keys,
             int64_t key0) const {
    for (int64_t strip = 0; strip < block.rows; strip += kRows) {
      const int strip_rows = static_cast<int>(min64(kRows, block.rows - strip));
      const int64_t from = block.from(strip), to = block.to(strip + strip_rows - 1);
      const E* go = q.grad_out + (row0 + strip) * q.grad_out_stride;
      for (int64_t c = from / kPanelKeys * kPanelKeys; c < to; c += kPanelKeys) {
        const int vecs = static_cast<int>(ceil_div(min64(kPanelKeys, to - c), kWidth<A>));
        const int64_t at = strip * kStride + c;
        operands.multiply(strip_rows, vecs, q.q + (row0 + strip) * operands.q_words,
                          keys.score_panels + (key0 + c) * operands.k_words, probs + at,
                          tangents + at, kStride);
        if (!with_gradient) continue;
        const auto values = [&](const E* panels, A* c_tile) {
          micro_kernel<Start::kZero>(
              strip_rows, vecs, keys.dim_v_words, Strided<E>{go, q.grad_out_stride, 1},
              panels + (key0 + c) * keys.dim_v_words, kPanelKeys, c_tile + at, kStride);
        };
        values(keys.v_panels, dscores);
        if (with_values) values(keys.t_v_panels, second);
      }
      for (int r = 0; r < strip_rows; ++r) {
        const int64_t i = strip + r;
        first_row(block, terms, i, q, row0 + i);
      }
    }
  }

  // take(i, e) sees row i of E before it is made an operand.
  template <class Take>
  void second_pass(const Block& block, const SecondQueryRows<T>& q, int64_t row0,
                   const Take& take) const {
    for (int64_t i = 0; i < block.rows; ++i) {
      second_row(i, q.rest[row0 + i], q.mu[row0 + i], q.beta[row0 + i], take);
    }
  }

 private:
  void first_row(const Block& block, const TangentTerms<T>& terms, int64_t i,
                 const SecondQueryRows<T>& q, int64_t row) const {
    const SoftmaxRow<A> softmax = q.softmax[row];
    A *s = probs + i * kStride, *a = tangents + i * kStride;
    A *g = dscores + i * kStride, *h = second + i * kStride;
    const int64_t from = block.from(i);
    int64_t to = max64(from, block.to(i));
    if (softmax.sees_nothing()) to = from;  // nothing to attend to: every gradient is 0
    const int64_t begin = from / kWidth<A> * kWidth<A>, end = round_up(to, kWidth<A>);
    const int64_t offset = i * kStride + begin;
    terms.apply(s + begin, a + begin, block.i0 + i, block.j0 + begin, to - begin, softmax,
                capped == nullptr ? nullptr : capped + offset,
                before == nullptr ? nullptr : before + offset);
    if (keep != nullptr) {
      A* z = keep + offset;
      dropout.fill(z, block.batch, block.head, block.i0 + i, block.j0 + begin, end - begin);
      for (int64_t j = 0; j < begin; ++j) keep[i * kStride + j] = A(0);
      for (int64_t j = end; j < kBlockK; ++j) keep[i * kStride + j] = A(0);
      if (with_gradient) row_multiply(g + begin, z, end - begin);
      if (with_gradient && with_values) row_multiply(h + begin, z, end - begin);
    }
    const auto clear = [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) s[j] = a[j] = A(0);
      for (int64_t j = first; with_gradient && j < last; ++j) g[j] = h[j] = A(0);
    };
    clear(0, from);
    clear(to, kBlockK);
    Vec<A> mean{}, product{}, rest{};
    const Vec<A> zero{}, centre = broadcast(q.out_product[row]);
    for (int64_t j = begin; j < end; j += kWidth<A>) {
      const Vec<A> weight = load(s + j), tangent = load(a + j);
      mean += weight * tangent;
      if (!with_gradient) continue;
      // A hidden key's may be NaN.
      const Vec<A> gradient = weight == zero ? zero : load(g + j) - centre;
      store(g + j, gradient);
      const Vec<A> of_values = with_values ? (weight == zero ? zero : load(h + j)) : zero;
      store(h + j, of_values);
      rest += weight * gradient;
      product += weight * (tangent * gradient + of_values);
    }
    q.mu[row] += reduce_add(mean);
    q.rest[row] += reduce_add(rest);
    q.beta[row] += reduce_add(product);
  }

  template <class Take>
  FASTATTN_INLINE void second_row(int64_t i, A rest, A mu, A beta, const Take& take) const {
    A *s = probs + i * kStride, *a = tangents + i * kStride;
    A *g = dscores + i * kStride, *h = second + i * kStride;
    const Vec<A> means = broadcast(mu), rests = broadcast(rest), betas = broadcast(beta);
    for (int64_t j = 0; j < kBlockK; j += kWidth<A>) {
      const Vec<A> weight = load(s + j), centred = weight * (load(a + j) - means);
      store(a + j, centred);
      if (!with_gradient) continue;
      const Vec<A> gradient = load(g + j) - rests;
      store(h + j, centred * gradient + weight * (load(h + j) - betas));  // E14
      store(g + j, weight * gradient);                                    // E7
    }
    take(i, h);
    if (capped != nullptr && with_gradient) through_softcap(i, g, h);
    if (keep == nullptr) return;
    row_multiply(s, keep + i * kStride, kBlockK);
    row_multiply(a, keep + i * kStride, kBlockK);
  }

  // dS and E of what the softcap takes.
  FASTATTN_INLINE void through_softcap(int64_t i, A* g, A* h) const {
    const A *tanhs = capped + i * kStride, *befores = before + i * kStride;
    const Vec<A> one = broadcast(A(1)), bend = broadcast(static_cast<A>(-2 / p.softcap));
    const Vec<A> zero{};
    for (int64_t j = 0; j < kBlockK; j += kWidth<A>) {
      const Vec<A> seen = load(s_of(i) + j);
      const Vec<A> t = load(tanhs + j), slope = one - t * t;
      const Vec<A> e = slope * (load(h + j) + bend * t * load(befores + j) * load(g + j));
      store(h + j, seen == zero ? zero : e);  // beyond what the row sees nothing was written
      store(g + j, seen == zero ? zero : slope * load(g + j));
    }
  }
  FASTATTN_INLINE const A* s_of(int64_t i) const { return probs + i * kStride; }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
