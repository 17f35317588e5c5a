// Tensors as the kernels take them: new ones, copies with a unit last stride, views.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/problem.h"

namespace fastattn {

inline ScalarType accumulator_type(ScalarType t) {
  return t == ScalarType::Double ? t : ScalarType::Float;
}

// A new tensor from make(). Of an error there, torch's interface tells no more than that there was
// one; it is the memory, as everything else has been checked.
template <class F>
Tensor allocated(const Shape& shape, ScalarType dtype, const F& make) {
  try {
    return make();
  } catch (const std::exception&) {
    int64_t elements = 1;
    for (int64_t size : shape) elements *= size;
    STD_TORCH_CHECK(false, "fastattn: cannot allocate a tensor of shape ", text(shape), ", ",
                    elements, " x ", torch::headeronly::toString(dtype));
  }
}

// The last stride must be 1 for the kernels; a copy is made where it is not.
inline Tensor unit_last_stride(const Tensor& t) {
  if (t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1) return t;
  return allocated(shape_of(t), t.scalar_type(), [&] { return torch::stable::contiguous(t); });
}

inline Tensor empty_like_device(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return allocated(shape, dtype, [&] {
    return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
  });
}

// A [*batch, heads, rows, cols] tensor; a stride is 0 where an extent of 1 stands for the full one.
inline TensorView view_of(const Tensor& t, bool broadcast = false) {
  const int64_t rank = t.dim();
  const auto stride = [&](int64_t d) {
    return broadcast && t.size(d) == 1 ? int64_t{0} : t.stride(d);
  };
  TensorView view;
  view.data = static_cast<char*>(t.data_ptr());
  for (int64_t d = 0; d < rank - 3; ++d) view.batch_strides[d] = stride(d);
  view.head_stride = stride(rank - 3);
  view.row_stride = stride(rank - 2);
  view.col_stride = stride(rank - 1);
  return view;
}

// t [*, n] as m rows with a unit last stride.
inline Tensor as_rows(const Tensor& t, int64_t m, int64_t n) {
  const Tensor unit = unit_last_stride(t);
  if (unit.dim() == 2) return unit;
  const int64_t folded[] = {m, n};
  return allocated({m, n}, t.scalar_type(),
                   [&] { return torch::stable::reshape(unit, {folded, 2}); });
}

// Dropout of a matrix of m rows, and its seeds: int64 [n], n a divisor of m, as the problem reads
// them; none where nothing is dropped.
template <class Problem>
std::optional<Tensor> take_dropout(const char* op, const std::optional<Tensor>& seed,
                                   double dropout_p, const Tensor& like, Problem& p) {
  FASTATTN_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p", "a probability in [0, 1)",
                 dropout_p);
  p.dropout_p = dropout_p;
  if (dropout_p == 0.0) return std::nullopt;
  FASTATTN_CHECK(seed.has_value(), op, "seed", "an int64 tensor, as dropout_p > 0", "None");
  check_like(op, "seed", *seed, ScalarType::Long, like);
  const int64_t count = seed->numel();
  FASTATTN_CHECK(count >= 1 && p.m % count == 0, op, "seed",
                 "a number of seeds that divides the " + std::to_string(p.m) + " rows", count);
  const Tensor seeds =
      allocated({count}, ScalarType::Long, [&] { return torch::stable::contiguous(*seed); });
  p.seeds = static_cast<const int64_t*>(seeds.data_ptr());
  p.rows_of_seed = p.m / count;
  return seeds;
}

}  // namespace fastattn
