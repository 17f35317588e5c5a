// The online softmax of the forward passes, E2-E5: rows of scores in, probabilities relative to a
// running maximum out.
#pragma once

#include "cpu/attention_common.h"
#include "cpu/softmax.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kStepKeys = 256;  // keys per online-softmax step

// The running state of some rows.
template <class A>
struct SoftmaxState {
  A* m;        // [rows] running maximum, in OnlineSoftmax's unit
  A* l;        // [rows] running sum
  A* rescale;  // [rows] of the current step
};

// The keys of one step, as the rows of one head see them.
template <class T>
struct KeyStep {
  int64_t batch, head;
  const Band& band;
  const ScoreTerms<T>& terms;
  int64_t j0, keys;

  // Row i sees of these keys [from(i), to(i)), without regard to the mask.
  FASTATTN_INLINE int64_t from(int64_t i) const { return max64(0, band.first_key(i) - j0); }
  FASTATTN_INLINE int64_t to(int64_t i) const { return min64(keys, band.end_key(i) - j0); }
};

// The keys of a step that some of rows [i, i + rows) sees, in whole words.
struct StripKeys {
  int64_t from, to;
};
template <class E, class T>
FASTATTN_INLINE StripKeys keys_of_strip(const KeyStep<T>& where, int64_t i, int64_t rows) {
  const int64_t from = where.from(i), to = where.to(i + rows - 1);
  if (from >= to) return {0, 0};
  return {from / kDepth<E> * kDepth<E>, round_up(to, kDepth<E>)};
}

template <class T>
struct OnlineSoftmax {
  using A = Acc<T>;
  const AttentionProblem& p;
  Dropout dropout;
  bool only_scale;
  double unit;  // of the running maximum and of what a step exponentiates

  explicit OnlineSoftmax(const AttentionProblem& problem)
      : p(problem),
        dropout(problem),
        only_scale(ScoreTerms<T>::only_scale(problem)),
        unit(only_scale ? problem.scale : 1.0) {}

  FASTATTN_INLINE A factor() const { return ScoreTerms<T>::factor(p); }

  // e to the difference of two maxima.
  FASTATTN_INLINE A power(A difference) const { return power_of_2(difference * factor()); }

  // What a step needs to know of a row between its two passes.
  struct Row {
    int64_t begin, end;  // whole vectors around what the row sees
    A most;
  };

  // Products of row i -> scores, and its new maximum.
  FASTATTN_INLINE Row maximum(const KeyStep<T>& step, int64_t i, int64_t from, int64_t to, A* s,
                              A& m, A& rescale) const {
    // `to`, in whole words, may be one past the keys.
    const int64_t seen_from = min64(min64(to, step.keys), max64(from, step.from(i)));
    const int64_t seen_to = max64(seen_from, step.to(i));
    Row row{seen_from / kWidth<A> * kWidth<A>, round_up(seen_to, kWidth<A>), A(0)};
    if (!only_scale)
      step.terms.apply(s + row.begin, i, step.j0 + row.begin, seen_to - row.begin, nullptr);
    for (int64_t j = row.begin; j < seen_from; ++j) s[j] = -kInf<A>;
    for (int64_t j = seen_to; j < row.end; ++j) s[j] = -kInf<A>;
    const A step_max = row_max(s + row.begin, row.end - row.begin);
    const A previous = m, updated = previous > step_max ? previous : step_max;  // E2
    row.most = updated == -kInf<A> ? A(0) : updated;  // nothing seen yet: every power is 0
    rescale = updated == previous ? A(1) : previous == -kInf<A> ? A(0) : power(previous - row.most);
    m = updated;
    return row;
  }

  // Scores of row i -> probabilities relative to the running maximum, in columns [from, to).
  FASTATTN_INLINE void probabilities(const KeyStep<T>& step, const Row& row, int64_t i,
                                     int64_t from, int64_t to, A* s, A& l, A rescale, A* z) const {
    const int64_t n = row.end - row.begin;
    l = l * rescale + row_exp2(s + row.begin, n, row.most, factor());  // E3
    for (int64_t j = from; j < row.begin; ++j) s[j] = A(0);
    for (int64_t j = row.end; j < to; ++j) s[j] = A(0);
    if (dropout.active) {
      dropout.fill(z, step.batch, step.head, i, step.j0 + row.begin, n);
      row_multiply(s + row.begin, z, n);
    }
  }

  // Products of rows [i, i + rows), rows <= kRows -> probabilities; arrays begin with row i. All
  // maxima come first, so that no row waits for its own.
  FASTATTN_INLINE void rows(const KeyStep<T>& step, int64_t i, int64_t rows, int64_t from,
                            int64_t to, A* s, int64_t s_stride, A* m, A* l, A* rescale,
                            A* z) const {
    Row found[kRows];
    for (int64_t r = 0; r < rows; ++r)
      found[r] = maximum(step, i + r, from, to, s + r * s_stride, m[r], rescale[r]);
    for (int64_t r = 0; r < rows; ++r) {
      probabilities(step, found[r], i + r, from, to, s + r * s_stride, l[r], rescale[r], z);
    }
  }

  // E5 for rows [i0, i0 + rows) of a head: o [rows, o_stride] is divided in place and written. A
  // row with nothing to attend to: output 0, LSE and maximum -inf. A row that attends to scores of
  // -inf alone, which are products that overflowed: NaN, as a softmax of them is.
  void write(int64_t batch, int64_t head, int64_t i0, int64_t rows, A* o, int64_t o_stride,
             const A* m, const A* l) const {
    T* out = query_rows<T>(p, p.out, batch, head) + i0 * p.out.row_stride;
    const int64_t offset = lse_offset(p, batch, head) + i0;
    A *row_max = static_cast<A*>(p.row_max) + offset,
      *log_sum = static_cast<A*>(p.log_sum) + offset;
    for (int64_t i = 0; i < rows; ++i) {
      A* o_row = o + i * o_stride;
      const bool none = l[i] == A(0), overflow = none && attends(batch, head, i0 + i);
      const A inverse = overflow ? kNaN<A> : none ? A(0) : A(1) / l[i];
      for (int64_t d = 0; d < p.head_dim_v; ++d) o_row[d] *= inverse;
      convert(out + i * p.out.row_stride, o_row, p.head_dim_v);
      log_sum[i] = overflow ? kNaN<A> : none ? A(0) : natural_log(l[i]);
      row_max[i] = log_sum[i] == log_sum[i] ? m[i] : kNaN<A>;
      if (p.lse == nullptr) continue;
      static_cast<A*>(p.lse)[offset + i] =
          static_cast<A>(row_max[i] * unit + static_cast<double>(log_sum[i]));
    }
  }

 private:
  // Whether query i of a head sees a key that the mask does not hide.
  bool attends(int64_t batch, int64_t head, int64_t i) const {
    const Band band(p, batch);
    const int64_t from = band.first_key(i), to = band.end_key(i);
    return from < to && any_attends(head_mask<T>(p, batch, head), i, i + 1, from, to);
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
