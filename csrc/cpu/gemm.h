// C [m, n] = A [m, k] B [k, n]. A task owns a block of C: it packs the columns of B that it needs,
// kBlockDepth rows of B at a time, and lets its rows of A pass by them. Three functors bring the
// operands in and take the result out:
//   load_a(i0, rows, d, depth, first_columns, scratch) -> Strips<A>
//       A's rows [i0, i0 + rows) and columns [d, d + depth), in place or in `scratch`, which holds
//       kBlockM * kBlockDepth elements and kWidth more; first_columns is true for one task of each
//       block of rows;
//   load_b(d, depth, j0, cols, dst) -> Columns<A>
//       B's rows [d, d + depth) and columns [j0, j0 + cols), in place or as one panel
//       [depth, kPanel] in `dst`, zero past `cols`;
//   store_c(i, j0, cols, row)
//       takes row i of C, columns [j0, j0 + cols), and may change `row`.
// A C that needs no more than to be written is given as `plain_c`: store_c then sees only the
// columns past the last whole panel.
// How C is cut into tasks does not change any sum.
#pragma once

#include "cpu/micro_kernel.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Rows of A in strips of kRows: strip s begins at data + s * strip and is read as Strided.
template <class A>
struct Strips {
  const A* data;
  int64_t strip;
  int64_t row;
  int64_t depth;

  static Strips row_major(const A* data, int64_t stride) {
    return {data, kRows * stride, stride, 1};
  }
};

// A panel of B's columns, row by row.
template <class A>
struct Columns {
  const A* data;
  int64_t stride;
};

// C itself, where the products are its elements.
template <class A>
struct PlainC {
  A* data;  // may be absent
  int64_t stride;
};

constexpr int64_t kBlockM = 96;        // 16 strips of 6 rows
constexpr int64_t kBlockDepth = 256;   // A's block: 96 KB of L2; a panel of 16 columns: 16 KB of L1
constexpr int64_t kFlatPanels = 6144;  // elements of all panels: 24 KB of L1
constexpr int64_t kTaskRows = 960;  // bounds a task's C, which it keeps until all depth is summed
constexpr int64_t kTaskVecs = 96;   // and its width: 768 floats on AVX2, 1536 on AVX-512

// The threads, or one for a product of which a second thread costs more than it saves.
FASTATTN_INLINE Parallel worthwhile(Parallel threads, int64_t m, int64_t n, int64_t k) {
  constexpr double kSerialFlops = 3e6;
  const double flops =
      2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  if (flops < kSerialFlops) threads.threads = 1;
  return threads;
}

struct Cut {
  int64_t rows, cols;  // of one task
};

// C [m, n] in equal blocks for `threads` threads: the cut for which the last thread is done first.
template <class A>
Cut cut_into_tasks(int64_t m, int64_t n, int64_t threads) {
  constexpr int64_t kRowUnit = 48;  // whole strips of 6 rows and whole bytes of a bit-mask
  const int64_t row_units = ceil_div(m, kRowUnit), panels = ceil_div(n, kPanel<A>);
  const int64_t least_across = ceil_div(panels * kPanelVecs, kTaskVecs);
  const int64_t least_down = ceil_div(m, kTaskRows);
  Cut best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t across = least_across;
       across == least_across || across <= min64(panels, least_across + threads); ++across) {
    for (int64_t tasks = threads; tasks <= 2 * threads; tasks += threads) {
      const int64_t down = max64(least_down, min64(row_units, ceil_div(tasks, across)));
      const Cut cut{ceil_div(row_units, down) * kRowUnit, ceil_div(panels, across) * kPanel<A>};
      const int64_t rounds = ceil_div(ceil_div(m, cut.rows) * ceil_div(n, cut.cols), threads);
      // A product's element takes 1/16 cycle a depth, one that is loaded or packed about 1 and 2.
      const int64_t cost = rounds * (cut.rows * cut.cols + 16 * cut.rows + 32 * cut.cols);
      if (cost < best_cost) {
        best_cost = cost;
        best = cut;
      }
    }
  }
  return best;
}

template <class A, class LoadA, class LoadB, class StoreC>
void gemm(int64_t m, int64_t n, int64_t k, const LoadA& load_a, const LoadB& load_b,
          const StoreC& store_c, const Parallel& threads, PlainC<A> plain_c = {nullptr, 0}) {
  if (m == 0 || n == 0) return;
  if (k > kBlockDepth) plain_c.data = nullptr;  // a C that is added to lies better in panels
  const Parallel parallel = worthwhile(threads, m, n, k);
  constexpr int64_t kPanelCols = kPanel<A>;
  const Cut cut = cut_into_tasks<A>(m, n, parallel.threads);
  const int64_t col_tasks = ceil_div(n, cut.cols), row_tasks = ceil_div(m, cut.rows);

  parallel_tasks(parallel, row_tasks * col_tasks, [&](int64_t task) {
    const int64_t i0 = task / col_tasks * cut.rows, rows = min64(cut.rows, m - i0);
    const int64_t j0 = task % col_tasks * cut.cols, cols = min64(cut.cols, n - j0);
    const int64_t panels = ceil_div(cols, kPanelCols), panel_elements = kBlockDepth * kPanelCols;
    A* packed_b = thread_scratch<A>(4, panels * panel_elements);  // [panels][depth][kPanel]
    A* scratch = thread_scratch<A>(5, kBlockM * kBlockDepth + 64);
    A* c = thread_scratch<A>(6, panels * rows * kPanelCols);  // [panels][rows][kPanel]
    for (int64_t d = 0; d == 0 || d < k; d += kBlockDepth) {
      const int64_t depth = min64(kBlockDepth, k - d);
      const bool last = d + kBlockDepth >= k;
      Columns<A> b[kTaskVecs];
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t j = panel * kPanelCols;
        b[panel] = load_b(d, depth, j0 + j, min64(kPanelCols, cols - j),
                          packed_b + panel * panel_elements);
      }
      for (int64_t block = 0; block < rows; block += kBlockM) {
        const int64_t block_rows = min64(kBlockM, rows - block);
        const Strips<A> a = load_a(i0 + block, block_rows, d, depth, j0 == 0, scratch);
        const auto product = [&](int64_t panel, int64_t strip) {
          const int64_t j = panel * kPanelCols, panel_cols = min64(kPanelCols, cols - j);
          const int vecs = static_cast<int>(ceil_div(panel_cols, kWidth<A>));
          const Strided<A> a_strip{a.data + strip / kRows * a.strip, a.row, a.depth};
          const int strip_rows = static_cast<int>(min64(kRows, block_rows - strip));
          const bool plain = plain_c.data != nullptr && panel_cols == kPanelCols;
          const int64_t c_stride = plain ? plain_c.stride : kPanelCols;
          A* c_strip = plain ? plain_c.data + (i0 + block + strip) * c_stride + j0 + j
                             : c + (panel * rows + block + strip) * kPanelCols;
          if (d == 0) {
            micro_kernel<Start::kZero>(strip_rows, vecs, depth, a_strip, b[panel].data,
                                       b[panel].stride, c_strip, c_stride);
          } else {
            micro_kernel<Start::kAdd>(strip_rows, vecs, depth, a_strip, b[panel].data,
                                      b[panel].stride, c_strip, c_stride);
          }
        };
        const auto finish = [&](int64_t panel) {
          const int64_t j = panel * kPanelCols, panel_cols = min64(kPanelCols, cols - j);
          if (!last || (plain_c.data != nullptr && panel_cols == kPanelCols)) return;
          for (int64_t i = 0; i < block_rows; ++i) {
            store_c(i0 + block + i, j0 + j, panel_cols,
                    c + (panel * rows + block + i) * kPanelCols);
          }
        };
        if (panels * depth * kPanelCols <= kFlatPanels) {  // C is most of it: whole rows at a time
          for (int64_t strip = 0; strip < block_rows; strip += kRows) {
            for (int64_t panel = 0; panel < panels; ++panel) product(panel, strip);
          }
          for (int64_t panel = 0; panel < panels; ++panel) finish(panel);
        } else {
          for (int64_t panel = 0; panel < panels; ++panel) {
            for (int64_t strip = 0; strip < block_rows; strip += kRows) product(panel, strip);
            finish(panel);
          }
        }
      }
    }
  });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
