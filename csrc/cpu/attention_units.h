// Who owns what in the passes over query rows: a unit is a key head with the query heads that share
// its packed keys (or one query head), a block kBlockQ of their rows.
#pragma once

#include "cpu/attention_common.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr int64_t kGroupBytes = int64_t{8} << 20;

template <class E>
struct QueryUnits {
  const AttentionProblem& p;
  const Parallel& parallel;
  int64_t heads_per_unit;
  int64_t unit_elements;  // of a unit's packed keys

  // pack(batch, head, dst) packs the keys of `head` and of the unit's other heads;
  // block(batch, head, i0, packed) owns a block of query rows, perhaps past the end of a packed
  // sequence.
  template <class Pack, class Block>
  void run(const Pack& pack, const Block& block) const {
    const int64_t units = p.batch * units_per_batch();
    if (units >= 4 * parallel.threads || units % parallel.threads == 0) {
      by_unit(units, pack, block);
    } else {
      by_block(units, pack, block);
    }
  }

 private:
  int64_t units_per_batch() const { return p.heads_q / heads_per_unit; }
  int64_t batch_of(int64_t unit) const { return unit / units_per_batch(); }
  int64_t head_of(int64_t unit) const { return unit % units_per_batch() * heads_per_unit; }

  // A task owns the queries of one unit, and its packed keys stay in its core's cache.
  template <class Pack, class Block>
  void by_unit(int64_t units, const Pack& pack, const Block& block) const {
    parallel_tasks(parallel, units, [&](int64_t unit) {
      E* packed = thread_scratch<E>(Scratch::kUnit, unit_elements);
      const int64_t batch = batch_of(unit), rows = Band(p, batch).seq_q;
      pack(batch, head_of(unit), packed);
      for (int64_t h = 0; h < heads_per_unit; ++h) {
        for (int64_t i0 = 0; i0 < rows; i0 += kBlockQ) block(batch, head_of(unit) + h, i0, packed);
      }
    });
  }

  // Too few units to keep the threads busy: a task owns one block of query rows. As many units are
  // packed at a time as fit in kGroupBytes.
  template <class Pack, class Block>
  void by_block(int64_t units, const Pack& pack, const Block& block) const {
    const int64_t unit_bytes = max64(1, unit_elements * static_cast<int64_t>(sizeof(E)));
    const int64_t group = max64(1, min64(units, max64(parallel.threads, kGroupBytes / unit_bytes)));
    const int64_t blocks = ceil_div(p.seq_q, kBlockQ);
    E* packed = thread_scratch<E>(Scratch::kUnit, group * unit_elements);
    for (int64_t first = 0; first < units; first += group) {
      const int64_t count = min64(group, units - first);
      parallel_tasks(parallel, count, [&](int64_t u) {
        pack(batch_of(first + u), head_of(first + u), packed + u * unit_elements);
      });
      const int64_t heads = count * heads_per_unit;
      parallel_tasks(parallel, heads * blocks, [&](int64_t task) {
        // Last blocks first: under a causal mask they are the longest.
        const int64_t i0 = (blocks - 1 - task / heads) * kBlockQ;
        const int64_t u = task % heads / heads_per_unit, unit = first + u;
        block(batch_of(unit), head_of(unit) + task % heads % heads_per_unit, i0,
              packed + u * unit_elements);
      });
    }
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
