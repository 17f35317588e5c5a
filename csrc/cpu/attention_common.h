// What attention's forward and backward share: operands of one head, masks, dropout.
#pragma once

#include "common/problem.h"
#include "cpu/dropout.h"
#include "cpu/micro_kernel.h"
#include "cpu/pack.h"
#include "cpu/softmax.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kBlockQ = 96;  // 16 strips of 6 rows

template <class T>
FASTATTN_INLINE T* head_data(const AttentionProblem& p, const TensorView& view, int64_t batch,
                             int64_t head) {
  int64_t offset = head * view.head_stride;
  for (int d = p.batch_dims - 1; d >= 0; --d) {
    offset += batch % p.batch_sizes[d] * view.batch_strides[d];
    batch /= p.batch_sizes[d];
  }
  return reinterpret_cast<T*>(view.data) + offset;
}

// The rows of one batch element in q, out and their gradients, and in k, v and theirs.
template <class T>
FASTATTN_INLINE T* query_rows(const AttentionProblem& p, const TensorView& view, int64_t batch,
                              int64_t head) {
  if (p.starts_q == nullptr) return head_data<T>(p, view, batch, head);
  return head_data<T>(p, view, 0, head) + p.starts_q[batch] * view.row_stride;
}
template <class T>
FASTATTN_INLINE T* key_rows(const AttentionProblem& p, const TensorView& view, int64_t batch,
                            int64_t head) {
  if (p.starts_k == nullptr) return head_data<T>(p, view, batch, head);
  return head_data<T>(p, view, 0, head) + p.starts_k[batch] * view.row_stride;
}
FASTATTN_INLINE int64_t lse_offset(const AttentionProblem& p, int64_t batch, int64_t head) {
  if (p.starts_q != nullptr) return head * p.tokens_q + p.starts_q[batch];
  return (batch * p.heads_q + head) * p.seq_q;
}

// The SoftmaxRow of each query row, as the forward pass left it.
template <class A>
struct SoftmaxRows {
  const A *max = nullptr, *log_sum = nullptr;

  SoftmaxRows(const AttentionProblem& p, int64_t batch, int64_t head, int64_t first)
      : max(static_cast<const A*>(p.row_max) + lse_offset(p, batch, head) + first),
        log_sum(static_cast<const A*>(p.log_sum) + lse_offset(p, batch, head) + first) {}
  SoftmaxRows(const A* m, const A* l) : max(m), log_sum(l) {}
  FASTATTN_INLINE SoftmaxRow<A> operator[](int64_t i) const { return {max[i], log_sum[i]}; }
  SoftmaxRows from(int64_t i) const { return {max + i, log_sum + i}; }
};

// Which keys a query of one batch element sees without regard to the mask, and the reverse. A range
// may be empty, with its end before its begin.
struct Band {
  int64_t seq_q, seq_k, left, right;

  Band(const AttentionProblem& p, int64_t batch)
      : seq_q(p.starts_q ? p.starts_q[batch + 1] - p.starts_q[batch] : p.seq_q),
        seq_k(p.starts_k ? p.starts_k[batch + 1] - p.starts_k[batch] : p.seq_k),
        left(p.left),
        right(p.right) {}

  FASTATTN_INLINE int64_t first_key(int64_t i) const { return max64(0, i - left); }
  FASTATTN_INLINE int64_t end_key(int64_t i) const { return min64(seq_k, i + right + 1); }
  FASTATTN_INLINE int64_t first_query(int64_t j) const { return max64(0, j - right); }
  FASTATTN_INLINE int64_t end_query(int64_t j) const { return min64(seq_q, j + left + 1); }
};

// --- masks

// The mask of one head, read a row segment at a time.
template <class T>
struct HeadMask {
  MaskKind kind = MaskKind::kNone;
  const T* values = nullptr;      // kFloat
  const uint8_t* bits = nullptr;  // kBool: one byte per element
  int64_t row_stride = 0, col_stride = 0;

  FASTATTN_INLINE bool attends(int64_t i, int64_t j) const {
    if (kind == MaskKind::kBool) return bits[i * row_stride + j * col_stride] != 0;
    if (kind == MaskKind::kFloat)
      return to_acc(values[i * row_stride + j * col_stride]) != -kInf<Acc<T>>;
    return true;
  }
};

template <class T>
HeadMask<T> head_mask(const AttentionProblem& p, int64_t batch, int64_t head) {
  HeadMask<T> mask;
  mask.kind = p.mask_kind;
  mask.row_stride = p.mask.row_stride;
  mask.col_stride = p.mask.col_stride;
  if (p.mask_kind == MaskKind::kBool) mask.bits = head_data<uint8_t>(p, p.mask, batch, head);
  if (p.mask_kind == MaskKind::kFloat) mask.values = head_data<T>(p, p.mask, batch, head);
  return mask;
}

// Does any of the rows [i0, i1) attend to any key in [j0, j1)?
template <class T>
bool any_attends(const HeadMask<T>& mask, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  if (mask.kind == MaskKind::kNone) return true;
  if (mask.row_stride == 0) i1 = min64(i1, i0 + 1);
  if (mask.col_stride == 0) j1 = min64(j1, j0 + 1);
  for (int64_t i = i0; i < i1; ++i) {
    if (mask.kind == MaskKind::kBool && mask.col_stride == 1) {
      const uint8_t* row = mask.bits + i * mask.row_stride;
      uint8_t any = 0;
      for (int64_t j = j0; j < j1; ++j) any |= row[j];
      if (any) return true;
    } else {
      for (int64_t j = j0; j < j1; ++j) {
        if (mask.attends(i, j)) return true;
      }
    }
  }
  return false;
}

// From products of one head to its scores: scale, softcap, ALiBi, mask.  // E1
template <class T>
struct ScoreTerms {
  using A = Acc<T>;
  HeadMask<T> mask;
  A scale, softcap, slope;

  ScoreTerms(const AttentionProblem& p, int64_t batch, int64_t head)
      : mask(head_mask<T>(p, batch, head)),
        scale(static_cast<A>(p.scale)),
        softcap(static_cast<A>(p.softcap)),
        slope(p.slopes == nullptr
                  ? A(0)
                  : static_cast<const A*>(
                        p.slopes)[batch / (p.batch / p.slope_batches) * p.heads_q + head]) {}

  // Whether the scores are products times a positive factor. They then stay products, and the
  // factor is left to the exponent, in every pass alike.
  static bool only_scale(const AttentionProblem& p) {
    return p.mask_kind == MaskKind::kNone && p.scale > 0 && p.softcap == 0 && p.slopes == nullptr;
  }
  // e^x = 2^{factor x} of the scores.
  static A factor(const AttentionProblem& p) {
    return static_cast<A>((only_scale(p) ? p.scale : 1.0) * kLog2E);
  }

  // s[0, n) = the scores of row i, keys [j0, j0 + n); s is read and written up to a whole vector.
  // -inf where the mask rules out, whatever s holds there (NaN included). capped[0, n), if asked
  // for, is the softcap's tanh.
  FASTATTN_INLINE void apply(A* s, int64_t i, int64_t j0, int64_t n, A* capped) const {
    A factor = scale;
    if (softcap != A(0)) {
      const Vec<A> cap = broadcast(softcap), inner = broadcast(factor / softcap);
      for (int64_t j = 0; j < n; j += kWidth<A>) {
        const Vec<A> t = tanh(load(s + j) * inner);
        store(s + j, t * cap);
        if (capped != nullptr) store(capped + j, t);
      }
      factor = A(1);
    }
    if (slope != A(0)) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t distance = i - j0 - j;
        s[j] = s[j] * factor - slope * static_cast<A>(distance < 0 ? -distance : distance);
      }
      factor = A(1);
    }
    scale_and_mask(s, factor, i, j0, n);
  }

 private:
  static FASTATTN_INLINE void add_mask(A* s, A factor, Vec<A> values) {
    const Vec<A> hidden = broadcast(-kInf<A>);
    store(s, values == hidden ? hidden : load(s) * broadcast(factor) + values);
  }

  FASTATTN_INLINE void scale_and_mask(A* s, A factor, int64_t i, int64_t j0, int64_t n) const {
    const int64_t offset = i * mask.row_stride + j0 * mask.col_stride;
    if (mask.kind == MaskKind::kBool) {
      const uint8_t* m = mask.bits + offset;
      if (mask.col_stride == 1) {
        for (int64_t j = 0; j < n; ++j) s[j] = m[j] ? s[j] * factor : -kInf<A>;
      } else {
        for (int64_t j = 0; j < n; ++j) s[j] = m[j * mask.col_stride] ? s[j] * factor : -kInf<A>;
      }
    } else if (mask.kind == MaskKind::kFloat) {
      const T* m = mask.values + offset;
      int64_t j = 0;
      if constexpr (sizeof(T) == sizeof(A)) {
        const int64_t whole = mask.col_stride == 1 ? n / kWidth<A> * kWidth<A> : 0;
        for (; j < whole; j += kWidth<A>) add_mask(s + j, factor, load(m + j));
      }
      constexpr int64_t kChunk = 64;
      A values[kChunk];
      for (; j < n; j += kChunk) {
        const int64_t count = min64(kChunk, n - j);
        if (mask.col_stride == 1) {
          convert(values, m + j, count);
        } else {
          for (int64_t c = 0; c < count; ++c) values[c] = to_acc(m[(j + c) * mask.col_stride]);
        }
        for (int64_t c = count; c < round_up(count, kWidth<A>); ++c) values[c] = A(0);
        for (int64_t c = 0; c < count; c += kWidth<A>)
          add_mask(s + j + c, factor, load(values + c));
      }
    } else if (factor != A(1)) {
      for (int64_t j = 0; j < n; ++j) s[j] *= factor;
    }
  }
};

// --- keys and values of one head

// K^T or V^T of keys [j0, j0 + n) as panels [ceil(n / kPanel)][words(dim)][kPanel].
template <class T, class E = Operand<T>>
void pack_key_panels(E* dst, const T* src, int64_t src_stride, int64_t n, int64_t dim, E* staging) {
  constexpr int64_t kKeys = kPanel<Acc<T>>;
  for (int64_t j = 0; j < n; j += kKeys) {
    pack_transposed_panel(dst + j * words<E>(dim), src + j * src_stride, src_stride,
                          min64(kKeys, n - j), dim, staging);
  }
}

template <class T>
bool rows_are_finite(const T* src, int64_t stride, int64_t rows, int64_t cols) {
  using A = Acc<T>;
  constexpr int64_t kChunk = 2 * kWidth<A>;
  Vec<A> poison{};  // stays 0 while every element is finite
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = src + i * stride;
    int64_t j = 0;
    for (; j + kChunk <= cols; j += kChunk) {
      A x[kChunk];
      convert(x, row + j, kChunk);
      poison += load(x) * broadcast(A(0)) + load(x + kWidth<A>) * broadcast(A(0));
    }
    for (; j < cols; ++j) poison[0] += to_acc(row[j]) * A(0);
  }
  return reduce_add(poison) == A(0);
}

// The sum of a[j] b[j].
template <class T>
Acc<T> row_dot(const T* a, const T* b, int64_t n) {
  using A = Acc<T>;
  constexpr int64_t kChunk = 2 * kWidth<A>;
  Vec<A> even{}, odd{};
  A x[kChunk], y[kChunk];
  int64_t j = 0;
  for (; j + kChunk <= n; j += kChunk) {
    convert(x, a + j, kChunk);
    convert(y, b + j, kChunk);
    even += load(x) * load(y);
    odd += load(x + kWidth<A>) * load(y + kWidth<A>);
  }
  A sum = reduce_add(even + odd);
  for (; j < n; ++j) sum += to_acc(a[j]) * to_acc(b[j]);
  return sum;
}

// Keys that the mask hides from every query must not influence anything, not even by 0 * NaN. Only
// then, that is with a mask and with a NaN or an infinity among the keys or values, the kernels
// clear those keys' rows in their packed copies.
template <class T>
bool must_clear_hidden_keys(const AttentionProblem& p, const Parallel& parallel,
                            const AttentionTangents& tangents = {}) {
  if (p.mask_kind == MaskKind::kNone) return false;
  bool clear = false;
  parallel_tasks(parallel, p.batch * p.heads_k, [&](int64_t unit) {
    const auto finite = [&](const TensorView& x, int64_t dim) {
      if (x.data == nullptr) return true;
      const T* rows = head_data<T>(p, x, unit / p.heads_k, unit % p.heads_k);
      return rows_are_finite(rows, x.row_stride, p.seq_k, dim);
    };
    if (!finite(p.k, p.head_dim) || !finite(p.v, p.head_dim_v) || !finite(tangents.k, p.head_dim) ||
        !finite(tangents.v, p.head_dim_v)) {
      __atomic_store_n(&clear, true, __ATOMIC_RELAXED);
    }
  });
  return clear;
}

// Operands of keys 2k and 2k + 1 share a word, so that a product over keys [from, to) with an odd
// end multiplies the neighbouring key by 0. As 0 * NaN = NaN, this clears the neighbours that no
// query sees.
template <class E>
FASTATTN_INLINE void clear_unseen_neighbours(const Band& band, E* dst, int64_t padded,
                                             int64_t first, int64_t count) {
  if constexpr (kPaired<E>) {
    if (band.seq_q == 0) return;
    const int64_t before = band.first_key(0) - 1 - first;
    const int64_t after = band.end_key(band.seq_q - 1) - first;
    if (before >= 0 && before < count) clear_depth_row(dst, padded, before);
    if (after >= 0 && after < count) clear_depth_row(dst, padded, after);
  }
}

template <class T>
bool key_is_hidden(const Band& band, const HeadMask<T>& mask, int64_t j) {
  for (int64_t i = band.first_query(j); i < band.end_query(j); ++i) {
    if (mask.attends(i, j)) return false;
  }
  return true;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
