// From problems to launches. Torch-free, and free of CUDA's headers. Everything throws
// std::runtime_error with the CUDA call that failed; nothing waits for the GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/problem.h"

namespace fastattn::cuda {

// Where to launch: a cudaStream_t of the current device, and scratch memory of the size asked for.
struct Launch {
  void* stream = nullptr;
  char* workspace = nullptr;  // on the device, 256-byte aligned
};

// The compute capability of the current device, 10 x major + minor.
int capability();

// Why no kernel serves the problem; empty where one does.
std::string unsupported(const AttentionProblem& p, bool backward);

// Tensors come with one batch dimension, and rows that begin at multiples of 16 bytes; the mask
// with the problem's batch dimensions.
size_t attention_forward_workspace(const AttentionProblem& p);
void launch_attention_forward(const AttentionProblem& p, const Launch& launch);
size_t attention_backward_workspace(const AttentionBackwardProblem& p);
void launch_attention_backward(const AttentionBackwardProblem& p, const Launch& launch);

// As above, rows begin at multiples of 16 bytes. Where grad_bias is set, grad_w must be set too.
std::string unsupported_linear(Dtype dtype, int64_t m, int64_t n, int64_t k);
size_t linear_forward_workspace(const LinearProblem& p);
void launch_linear_forward(const LinearProblem& p, const Launch& launch);
size_t linear_backward_workspace(const LinearBackwardProblem& p);
void launch_linear_backward(const LinearBackwardProblem& p, const Launch& launch);

// MLPs of up to eight layers with a ReLU behind all but the last. Only the input may be more than
// 256 wide.
// - Forward: the first layer needs x, the last layer needs y; the other layers may have y.
// - Backward: the last layer needs grad_y, the first layer may have grad_x, and all layers but the
//   last need relu_output.
std::string unsupported_mlp(const LinearProblem* layers, size_t count);
void launch_mlp_forward(const LinearProblem* layers, size_t count, const Launch& launch);
size_t mlp_backward_workspace(const LinearBackwardProblem* layers, size_t count);
void launch_mlp_backward(const LinearBackwardProblem* layers, size_t count, const Launch& launch);

}  // namespace fastattn::cuda
