// Operands brought into the micro-kernel's layout.
#pragma once

#include "common/parallel.h"
#include "cpu/operand.h"
#include "cpu/scratch.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
T* thread_scratch(Scratch scratch, int64_t count) {
  return static_cast<T*>(thread_scratch_bytes(scratch, count * static_cast<int64_t>(sizeof(T))));
}

template <class F>
void parallel_tasks(const Parallel& parallel, int64_t tasks, const F& body) {
  if (tasks <= 0) return;
  if (tasks == 1 || parallel.threads == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  parallel.run(tasks, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &body);
}

constexpr int64_t kRowsAhead = 16;  // distance of the prefetch, in rows

FASTATTN_INLINE void prefetch_bytes(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b);
}

// dst [rows, padded] = src [rows, cols], columns past `cols` are 0.
template <class T>
void pack_rows(Acc<T>* dst, int64_t padded, const T* src, int64_t src_stride, int64_t rows,
               int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    Acc<T>* row = dst + i * padded;
    convert(row, src + i * src_stride, cols);
    for (int64_t j = cols; j < padded; ++j) row[j] = Acc<T>(0);
  }
}

// Operands whose depth runs along the columns: dst [rows, padded words].
FASTATTN_INLINE void pack_rows(Pair* dst, int64_t padded, const bf16* src, int64_t src_stride,
                               int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i) {
    char* row = reinterpret_cast<char*>(dst + i * padded);
    // Without columns there may be no array, which memcpy does not take.
    if (cols > 0) __builtin_memcpy(row, src + i * src_stride, static_cast<size_t>(2 * cols));
    __builtin_memset(row + 2 * cols, 0, static_cast<size_t>(4 * padded - 2 * cols));
  }
}

// Operands whose depth runs along the rows: dst [words(rows), padded], columns past `cols` are 0.
template <class T>
void pack_depth_rows(Acc<T>* dst, int64_t padded, const T* src, int64_t src_stride, int64_t rows,
                     int64_t cols) {
  pack_rows(dst, padded, src, src_stride, rows, cols);
}
FASTATTN_INLINE void pack_depth_rows(Pair* dst, int64_t padded, const bf16* src, int64_t src_stride,
                                     int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += 2) {
    Pair* row = dst + i / 2 * padded;
    const bf16 *low = src + i * src_stride, *high = low + src_stride;
    if (i + 1 < rows) {
      for (int64_t j = 0; j < cols; ++j) row[j] = Pair{low[j].bits, high[j].bits};
    } else {
      for (int64_t j = 0; j < cols; ++j) row[j] = Pair{low[j].bits, 0};
    }
    for (int64_t j = cols; j < padded; ++j) row[j] = Pair{0, 0};
  }
}

// Depth row `i` of what pack_depth_rows wrote = 0.
template <class E>
FASTATTN_INLINE void clear_depth_row(E* dst, int64_t padded, int64_t i) {
  E* row = dst + i / kDepth<E> * padded;
  for (int64_t j = 0; j < padded; ++j) {
    if constexpr (kPaired<E>) {
      (i % 2 == 0 ? row[j].low : row[j].high) = 0;
    } else {
      row[j] = E(0);
    }
  }
}

#if defined(FASTATTN_AVX512)
// 4-byte elements: dst [16, dst_stride] = transpose of src [16, src_stride].
template <class E>
FASTATTN_INLINE void transpose_tile(E* dst, int64_t dst_stride, const E* src, int64_t src_stride) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d lo = _mm512_castps_pd(t[i + h]), hi = _mm512_castps_pd(t[i + 2 + h]);
      r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  // r[4g + c] now holds, in its 128-bit lane l, column 4l + c of rows 4g .. 4g+3.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88),
                 b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd),
                 e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_storeu_ps(dst + c * dst_stride, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(dst + (4 + c) * dst_stride, _mm512_shuffle_f32x4(d, e, 0x88));
    _mm512_storeu_ps(dst + (8 + c) * dst_stride, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(dst + (12 + c) * dst_stride, _mm512_shuffle_f32x4(d, e, 0xdd));
  }
}
constexpr int kTransposeTile = 16;
#elif defined(FASTATTN_AVX2)
FASTATTN_INLINE void transpose_tile(float* dst, int64_t dst_stride, const float* src,
                                    int64_t src_stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m256d lo = _mm256_castps_pd(t[i + h]), hi = _mm256_castps_pd(t[i + 2 + h]);
      r[i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(lo, hi));
      r[i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(lo, hi));
    }
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(dst + c * dst_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    _mm256_storeu_ps(dst + (4 + c) * dst_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
}
constexpr int kTransposeTile = 8;
#else
constexpr int kTransposeTile = 1;  // none: element by element
#endif

// dst [cols, dst_stride] = transpose of src [rows, cols].
template <class E>
void transpose(E* dst, int64_t dst_stride, const E* src, int64_t src_stride, int64_t rows,
               int64_t cols) {
  int64_t tiled_rows = 0, tiled_cols = 0;
  if constexpr (sizeof(E) == 4 && kTransposeTile > 1) {
    tiled_rows = rows / kTransposeTile * kTransposeTile;
    tiled_cols = cols / kTransposeTile * kTransposeTile;
    for (int64_t i = 0; i < tiled_rows; i += kTransposeTile) {
      for (int64_t j = 0; j < tiled_cols; j += kTransposeTile) {
        transpose_tile(dst + j * dst_stride + i, dst_stride, src + i * src_stride + j, src_stride);
      }
    }
  }
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = j < tiled_cols ? tiled_rows : 0; i < rows; ++i)
      dst[j * dst_stride + i] = src[i * src_stride + j];
  }
}

// One panel of B = src^T: dst [words(depth), kPanel] = src [rows <= kPanel, depth]^T, columns past
// `rows` are 0. `staging` holds kPanel * words(depth) of them.
template <class T, class E = Operand<T>>
void pack_transposed_panel(E* dst, const T* src, int64_t src_stride, int64_t rows, int64_t depth,
                           E* staging) {
  constexpr int64_t kCols = kPanel<Acc<T>>;
  const int64_t count = words<E>(depth);
  if constexpr (sizeof(T) == sizeof(E)) {
    transpose(dst, kCols, src, src_stride, rows, count);
  } else {
    if constexpr (kPaired<E>) {
      if (src_stride % 2 == 0 && depth % 2 == 0) {
        transpose(dst, kCols, reinterpret_cast<const E*>(src), src_stride / 2, rows, count);
      } else {
        pack_rows(staging, count, src, src_stride, rows, depth);
        transpose(dst, kCols, staging, count, rows, count);
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) convert(staging + i * depth, src + i * src_stride, depth);
      transpose(dst, kCols, staging, depth, rows, depth);
    }
  }
  if (rows < kCols) {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = rows; j < kCols; ++j) dst[k * kCols + j] = E{};
    }
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
