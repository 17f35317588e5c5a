// Errors of the ops: the argument's name, what was expected, what was got.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>

namespace fastattn {

using torch::stable::Tensor;

inline std::string to_string(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

}  // namespace fastattn

// What was expected and got is put into words only where the check fails.
#define FASTATTN_CHECK(ok, op, argument, expected, got) \
  STD_TORCH_CHECK(ok, "fastattn::", op, ": ", argument, ": expected ", expected, ", got ", got)
