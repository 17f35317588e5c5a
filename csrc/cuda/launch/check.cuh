// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastattn::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not by the next call
  throw std::runtime_error(std::string("fastattn: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace fastattn::cuda
