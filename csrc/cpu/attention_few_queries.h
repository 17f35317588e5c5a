// Attention forward, E1-E5, for a key head whose queries are few, as in decoding: keys and values
// pass by once, in place, and are split over the threads where the heads do not occupy them. A task
// owns a range of keys and all the rows that share them; ranges leave (m, l, O), merged in order.
#pragma once

#include "cpu/attention_softmax.h"
#include "cpu/dot_kernel.h"
#include "cpu/micro_kernel.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kFewQueries = 2 * kRows;  // rows of a unit: more would repay packing its keys
constexpr int64_t kTasks = 128;             // at least, where the keys allow
constexpr int64_t kChunkKeys = 32;          // keys at a time whose rows stay in L1

template <class T>
class AttentionFewQueries {
  using A = Acc<T>;
  static constexpr int64_t kStep = kStepKeys + 64 / static_cast<int64_t>(sizeof(A));

 public:
  AttentionFewQueries(const AttentionProblem& problem, const Parallel& parallel)
      : p_(problem), parallel_(parallel), softmax_(problem) {}

  static bool serves(const AttentionProblem& p) {
    return p.heads_k > 0 && p.heads_q / p.heads_k * p.seq_q <= kFewQueries;
  }

  void run() {
    sharing_ = p_.heads_q / p_.heads_k;
    dim_v_padded_ = round_up(p_.head_dim_v, kWidth<A>);
    const int64_t units = p_.batch * p_.heads_k, steps = max64(1, ceil_div(p_.seq_k, kStepKeys));
    // The ranges follow from the problem alone, so that the result does not depend on the threads.
    int64_t ranges = min64(steps, ceil_div(kTasks, max64(1, units)));
    const int64_t range_keys = ceil_div(steps, ranges) * kStepKeys;
    ranges = max64(1, ceil_div(p_.seq_k, range_keys));
    // m [kFewQueries], l [kFewQueries], O [kFewQueries, Dv padded]
    const int64_t part_elements = kFewQueries * (dim_v_padded_ + 2);
    if (ranges == 1) {  // any number of units: the memory is a thread's
      parallel_tasks(parallel_, units, [&](int64_t unit) {
        A* part = thread_scratch<A>(Scratch::kUnit, part_elements);
        keys_of_one_head(unit, 0, range_keys, part);
        write(unit, part);
      });
      return;
    }
    A* parts = thread_scratch<A>(Scratch::kUnit, units * ranges * part_elements);
    parallel_tasks(parallel_, units * ranges, [&](int64_t task) {
      keys_of_one_head(task / ranges, task % ranges * range_keys, range_keys,
                       parts + task * part_elements);
    });
    for (int64_t unit = 0; unit < units; ++unit) {
      A* part = parts + unit * ranges * part_elements;
      const int64_t rows = sharing_ * Band(p_, unit / p_.heads_k).seq_q;
      for (int64_t r = 0; r < rows; ++r) merge(part, ranges, part_elements, r);
      write(unit, part);
    }
  }

 private:
  void write(int64_t unit, A* part) const {
    const int64_t batch = unit / p_.heads_k, rows = Band(p_, batch).seq_q;
    for (int64_t h = 0; h < sharing_; ++h) {
      softmax_.write(batch, unit % p_.heads_k * sharing_ + h, 0, rows,
                     part + 2 * kFewQueries + h * rows * dim_v_padded_, dim_v_padded_,
                     part + h * rows, part + kFewQueries + h * rows);
    }
  }

  // Row r of the first part takes in those of the others.
  void merge(A* part, int64_t ranges, int64_t part_elements, int64_t r) const {
    A most = -kInf<A>;
    for (int64_t i = 0; i < ranges; ++i) {
      const A m = part[i * part_elements + r];
      most = m > most || m != m ? m : most;
    }
    if (most == -kInf<A>) return;
    A* o = part + 2 * kFewQueries + r * dim_v_padded_;
    for (int64_t i = 0; i < ranges; ++i) {
      const A* other = part + i * part_elements;
      const A weight = softmax_.power(other[r] - most);
      const A* other_o = other + 2 * kFewQueries + r * dim_v_padded_;
      part[kFewQueries + r] =
          (i == 0 ? A(0) : part[kFewQueries + r]) + other[kFewQueries + r] * weight;
      for (int64_t d = 0; d < dim_v_padded_; ++d)
        o[d] = (i == 0 ? A(0) : o[d]) + other_o[d] * weight;
    }
    part[r] = most;
  }

  // Keys [first, first + count) of one key head against all the rows that share it.
  void keys_of_one_head(int64_t unit, int64_t first, int64_t count, A* part) const {
    const int64_t batch = unit / p_.heads_k, head_k = unit % p_.heads_k;
    const Band band(p_, batch);
    const int64_t rows = sharing_ * band.seq_q, dim = p_.head_dim;
    A* o = part + 2 * kFewQueries;
    for (int64_t r = 0; r < kFewQueries; ++r) {
      part[r] = -kInf<A>;
      part[kFewQueries + r] = A(0);
    }
    for (int64_t e = 0; e < rows * dim_v_padded_; ++e) o[e] = A(0);
    if (rows == 0) return;
    A* q = thread_scratch<A>(Scratch::kBlock, kFewQueries * (dim + kStep + 1) + kStep + 64 +
                                                  kChunkKeys * (dim + dim_v_padded_));
    A* s = q + kFewQueries * dim;          // [rows, kStep]
    A* rescale = s + kFewQueries * kStep;  // [rows]
    A* z = rescale + kFewQueries;          // [kStep]
    A* chunk = z + kStep + 64;             // [kChunkKeys, D or Dv padded]
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = query_rows<T>(p_, p_.q, batch, head_k * sharing_ + r / band.seq_q) +
                     r % band.seq_q * p_.q.row_stride;
      convert(q + r * dim, row, dim);
    }
    const int64_t begin = max64(first, band.first_key(0) / kStepKeys * kStepKeys);
    const int64_t end = min64(first + count, band.end_key(band.seq_q - 1));
    for (int64_t j0 = begin; j0 < end; j0 += kStepKeys) {
      const int64_t keys = min64(kStepKeys, end - j0);
      const int64_t from = max64(0, band.first_key(0) - j0);
      if (!any_row_attends(batch, head_k, band, j0 + from, j0 + keys)) continue;
      scores(key_rows<T>(p_, p_.k, batch, head_k) + j0 * p_.k.row_stride, from, keys, q, rows,
             chunk, s);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = head_k * sharing_ + r / band.seq_q;
        const ScoreTerms<T> terms(p_, batch, head);
        softmax_.rows(KeyStep<T>{batch, head, band, terms, j0, keys}, r % band.seq_q, 1, from, keys,
                      s + r * kStep, kStep, part + r, part + kFewQueries + r, rescale + r, z);
      }
      add_values(key_rows<T>(p_, p_.v, batch, head_k) + j0 * p_.v.row_stride, from, keys, s,
                 rescale, rows, chunk, o);
    }
  }

  bool any_row_attends(int64_t batch, int64_t head_k, const Band& band, int64_t j0,
                       int64_t j1) const {
    for (int64_t h = 0; h < sharing_; ++h) {
      const HeadMask<T> mask = head_mask<T>(p_, batch, head_k * sharing_ + h);
      if (any_attends(mask, 0, band.seq_q, j0, j1)) return true;
    }
    return false;
  }

  // s [rows, kStep], columns [from, to) = q k^T, and up to 3 columns more.  // E1
  void scores(const T* k, int64_t from, int64_t to, const A* q, int64_t rows, A* chunk,
              A* s) const {
    const int64_t dim = p_.head_dim;
    for (int64_t j = from; j < to; j += kChunkKeys) {
      const int64_t count = min64(kChunkKeys, to - j);
      const A* k_rows = chunk;
      int64_t stride = dim;
      if constexpr (sizeof(T) == sizeof(A)) {
        k_rows = k + j * p_.k.row_stride;
        stride = p_.k.row_stride;
      } else {
        for (int64_t c = 0; c < count; ++c)
          convert(chunk + c * dim, k + (j + c) * p_.k.row_stride, dim);
      }
      for (int64_t c = 0; c < count; c += kDotCols) {
        for (int64_t r = 0; r < rows; r += kDotRows) {
          dot_rows<A>(min64(kDotRows, rows - r), dim, q + r * dim, dim, k_rows + c * stride, stride,
                      min64(kDotCols, count - c), false, s + r * kStep + j + c, kStep);
        }
      }
    }
  }

  // o = rescale o + s[from, to) v  // E4
  void add_values(const T* v, int64_t from, int64_t to, const A* s, const A* rescale, int64_t rows,
                  A* chunk, A* o) const {
    for (int64_t j = from; j < to; j += kChunkKeys) {
      const int64_t count = min64(kChunkKeys, to - j);
      const A* v_rows = chunk;
      int64_t stride = dim_v_padded_;
      bool in_place = false;
      if constexpr (sizeof(T) == sizeof(A)) {
        in_place = p_.head_dim_v == dim_v_padded_;
        if (in_place) {
          v_rows = v + j * p_.v.row_stride;
          stride = p_.v.row_stride;
        }
      }
      if (!in_place)
        pack_rows(chunk, stride, v + j * p_.v.row_stride, p_.v.row_stride, count, p_.head_dim_v);
      for (int64_t d = 0; d < dim_v_padded_; d += kPanel<A>) {
        const int vecs = static_cast<int>(ceil_div(min64(kPanel<A>, dim_v_padded_ - d), kWidth<A>));
        for (int64_t r = 0; r < rows; r += kRows) {
          const int strip_rows = static_cast<int>(min64(kRows, rows - r));
          const Strided<A> probs{s + r * kStep + j, kStep, 1};
          A* dst = o + r * dim_v_padded_ + d;
          if (j == from) {
            micro_kernel<Start::kScale>(strip_rows, vecs, count, probs, v_rows + d, stride, dst,
                                        dim_v_padded_, rescale + r);
          } else {
            micro_kernel<Start::kAdd>(strip_rows, vecs, count, probs, v_rows + d, stride, dst,
                                      dim_v_padded_);
          }
        }
      }
    }
  }

  const AttentionProblem& p_;
  const Parallel& parallel_;
  OnlineSoftmax<T> softmax_;
  int64_t sharing_ = 1, dim_v_padded_ = 0;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
