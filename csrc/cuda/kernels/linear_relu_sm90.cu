// Compiled for sm_90a; the launches are to come.
#include "cuda/kernels/linear_relu_sm90.h"

namespace fastattn::cuda {

template <class T, int kBlockN, int kStages>
__global__ void __launch_bounds__(LinearForward<T, kBlockN, kStages>::kThreads, 1)
    linear_relu_forward_sm90(const __grid_constant__ LinearParameters p) {
  LinearForward<T, kBlockN, kStages>::run(p);
}

template __global__ void linear_relu_forward_sm90<__nv_bfloat16, 128, 6>(
    const __grid_constant__ LinearParameters);
template __global__ void linear_relu_forward_sm90<__half, 128, 6>(
    const __grid_constant__ LinearParameters);
template __global__ void linear_relu_forward_sm90<__nv_bfloat16, 256, 4>(
    const __grid_constant__ LinearParameters);
template __global__ void linear_relu_forward_sm90<__half, 256, 4>(
    const __grid_constant__ LinearParameters);

}  // namespace fastattn::cuda
