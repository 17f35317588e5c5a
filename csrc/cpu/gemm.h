// C [m, n] = A [m, k] B [k, n]. A task owns a block of C: it packs the columns of B that it needs
// and lets its rows of A pass by them, kBlockM at a time, whose part of C stays in L2 until all
// depth is summed. Three functors bring the operands in and take the result out; offsets and
// extents are in elements of A, B and C:
//   load_a(i0, rows, d, depth, first_columns, scratch) -> Strips<E>
//       A's rows [i0, i0 + rows) and columns [d, d + depth), in place or in `scratch`, which holds
//       kBlockM * kBlockDepth words and kWidth more; first_columns is true for one task of each
//       block of rows;
//   load_b(d, depth, j0, cols, dst, panel_words) -> Panels<E>
//       B's rows [d, d + depth) and columns [j0, j0 + cols), in place or as panels
//       [words(depth), kPanel] in `dst`, panel_words from one to the next, zero past `cols`;
//   store_c(i, j0, cols, row)
//       takes row i of C, columns [j0, j0 + cols), and may change `row`. A product whose panels of
//       C belong together two by two takes store_c(i, j0, cols, row, before): `before` is the same
//       row in the panel before, as store_c has left it.
// A C without an epilogue is given as `plain_c`: whole panels are written directly, and store_c is
// called for the columns past the last whole panel alone.
// How C is cut into tasks does not change any sum.
#pragma once

#include <type_traits>

#include "cpu/micro_kernel.h"
#include "cpu/pack.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Rows of A in strips of kRows: strip s begins at data + s * strip and is read as Strided.
template <class E>
struct Strips {
  const E* data;
  int64_t strip;
  int64_t row;
  int64_t depth;

  static Strips row_major(const E* data, int64_t stride) {
    return {data, kRows * stride, stride, 1};
  }
};

// B's columns in panels of kPanel: panel p begins at data + p * panel, its words of depth `stride`
// apart.
template <class E>
struct Panels {
  const E* data;
  int64_t panel;
  int64_t stride;
};

// C itself, where the products are its elements, rounded or not.
template <class C>
struct PlainC {
  C* data;  // may be absent
  int64_t stride;
};

constexpr int64_t kBlockM = 96;       // 16 strips of 6 rows
constexpr int64_t kBlockDepth = 384;  // words: a panel of 16 columns is 24 KB of L1
constexpr int64_t kDepthUnit = 8;     // of a block of depth: whole bytes of a bit-mask
constexpr int64_t kPackedBytes = int64_t{13} << 18;  // of B at a time: they stay in L3
constexpr int64_t kMostBlocks = 8;                   // of depth at a time: an array on the stack
constexpr int64_t kFlatPanels = 6144;                // elements of all panels: 24 KB of L1
constexpr int64_t kKeptRows = 960;  // of a task whose C is kept from round to round of B
constexpr int64_t kTaskVecs = 96;   // of a task's columns: 768 floats on AVX2, 1536 on AVX-512

// c [panels * kPanel] = the word `a` times one row of B: it takes longer to write than to multiply.
template <bool kStream, class E, class C>
FASTATTN_INLINE void single_products(const E* a, const Panels<E>& b, int64_t panels, C* c) {
  using A = Acc<E>;
  const auto word = Multiply<E>::word(a);
  for (int64_t panel = 0; panel < panels; ++panel) {
#pragma GCC unroll 8
    for (int v = 0; v < kPanelVecs; ++v) {
      Vec<A> product{};
      Multiply<E>::add(product, word,
                       Multiply<E>::load_words(b.data + panel * b.panel + v * kWidth<A>));
      C* dst = c + panel * kPanel<A> + v * kWidth<A>;
      if constexpr (kStream) {
        stream_acc(dst, product);
      } else {
        store_acc(dst, product);
      }
    }
  }
}

// Whether C [m, n] is written past the caches: it is larger than a core's, and its rows are lines.
template <class C>
bool streaming_pays(const PlainC<C>& c, int64_t m, int64_t n) {
  constexpr int64_t kLine = 64, kStreamedBytes = int64_t{1} << 21, kSize = sizeof(C);
  return m * n * kSize >= kStreamedBytes && c.stride * kSize % kLine == 0 &&
         reinterpret_cast<uintptr_t>(c.data) % kLine == 0;
}

// The threads, or one for a product of which a second thread costs more than it saves.
FASTATTN_INLINE Parallel worthwhile(Parallel threads, int64_t m, int64_t n, int64_t k) {
  constexpr double kSerialFlops = 3e6;
  const double flops =
      2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  if (flops < kSerialFlops) threads.threads = 1;
  return threads;
}

// Equal blocks of a product's depth: a short last one would read and write C for little.
struct DepthBlocks {
  int64_t count, depth;  // of one
};
template <class E>
DepthBlocks cut_depth(int64_t k) {
  const int64_t count = max64(1, ceil_div(words<E>(k), kBlockDepth));
  return {count, max64(1, round_up(ceil_div(k, count), kDepthUnit))};
}

struct Cut {
  int64_t rows, cols;  // of one task
};

// C [m, n] in equal blocks of up to `most_rows` rows and whole multiples of `unit_panels` panels
// for `threads` threads: the cut for which the last thread is done first.
template <class A>
Cut cut_into_tasks(int64_t m, int64_t n, int64_t most_rows, int64_t threads, int64_t unit_panels) {
  constexpr int64_t kRowUnit = 48;  // whole strips of 6 rows and whole bytes of a bit-mask
  const int64_t row_units = ceil_div(m, kRowUnit), unit = unit_panels * kPanel<A>;
  const int64_t col_units = ceil_div(n, unit);
  const int64_t least_across = ceil_div(col_units * unit_panels * kPanelVecs, kTaskVecs);
  const int64_t least_down = ceil_div(m, most_rows);
  Cut best{};
  int64_t best_cost = INT64_MAX;
  for (int64_t across = least_across;
       across == least_across || across <= min64(col_units, least_across + threads); ++across) {
    for (int64_t tasks = threads; tasks <= 2 * threads; tasks += threads) {
      const int64_t down = max64(least_down, min64(row_units, ceil_div(tasks, across)));
      const Cut cut{ceil_div(row_units, down) * kRowUnit, ceil_div(col_units, across) * unit};
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

template <class E, class LoadA, class LoadB, class StoreC, class C = Acc<E>>
void gemm(int64_t m, int64_t n, int64_t k, const LoadA& load_a, const LoadB& load_b,
          const StoreC& store_c, const Parallel& threads, PlainC<C> plain_c = {nullptr, 0}) {
  using A = Acc<E>;
  constexpr bool kPairs = std::is_invocable_v<StoreC, int64_t, int64_t, int64_t, A*, const A*>;
  if (m == 0 || n == 0) return;
  const auto [depth_blocks, block_depth] = cut_depth<E>(k);
  if (depth_blocks > 1) plain_c.data = nullptr;  // a C that is added to lies better in panels
  const bool stream = streaming_pays(plain_c, m, n);
  const Parallel parallel = worthwhile(threads, m, n, k);
  constexpr int64_t kPanelCols = kPanel<A>;
  const int64_t panel_words = words<E>(block_depth) * kPanelCols;
  const int64_t widest_bytes =
      depth_blocks * panel_words * (kTaskVecs / kPanelVecs) * static_cast<int64_t>(sizeof(E));
  const Cut cut = cut_into_tasks<A>(m, n, widest_bytes <= kPackedBytes ? m : kKeptRows,
                                    parallel.threads, kPairs ? 2 : 1);
  const int64_t col_tasks = ceil_div(n, cut.cols), row_tasks = ceil_div(m, cut.rows);

  parallel_tasks(parallel, row_tasks * col_tasks, [&](int64_t task) {
    const int64_t i0 = task / col_tasks * cut.rows, rows = min64(cut.rows, m - i0);
    const int64_t j0 = task % col_tasks * cut.cols, cols = min64(cut.cols, n - j0);
    const int64_t panels = ceil_div(cols, kPanelCols);
    const int64_t affordable =
        kPackedBytes / (panels * panel_words * static_cast<int64_t>(sizeof(E)));
    const int64_t packed_blocks = max64(1, min64(min64(depth_blocks, affordable), kMostBlocks));
    // [packed_blocks][panels][words(block_depth)][kPanel]
    E* packed_b = thread_scratch<E>(Scratch::kPackedB, packed_blocks * panels * panel_words);
    E* scratch = thread_scratch<E>(Scratch::kPackedA, kBlockM * kBlockDepth + 64);
    // Depth that does not fit is summed over in rounds, with all of the task's C kept between them.
    const int64_t kept_rows = depth_blocks > packed_blocks ? rows : min64(rows, kBlockM);
    A* c = thread_scratch<A>(Scratch::kProduct,
                             panels * kept_rows * kPanelCols);  // [panels][kept_rows][kPanel]
    for (int64_t first = 0; first < depth_blocks; first += packed_blocks) {
      const int64_t end = min64(depth_blocks, first + packed_blocks);
      Panels<E> b[kMostBlocks];
      for (int64_t block = first; block < end; ++block) {
        const int64_t d = block * block_depth, depth = max64(0, min64(block_depth, k - d));
        b[block - first] = load_b(d, depth, j0, cols,
                                  packed_b + (block - first) * panels * panel_words, panel_words);
      }
      for (int64_t i = 0; i < rows; i += kBlockM) {
        const int64_t block_rows = min64(kBlockM, rows - i);
        A* c_block = c + (kept_rows == rows ? i : 0) * kPanelCols;
        for (int64_t block = first; block < end; ++block) {
          const int64_t d = block * block_depth, depth = max64(0, min64(block_depth, k - d));
          const Strips<E> a = load_a(i0 + i, block_rows, d, depth, j0 == 0, scratch);
          const auto product = [&](int64_t panel, int64_t strip) {
            const int64_t j = panel * kPanelCols, panel_cols = min64(kPanelCols, cols - j);
            const int vecs = static_cast<int>(ceil_div(panel_cols, kWidth<A>));
            const Strided<E> a_strip{a.data + strip / kRows * a.strip, a.row, a.depth};
            const int strip_rows = static_cast<int>(min64(kRows, block_rows - strip));
            const Panels<E>& columns = b[block - first];
            const E* b_panel = columns.data + panel * columns.panel;
            if (plain_c.data != nullptr && panel_cols == kPanelCols) {
              C* c_strip = plain_c.data + (i0 + i + strip) * plain_c.stride + j0 + j;
              for (int64_t r = strip_rows; r < 2 * strip_rows; ++r) {
                prefetch_bytes(c_strip + r * plain_c.stride,
                               kPanelCols * static_cast<int64_t>(sizeof(C)));
              }
              return micro_kernel<Start::kZero>(strip_rows, vecs, words<E>(depth), a_strip, b_panel,
                                                columns.stride, c_strip, plain_c.stride);
            }
            A* c_strip = c_block + (panel * kept_rows + strip) * kPanelCols;
            if (block == 0) {
              micro_kernel<Start::kZero>(strip_rows, vecs, words<E>(depth), a_strip, b_panel,
                                         columns.stride, c_strip, kPanelCols);
            } else {
              micro_kernel<Start::kAdd>(strip_rows, vecs, words<E>(depth), a_strip, b_panel,
                                        columns.stride, c_strip, kPanelCols);
            }
            if (block + 1 < depth_blocks) return;
            for (int r = 0; r < strip_rows; ++r) {
              A* row = c_strip + r * kPanelCols;
              if constexpr (kPairs) {
                const A* before = panel == 0 ? nullptr : row - kept_rows * kPanelCols;
                store_c(i0 + i + strip + r, j0 + j, panel_cols, row, before);
              } else {
                store_c(i0 + i + strip + r, j0 + j, panel_cols, row);
              }
            }
          };
          if (plain_c.data != nullptr && words<E>(depth) == 1 && cols % kPanelCols == 0) {
            for (int64_t r = 0; r < block_rows; ++r) {
              const E* word = a.data + r / kRows * a.strip + r % kRows * a.row;
              C* c_row = plain_c.data + (i0 + i + r) * plain_c.stride + j0;
              if (stream) {
                single_products<true>(word, b[0], panels, c_row);
              } else {
                single_products<false>(word, b[0], panels, c_row);
              }
            }
            if (stream) streamed();
          } else if (panels * words<E>(depth) * kPanelCols <= kFlatPanels) {
            // C is most of it: whole rows at a time.
            for (int64_t strip = 0; strip < block_rows; strip += kRows) {
              for (int64_t panel = 0; panel < panels; ++panel) product(panel, strip);
            }
          } else {
            for (int64_t panel = 0; panel < panels; ++panel) {
              for (int64_t strip = 0; strip < block_rows; strip += kRows) product(panel, strip);
            }
          }
        }
      }
    }
  });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
