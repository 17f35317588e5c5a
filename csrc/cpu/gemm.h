// C [m, n] = A [m, k] B [k, n], tile by tile, with the operands brought in and the result taken out
// by functors:
//   load_b(panel, j0, cols, dst)  writes B's columns [j0, j0 + cols) as one panel [k, kPanel], zero
//   past `cols`; load_a(i0, rows, first_columns, scratch) -> Strips<A>  gives rows [i0, i0 + rows)
//   of A, in place or in `scratch`,
//                                 which holds kBlockM * k elements; first_columns is true once for
//                                 every block of rows;
//   store_c(i, j0, cols, row)     takes row i of C, columns [j0, j0 + cols), from the tile in L1.
// B is packed once, in parallel; then a task owns one block of rows and a group of panels.
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

constexpr int64_t kBlockM = 96;       // 16 strips of 6 rows
constexpr int64_t kBlockDepth = 512;  // one panel's share: 128 KB in fp32, streamed from L2
constexpr double kSerialFlops = 3e6;  // below this a second thread costs more than it saves

template <class A, class LoadA, class LoadB, class StoreC>
void gemm(int64_t m, int64_t n, int64_t k, const LoadA& load_a, const LoadB& load_b,
          const StoreC& store_c, const Parallel& threads) {
  if (m == 0 || n == 0) return;
  Parallel parallel = threads;
  if (2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) <
      kSerialFlops) {
    parallel.threads = 1;
  }
  const int64_t panels = ceil_div(n, kPanel<A>), row_blocks = ceil_div(m, kBlockM);
  const int64_t groups = row_blocks >= 2 * parallel.threads
                             ? 1
                             : min64(panels, ceil_div(2 * parallel.threads, row_blocks));
  const int64_t panels_per_group = ceil_div(panels, groups);

  A* packed_b = thread_scratch<A>(4, panels * kPanel<A> * k);  // [panels][k][kPanel]
  parallel_tasks(parallel, panels, [&](int64_t panel) {
    const int64_t j0 = panel * kPanel<A>;
    load_b(j0, min64(kPanel<A>, n - j0), packed_b + j0 * k);
  });
  parallel_tasks(parallel, row_blocks * groups, [&](int64_t task) {
    const int64_t i0 = task / groups * kBlockM, rows = min64(kBlockM, m - i0);
    const int64_t first = task % groups * panels_per_group,
                  last = min64(panels, first + panels_per_group);
    A* scratch = thread_scratch<A>(5, kBlockM * k + kBlockM * kPanel<A> + 64);
    A* c = scratch + round_up(kBlockM * k, 16);  // [kBlockM, kPanel]
    const Strips<A> a = load_a(i0, rows, task % groups == 0, scratch);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t j0 = panel * kPanel<A>, cols = min64(kPanel<A>, n - j0);
      const int vecs = static_cast<int>(ceil_div(cols, kWidth<A>));
      for (int64_t d = 0; d == 0 || d < k; d += kBlockDepth) {
        const int64_t depth = min64(kBlockDepth, k - d);
        for (int64_t strip = 0; strip < rows; strip += kRows) {
          const Strided<A> a_strip{a.data + strip / kRows * a.strip + d * a.depth, a.row, a.depth};
          const int strip_rows = static_cast<int>(min64(kRows, rows - strip));
          const A* b = packed_b + j0 * k + d * kPanel<A>;
          A* c_strip = c + strip * kPanel<A>;
          if (d == 0) {
            micro_kernel<Start::kZero>(strip_rows, vecs, depth, a_strip, b, kPanel<A>, c_strip,
                                       kPanel<A>);
          } else {
            micro_kernel<Start::kAdd>(strip_rows, vecs, depth, a_strip, b, kPanel<A>, c_strip,
                                      kPanel<A>);
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) store_c(i0 + i, j0, cols, c + i * kPanel<A>);
    }
  });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
