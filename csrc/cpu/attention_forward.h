// Attention forward, E1-E5. A task owns one block of query rows of one head; keys and values are packed once per head,
// for as many heads at a time as fit in kGroupBytes, so that memory stays O(S).
#pragma once

#include "cpu/attention_common.h"
#include "cpu/softmax.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kPanelsPerStep = 4;          // keys per online-softmax step: 256 in fp32 on AVX-512
constexpr int64_t kGroupBytes = int64_t{8} << 20;

template <class T>
class AttentionForward {
  using A = Acc<T>;
  static constexpr int64_t kPanelKeys = kPanel<A>;
  static constexpr int64_t kStep = kPanelsPerStep * kPanelKeys;

 public:
  AttentionForward(const AttentionProblem& problem, const Parallel& parallel)
      : p_(problem), parallel_(parallel), dropout_(problem) {}

  void run() {
    if (p_.batch == 0 || p_.heads_q == 0 || p_.seq_q == 0) return;
    clear_hidden_ = must_clear_hidden_keys<T>(p_, parallel_);
    // Queries of one group of heads share packed keys, unless each head clears its own hidden keys.
    const int64_t sharing = p_.heads_q / p_.heads_k;
    heads_per_unit_ = clear_hidden_ ? 1 : sharing;
    units_per_batch_ = p_.heads_q / heads_per_unit_;

    panels_ = ceil_div(p_.seq_k, kPanelKeys);
    dim_v_padded_ = round_up(p_.head_dim_v, kWidth<A>);
    k_elements_ = round_up(panels_ * kPanelKeys * p_.head_dim, 16);
    unit_elements_ = k_elements_ + round_up(p_.seq_k * dim_v_padded_, 16);
    const int64_t units = p_.batch * units_per_batch_;
    const int64_t unit_bytes = max64(1, unit_elements_ * static_cast<int64_t>(sizeof(A)));
    const int64_t group = max64(1, min64(units, max64(parallel_.threads, kGroupBytes / unit_bytes)));
    const int64_t blocks = ceil_div(p_.seq_q, kBlockQ);

    packed_ = thread_scratch<A>(0, group * unit_elements_);
    for (int64_t first = 0; first < units; first += group) {
      const int64_t count = min64(group, units - first);
      parallel_tasks(parallel_, count, [&](int64_t u) { pack_unit(first + u, packed_ + u * unit_elements_); });
      const int64_t heads = count * heads_per_unit_;
      parallel_tasks(parallel_, heads * blocks, [&](int64_t task) {
        // Last blocks first: under a causal mask they are the longest.
        const int64_t block = blocks - 1 - task / heads, u = task % heads / heads_per_unit_;
        const int64_t unit = first + u, batch = unit / units_per_batch_;
        const int64_t head = unit % units_per_batch_ * heads_per_unit_ + task % heads % heads_per_unit_;
        query_block(batch, head, block * kBlockQ, packed_ + u * unit_elements_);
      });
    }
  }

 private:
  // Packed keys: K^T panels [panels][D][kPanel], then V [Sk, Dv padded].
  void pack_unit(int64_t unit, A* dst) const {
    const int64_t batch = unit / units_per_batch_, head = unit % units_per_batch_ * heads_per_unit_;
    const int64_t head_k = head / (p_.heads_q / p_.heads_k);
    A* staging = thread_scratch<A>(1, kPanelKeys * p_.head_dim);
    pack_key_panels(dst, head_data<T>(p_, p_.k, batch, head_k), p_.k.row_stride, p_.seq_k, p_.head_dim, staging);
    A* v = dst + k_elements_;
    pack_rows(v, dim_v_padded_, head_data<T>(p_, p_.v, batch, head_k), p_.v.row_stride, p_.seq_k, p_.head_dim_v);
    if (!clear_hidden_) return;
    const HeadMask<T> mask = head_mask<T>(p_, batch, head);
    for (int64_t j = 0; j < p_.seq_k; ++j) {
      if (!key_is_hidden(p_, mask, j)) continue;
      for (int64_t d = 0; d < dim_v_padded_; ++d) v[j * dim_v_padded_ + d] = A(0);
    }
  }

  void query_block(int64_t batch, int64_t head, int64_t i0, const A* packed) const {
    const int64_t rows = min64(kBlockQ, p_.seq_q - i0), dim = p_.head_dim;
    A* q = thread_scratch<A>(2, rows * dim + kBlockQ * (dim_v_padded_ + 4) + kRows * kStep + kStep + 64);
    A* o = q + round_up(rows * dim, 16);    // [rows, Dv padded]
    A* m = o + kBlockQ * dim_v_padded_;     // [rows] running maximum
    A* l = m + kBlockQ;                     // [rows] running sum
    A* s = l + kBlockQ;                     // [6, kStep]
    A* z = s + kRows * kStep;               // [kStep] dropout multipliers of one row
    const T* q_rows = head_data<T>(p_, p_.q, batch, head) + i0 * p_.q.row_stride;
    for (int64_t i = 0; i < rows; ++i) {
      convert(q + i * dim, q_rows + i * p_.q.row_stride, dim);
      m[i] = -kInf<A>;
      l[i] = A(0);
    }
    for (int64_t j = 0; j < rows * dim_v_padded_; ++j) o[j] = A(0);

    const HeadMask<T> mask = head_mask<T>(p_, batch, head);
    const int64_t last_panel = ceil_div(key_limit(p_, i0 + rows - 1), kPanelKeys);
    for (int64_t panel = 0; panel < last_panel;) {
      // The next run of up to kPanelsPerStep panels that some row attends to.
      int64_t run = 0;
      while (run < kPanelsPerStep && panel + run < last_panel &&
             any_attends(mask, i0, i0 + rows, (panel + run) * kPanelKeys,
                         min64((panel + run + 1) * kPanelKeys, p_.seq_k))) {
        ++run;
      }
      if (run == 0) {
        ++panel;
        continue;
      }
      const int64_t j0 = panel * kPanelKeys;
      for (int64_t strip = 0; strip < rows; strip += kRows) {
        const int strip_rows = static_cast<int>(min64(kRows, rows - strip));
        step(batch, head, mask, i0 + strip, strip_rows, j0, min64(run * kPanelKeys, p_.seq_k - j0), q + strip * dim,
             packed, o + strip * dim_v_padded_, m + strip, l + strip, s, z);
      }
      panel += run;
    }
    write_block(batch, head, i0, rows, o, m, l);
  }

  // One online-softmax step: rows [i, i + strip_rows) against keys [j0, j0 + keys).
  FASTATTN_INLINE void step(int64_t batch, int64_t head, const HeadMask<T>& mask, int64_t i, int strip_rows, int64_t j0,
                            int64_t keys, const A* q, const A* packed, A* o, A* m, A* l, A* s, A* z) const {
    keys = min64(keys, key_limit(p_, i + strip_rows - 1) - j0);
    if (keys <= 0) return;
    const int64_t dim = p_.head_dim;
    for (int64_t c = 0; c < keys; c += kPanelKeys) {  // E1
      const int vecs = static_cast<int>(ceil_div(min64(kPanelKeys, keys - c), kWidth<A>));
      micro_kernel(strip_rows, vecs, dim, Strided<A>{q, dim, 1}, packed + (j0 + c) * dim, kPanelKeys, s + c, kStep,
                   Start::kZero);
    }
    A rescale[kRows];
    bool rescales = false;
    for (int r = 0; r < strip_rows; ++r) {
      A* row = s + r * kStep;
      const int64_t seen = max64(0, min64(keys, key_limit(p_, i + r) - j0)), padded = round_up(seen, kWidth<A>);
      A factor = static_cast<A>(p_.scale);
      if (mask.kind != MaskKind::kNone || factor <= A(0)) {
        scale_and_mask(mask, row, factor, i + r, j0, seen);
        factor = A(1);
      }
      for (int64_t j = seen; j < padded; ++j) row[j] = -kInf<A>;
      const A block_max = row_max(row, padded) * factor;
      const A previous = m[r], updated = previous > block_max ? previous : block_max;  // E2
      const A shift = updated == -kInf<A> ? A(0) : updated;  // nothing seen yet: every e^{S - 0} is 0
      rescale[r] = updated == previous ? A(1) : static_cast<A>(__builtin_exp(previous - shift));
      rescales = rescales || rescale[r] != A(1);
      l[r] = l[r] * rescale[r] + row_exp(row, padded, factor, shift);  // E3
      m[r] = updated;
      for (int64_t j = padded; j < keys; ++j) row[j] = A(0);
      if (dropout_.active) {
        dropout_.fill(z, batch, head, i + r, j0, padded);
        row_multiply(row, z, padded);
      }
    }
    micro_kernel_wide(strip_rows, dim_v_padded_, keys, Strided<A>{s, kStep, 1},  // E4
                      packed + k_elements_ + j0 * dim_v_padded_, dim_v_padded_, o, dim_v_padded_,
                      Start::kAdd, rescales ? rescale : nullptr);
  }

  void write_block(int64_t batch, int64_t head, int64_t i0, int64_t rows, A* o, const A* m, const A* l) const {
    T* out = head_data<T>(p_, p_.out, batch, head) + i0 * p_.out.row_stride;
    A* lse = static_cast<A*>(p_.lse) + (batch * p_.heads_q + head) * p_.seq_q + i0;
    for (int64_t i = 0; i < rows; ++i) {  // E5; a row with nothing to attend to: output 0, LSE -inf
      A* row = o + i * dim_v_padded_;
      const bool empty = l[i] == A(0);
      const A inverse = empty ? A(0) : A(1) / l[i];
      for (int64_t d = 0; d < p_.head_dim_v; ++d) row[d] *= inverse;
      convert(out + i * p_.out.row_stride, row, p_.head_dim_v);
      lse[i] = empty ? -kInf<A> : m[i] + static_cast<A>(__builtin_log(l[i]));
    }
  }

  const AttentionProblem& p_;
  const Parallel& parallel_;
  Dropout dropout_;
  bool clear_hidden_ = false;
  int64_t heads_per_unit_ = 1, units_per_batch_ = 1, panels_ = 0, dim_v_padded_ = 0;
  int64_t k_elements_ = 0, unit_elements_ = 0;
  A* packed_ = nullptr;
};

template <class T>
void attention_forward(const AttentionProblem& p, const Parallel& parallel) {
  AttentionForward<T>(p, parallel).run();
}

}  // namespace fastattn::cpu::FASTATTN_ISA
