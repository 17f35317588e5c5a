// What forward mode and the second derivative share: operands side by side with their tangents, and
// the tangents of scores, A of E12.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/softmax.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Operands of S = Q K^T and A = [tQ Q] [K tK]^T: a row of queries holds [tQ Q], a panel of keys
// [K tK], each as far as there is a tangent.
template <class T>
struct ScoreOperands {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kPanelKeys = kPanel<A>;
  int64_t dim_words, q_words, k_words;  // of D, a row, a panel's column
  bool t_q, t_k;

  ScoreOperands(const AttentionProblem& p, const AttentionTangents& t)
      : dim_words(words<E>(p.head_dim)),
        q_words(dim_words * (t.q.data ? 2 : 1)),
        k_words(dim_words * (t.k.data ? 2 : 1)),
        t_q(t.q.data != nullptr),
        t_k(t.k.data != nullptr) {}

  int64_t key_elements(int64_t keys) const { return round_up(keys, kPanelKeys) * k_words; }

  void pack_queries(E* dst, const AttentionProblem& p, const AttentionTangents& t, int64_t batch,
                    int64_t head, int64_t i0, int64_t rows) const {
    const auto pack = [&](E* to, const TensorView& x) {
      const T* src = query_rows<T>(p, x, batch, head) + i0 * x.row_stride;
      for (int64_t i = 0; i < rows; ++i)
        pack_rows(to + i * q_words, dim_words, src + i * x.row_stride, x.row_stride, 1, p.head_dim);
    };
    pack(dst + q_words - dim_words, p.q);
    if (t_q) pack(dst, t.q);
  }

  void pack_keys(E* dst, const AttentionProblem& p, const AttentionTangents& t, int64_t batch,
                 int64_t head_k, int64_t first, int64_t keys) const {
    E* staging = thread_scratch<E>(Scratch::kStaging, kPanelKeys * dim_words);
    const auto pack = [&](E* to, const TensorView& x) {
      const T* src = key_rows<T>(p, x, batch, head_k) + first * x.row_stride;
      for (int64_t j = 0; j < keys; j += kPanelKeys) {
        pack_transposed_panel(to + j * k_words, src + j * x.row_stride, x.row_stride,
                              min64(kPanelKeys, keys - j), p.head_dim, staging);
      }
    };
    pack(dst, p.k);
    if (t_k) pack(dst + dim_words * kPanelKeys, t.k);
  }

  // s and, if it has products, a [rows, stride] of up to kPanelKeys keys.  // E1, E12
  FASTATTN_INLINE void multiply(int rows, int vecs, const E* q, const E* panel, A* s, A* a,
                                int64_t stride) const {
    const E* only_q = q + q_words - dim_words;
    micro_kernel<Start::kZero>(rows, vecs, dim_words, Strided<E>{only_q, q_words, 1}, panel,
                               kPanelKeys, s, stride);
    if (!t_q && !t_k) return;
    const E* columns = t_q ? panel : panel + dim_words * kPanelKeys;
    micro_kernel<Start::kZero>(rows, vecs, t_q ? k_words : dim_words, Strided<E>{q, q_words, 1},
                               columns, kPanelKeys, a, stride);
  }
};

// From products to probabilities and tangents of scores, a row at a time.
template <class T>
struct TangentTerms {
  using A = Acc<T>;
  ScoreTerms<T> terms;
  const T* t_mask = nullptr;
  int64_t mask_rows, mask_cols;  // strides
  bool products;                 // there are tangents of queries or keys
  bool only_scale;
  A factor;
  A softcap;

  TangentTerms(const AttentionProblem& p, const AttentionTangents& t, int64_t batch, int64_t head)
      : terms(p, batch, head),
        mask_rows(t.mask.row_stride),
        mask_cols(t.mask.col_stride),
        products(t.q.data || t.k.data),
        only_scale(ScoreTerms<T>::only_scale(p)),
        factor(ScoreTerms<T>::factor(p)),
        softcap(static_cast<A>(p.softcap)) {
    if (t.mask.data) t_mask = head_data<T>(p, t.mask, batch, head);
  }

  // Row i, keys [j0, j0 + n), both arrays read and written up to a whole vector: s = P  // E6
  // and a = A  // E12
  // where P is not 0, else 0. The softcap's tanh is left in `capped`, the tangent of what it takes
  // in `before`, where those are given.
  FASTATTN_INLINE void apply(A* s, A* a, int64_t i, int64_t j0, int64_t n,
                             const SoftmaxRow<A>& softmax, A* capped, A* before) const {
    const int64_t padded = round_up(n, kWidth<A>);
    if (!only_scale) terms.apply(s, i, j0, n, capped);
    row_weights(s, padded, factor, softmax);
    if (!products) {
      for (int64_t j = 0; j < padded; ++j) a[j] = A(0);
    }
    const Vec<A> scale = broadcast(terms.scale), one = broadcast(A(1)), zero{};
    for (int64_t j = 0; j < padded; j += kWidth<A>) {
      Vec<A> tangent = load(a + j) * scale;
      if (softcap != A(0)) {
        if (before != nullptr) store(before + j, tangent);
        const Vec<A> t = load(capped + j);
        tangent *= one - t * t;
      }
      store(a + j, tangent);
    }
    if (t_mask != nullptr) add_mask(a, i, j0, n);
    for (int64_t j = 0; j < padded; j += kWidth<A>)
      store(a + j, load(s + j) == zero ? zero : load(a + j));  // a hidden key's may be NaN
  }

 private:
  FASTATTN_INLINE void add_mask(A* a, int64_t i, int64_t j0, int64_t n) const {
    const T* m = t_mask + i * mask_rows + j0 * mask_cols;
    constexpr int64_t kChunk = 64;
    A values[kChunk];
    for (int64_t j = 0; j < n; j += kChunk) {
      const int64_t count = min64(kChunk, n - j);
      if (mask_cols == 1) {
        convert(values, m + j, count);
      } else {
        for (int64_t c = 0; c < count; ++c) values[c] = to_acc(m[(j + c) * mask_cols]);
      }
      for (int64_t c = 0; c < count; ++c) a[j + c] += values[c];
    }
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
