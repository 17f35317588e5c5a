// Forward mode, E12: the tangents of the output and of the LSE, five products a tile. The LSE is
// known, so that probabilities need no running maximum. Blocks, steps and tiles are the forward's.
#pragma once

#include "cpu/attention_own_forward.h"
#include "cpu/attention_softmax.h"
#include "cpu/attention_tangents.h"
#include "cpu/attention_units.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kTangentStepKeys = 128;  // two arrays of 24 x 144 fp32: 27 KB

template <class T>
class AttentionJvp {
  using A = Acc<T>;
  using E = Operand<T>;
  static constexpr int64_t kPanelKeys = kPanel<A>;
  static constexpr int64_t kTileRows = 24;
  static constexpr int64_t kStep = kTangentStepKeys + 64 / static_cast<int64_t>(sizeof(A));
  static constexpr int64_t kPanelsPerStep = kTangentStepKeys / kPanelKeys;

 public:
  AttentionJvp(const AttentionJvpProblem& problem, const Parallel& parallel)
      : j_(problem),
        p_(problem.forward),
        t_(problem.tangents),
        parallel_(parallel),
        dropout_(problem.forward),
        operands_(problem.forward, problem.tangents) {}

  void run() {
    if (p_.batch == 0 || p_.heads_q == 0 || p_.seq_q == 0) return;
    clear_hidden_ = must_clear_hidden_keys<T>(p_, parallel_, t_);
    dim_v_padded_ = round_up(p_.head_dim_v, kWidth<A>);
    key_words_ = words<E>(p_.seq_k);
    v_panels_ = ceil_div(p_.head_dim_v, kPanelKeys);
    k_elements_ = round_up(operands_.key_elements(p_.seq_k), 16);
    v_elements_ = round_up(v_panels_ * kPanelKeys * key_words_, 16);
    const QueryUnits<E> units{p_, parallel_, clear_hidden_ ? 1 : p_.heads_q / p_.heads_k,
                              k_elements_ + v_elements_ * (t_.v.data ? 2 : 1)};
    units.run([&](int64_t batch, int64_t head, E* dst) { pack_unit(batch, head, dst); },
              [&](int64_t batch, int64_t head, int64_t i0, const E* packed) {
                query_block(batch, head, i0, packed);
              });
  }

 private:
  // [K tK] panels, V's columns as panels [panels][words(Sk)][kPanel], tV's.
  void pack_unit(int64_t batch, int64_t head, E* dst) const {
    const int64_t head_k = head / (p_.heads_q / p_.heads_k);
    const Band band(p_, batch);
    operands_.pack_keys(dst, p_, t_, batch, head_k, 0, band.seq_k);
    pack_values(dst + k_elements_, p_.v, band, batch, head_k, head);
    if (t_.v.data) pack_values(dst + k_elements_ + v_elements_, t_.v, band, batch, head_k, head);
  }

  void pack_values(E* dst, const TensorView& v, const Band& band, int64_t batch, int64_t head_k,
                   int64_t head) const {
    for (int64_t d = 0; d < p_.head_dim_v; d += kPanelKeys) {
      E* panel = dst + d * key_words_;
      pack_depth_rows(panel, kPanelKeys, key_rows<T>(p_, v, batch, head_k) + d, v.row_stride,
                      band.seq_k, min64(kPanelKeys, p_.head_dim_v - d));
      clear_unseen_neighbours(band, panel, kPanelKeys, 0, band.seq_k);
      if (!clear_hidden_) continue;
      const HeadMask<T> mask = head_mask<T>(p_, batch, head);
      for (int64_t j = 0; j < p_.seq_k; ++j) {
        if (key_is_hidden(band, mask, j)) clear_depth_row(panel, kPanelKeys, j);
      }
    }
  }

  // What a query block works with.
  struct Rows {
    E* q;   // [rows, q_words]
    A* o;   // [rows, Dv padded]: the tangent but for mu * out
    A* mu;  // [rows]
    SoftmaxRows<A> softmax;
    A* s;  // [kTileRows, kStep] P, then Z * P as operands
    A* a;  // [kTileRows, kStep] A, then Z * P * A as operands
    A* z;  // [kStep] of one row: the softcap's tanh, then dropout
  };

  void query_block(int64_t batch, int64_t head, int64_t i0, const E* packed) const {
    const Band band(p_, batch);
    const int64_t rows = min64(kBlockQ, band.seq_q - i0);
    if (rows <= 0) return;  // a shorter one of the packed sequences
    const int64_t q_elements = round_up(rows * operands_.q_words, 16);
    A* scratch = thread_scratch<A>(
        2, q_elements + kBlockQ * (dim_v_padded_ + 1) + 2 * kTileRows * kStep + kStep + 64);
    A* o = scratch + q_elements;
    A* mu = o + kBlockQ * dim_v_padded_;
    A* s = mu + kBlockQ;
    A* a = s + kTileRows * kStep;
    const Rows r{reinterpret_cast<E*>(scratch), o, mu, {p_, batch, head, i0}, s, a,
                 a + kTileRows * kStep};
    operands_.pack_queries(r.q, p_, t_, batch, head, i0, rows);
    for (int64_t i = 0; i < rows; ++i) r.mu[i] = A(0);
    for (int64_t e = 0; e < rows * dim_v_padded_; ++e) r.o[e] = A(0);

    const TangentTerms<T> terms(p_, t_, batch, head);
    const int64_t last_panel = ceil_div(max64(0, band.end_key(i0 + rows - 1)), kPanelKeys);
    for (int64_t panel = band.first_key(i0) / kPanelKeys; panel < last_panel;) {
      // The next run of up to kPanelsPerStep panels that some row attends to.
      int64_t run = 0;
      while (run < kPanelsPerStep && panel + run < last_panel &&
             any_attends(terms.terms.mask, i0, i0 + rows, (panel + run) * kPanelKeys,
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
        step(KeyStep<T>{batch, head, band, terms.terms, j0, keys}, terms, i0, tile,
             min64(kTileRows, rows - tile), r, packed);
      }
    }
    T* out = query_rows<T>(p_, j_.t_out, batch, head) + i0 * j_.t_out.row_stride;
    const T* primal = query_rows<T>(p_, p_.out, batch, head) + i0 * p_.out.row_stride;
    A* t_lse = static_cast<A*>(j_.t_lse) + lse_offset(p_, batch, head) + i0;
    for (int64_t i = 0; i < rows; ++i) {
      A* t_row = o + i * dim_v_padded_;
      t_lse[i] = mu[i];
      if (!r.softmax[i].sees_nothing()) {
        const T* o_row = primal + i * p_.out.row_stride;
        for (int64_t d = 0; d < p_.head_dim_v; ++d) t_row[d] -= mu[i] * to_acc(o_row[d]);
      }
      convert(out + i * j_.t_out.row_stride, t_row, p_.head_dim_v);
    }
  }

  // Query rows [i0 + tile, + rows) against the keys of a step.
  void step(const KeyStep<T>& where, const TangentTerms<T>& terms, int64_t i0, int64_t tile,
            int64_t rows, const Rows& r, const E* packed) const {
    const int64_t i = i0 + tile;
    for (int64_t c = 0; c < where.keys; c += kPanelKeys) {
      const E* panel = packed + (where.j0 + c) * operands_.k_words;
      for (int64_t strip = 0; strip < rows; strip += kRows) {
        const int strip_rows = static_cast<int>(min64(kRows, rows - strip));
        const int64_t seen = min64(kPanelKeys, where.to(i + strip + strip_rows - 1) - c);
        if (seen <= 0 || where.from(i + strip) >= c + kPanelKeys) continue;
        operands_.multiply(strip_rows, static_cast<int>(ceil_div(seen, kWidth<A>)),
                           r.q + (tile + strip) * operands_.q_words, panel, r.s + strip * kStep + c,
                           r.a + strip * kStep + c, kStep);
      }
    }
    for (int64_t strip = 0; strip < rows; strip += kRows) {
      const int64_t strip_rows = min64(kRows, rows - strip);
      const StripKeys seen = keys_of_strip<E>(where, i + strip, strip_rows);
      for (int64_t k = strip; seen.from < seen.to && k < strip + strip_rows; ++k) {
        A *s = r.s + k * kStep, *a = r.a + k * kStep;
        row(where, terms, i + k, r.softmax[tile + k], seen, s, a, r.mu[tile + k], r.z);
        round_row(reinterpret_cast<E*>(s), s, round_up(seen.to, kWidth<A>));
        round_row(reinterpret_cast<E*>(a), a, round_up(seen.to, kWidth<A>));
      }
    }
    for (int64_t d = 0; d < p_.head_dim_v; d += kPanelKeys) {
      const E* v = packed + k_elements_ + d * key_words_ + words<E>(where.j0) * kPanelKeys;
      const int vecs = static_cast<int>(ceil_div(min64(kPanelKeys, p_.head_dim_v - d), kWidth<A>));
      for (int64_t strip = 0; strip < rows; strip += kRows) {
        const int strip_rows = static_cast<int>(min64(kRows, rows - strip));
        const StripKeys seen = keys_of_strip<E>(where, i + strip, strip_rows);
        if (seen.from >= seen.to) continue;
        const int64_t first = seen.from / kDepth<E>, depth = words<E>(seen.to) - first;
        A* o = r.o + (tile + strip) * dim_v_padded_ + d;
        const auto add = [&](const A* weights, const E* values) {
          const E* w = reinterpret_cast<const E*>(weights + strip * kStep) + first;
          micro_kernel<Start::kAdd>(strip_rows, vecs, depth, Strided<E>{w, kStep, 1},
                                    values + first * kPanelKeys, kPanelKeys, o, dim_v_padded_);
        };
        if (t_.of_scores()) add(r.a, v);
        if (t_.v.data) add(r.s, v + v_elements_);
      }
    }
  }

  // Products of row i -> Z * P and Z * P * A of the strip's keys; adds to mu.
  void row(const KeyStep<T>& where, const TangentTerms<T>& terms, int64_t i,
           const SoftmaxRow<A>& softmax, const StripKeys& strip, A* s, A* a, A& mu, A* z) const {
    // strip.to, in whole words, may be one past the keys.
    const int64_t from = min64(min64(strip.to, where.keys), max64(strip.from, where.from(i)));
    int64_t to = max64(from, where.to(i));
    if (softmax.sees_nothing()) to = from;  // nothing to attend to
    const int64_t begin = from / kWidth<A> * kWidth<A>, end = round_up(to, kWidth<A>);
    terms.apply(s + begin, a + begin, i, where.j0 + begin, to - begin, softmax, z, nullptr);
    for (int64_t j = min64(begin, strip.from); j < from; ++j) s[j] = a[j] = A(0);
    for (int64_t j = to; j < round_up(strip.to, kWidth<A>); ++j) s[j] = a[j] = A(0);
    Vec<A> sum{};
    for (int64_t j = begin; j < end; j += kWidth<A>) {
      const Vec<A> weighted = load(s + j) * load(a + j);
      sum += weighted;
      store(a + j, weighted);
    }
    mu += reduce_add(sum);
    if (!dropout_.active) return;
    dropout_.fill(z, where.batch, where.head, i, where.j0 + begin, end - begin);
    row_multiply(s + begin, z, end - begin);
    row_multiply(a + begin, z, end - begin);
  }

  const AttentionJvpProblem& j_;
  const AttentionProblem& p_;
  const AttentionTangents& t_;
  const Parallel& parallel_;
  Dropout dropout_;
  ScoreOperands<T> operands_;
  bool clear_hidden_ = false;
  int64_t v_panels_ = 0, dim_v_padded_ = 0, key_words_ = 0, k_elements_ = 0, v_elements_ = 0;
};

template <class T>
void attention_jvp(const AttentionJvpProblem& p, const Parallel& parallel) {
  const OwnForward<T> forward(p.forward, parallel);
  AttentionJvpProblem own = p;
  own.forward = forward.problem;
  AttentionJvp<T>(own, parallel).run();
}

}  // namespace fastattn::cpu::FASTATTN_ISA
