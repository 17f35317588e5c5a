// Tensors as the kernels take them: new ones, copies with a unit last stride, views.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>

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

}  // namespace fastattn
