// Checks of one tensor, and the errors of the ops: the argument's name, what was expected, what was
// got.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/problem.h"

// What was expected and got is put into words only where the check fails.
#define FASTATTN_CHECK(ok, op, argument, expected, got) \
  STD_TORCH_CHECK(ok, "fastattn::", op, ": ", argument, ": expected ", expected, ", got ", got)

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline std::string to_string(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

inline Shape shape_of(const Tensor& t) { return Shape(t.sizes().begin(), t.sizes().end()); }
inline std::string text(const Shape& shape) { return to_string({shape.data(), shape.size()}); }

inline Dtype dtype_of(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      break;
  }
  FASTATTN_CHECK(false, op, argument, "float32, float64, bfloat16 or float16",
                 torch::headeronly::toString(t.scalar_type()));
  return Dtype::kFloat32;
}

inline void check_like(const char* op, const char* argument, const Tensor& t, ScalarType dtype,
                       const Tensor& first) {
  FASTATTN_CHECK(t.scalar_type() == dtype, op, argument, torch::headeronly::toString(dtype),
                 torch::headeronly::toString(t.scalar_type()));
  FASTATTN_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(),
                 op, argument, "the device of the first argument", "another device");
}

inline void check_shape(const char* op, const char* argument, const Tensor& t,
                        const Shape& expected) {
  FASTATTN_CHECK(shape_of(t) == expected, op, argument, "shape " + text(expected),
                 text(shape_of(t)));
}

}  // namespace fastattn
