// Linear+ReLU: a kernel for each product, and one more where its sum is split.
#include <algorithm>

#include "cuda/launch/config.cuh"
#include "cuda/launch/runtime.cuh"

namespace fastattn::cuda {
namespace {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_kernel(const __grid_constant__ LinearParameters p) {
  Tile::run(p);
}
template <class T, LinearPass kPass>
__global__ void __launch_bounds__(256)
    add_splits_kernel(const __grid_constant__ LinearParameters p) {
  add_splits<T, kPass>(p);
}

// A matrix [rows, cols] in memory.
struct Matrix {
  const void* data;
  int64_t rows, cols, stride;
};

struct Plan {
  int columns, splits;
  int64_t tiles;  // of one part

  Plan(int64_t rows, int64_t cols, int64_t depth) {
    const int64_t all = device_attribute(cudaDevAttrMultiProcessorCount);
    const auto count = [&](int64_t width) {
      return (rows + 127) / 128 * ((cols + width - 1) / width);
    };
    columns = count(256) >= all ? 256 : 128;
    tiles = count(columns);
    const int64_t steps = (depth + 63) / 64;
    const int64_t most = std::min(kMostSplits, steps / kLeastSteps);
    splits = static_cast<int>(std::max<int64_t>(1, std::min(most, all / tiles)));
  }
};

// The sums of split products, after each other: none is in use beside another.
int64_t floats(int64_t rows, int64_t cols, int64_t depth) {
  const Plan plan(rows, cols, depth);
  return plan.splits == 1 ? 0 : plan.splits * rows * (cols + 1);
}

template <class T, LinearPass kPass>
void launch_pass(Dtype dtype, LinearParameters p, const Matrix& a, const Matrix& b,
                 const Launch& launch) {
  constexpr bool kForward = kPass == LinearPass::kForward;
  const Plan plan(p.rows, p.cols, p.depth);
  const auto map = [&](const Matrix& m, int box_rows) {
    return tensor_map<2>(dtype, m.data, {m.cols, m.rows}, {m.stride}, box_rows);
  };
  p.a = map(a, kPass == LinearPass::kGradWeight ? 64 : 128);
  p.b = map(b, kForward ? plan.columns : 64);
  p.splits = plan.splits;
  if (p.splits > 1) {
    p.sums = reinterpret_cast<float*>(launch.workspace);
    p.bias_sums = p.sums + p.splits * p.rows * p.cols;
  }
  const auto run = [&]<class Tile>() {
    launch_persistent(linear_kernel<Tile>, p, plan.tiles * p.splits, Tile::kThreads,
                      Tile::kSharedBytes, launch);
  };
  if (plan.columns == 256) {
    run.template operator()<LinearTile<T, kPass, 256>>();
  } else {
    run.template operator()<LinearTile<T, kPass, 128>>();
  }
  if (p.splits == 1) return;
  const int64_t threads = p.rows * ((p.cols + 7) / 8);
  add_splits_kernel<T, kPass><<<static_cast<unsigned>((threads + 255) / 256), 256, 0,
                                static_cast<cudaStream_t>(launch.stream)>>>(p);
  check(cudaGetLastError(), "launch of add_splits");
}

}  // namespace

std::string linear_refusal(Dtype dtype, int64_t m, int64_t n, int64_t k) {
  if (capability() != 90) return "the GPU is not of compute capability 9.0";
  if (dtype != Dtype::kBFloat16 && dtype != Dtype::kFloat16)
    return "the dtype is neither bfloat16 nor float16";
  if (m * n * k == 0) return "an extent is 0";
  if (std::max({m, n, k}) >= int64_t{1} << 30) return "an extent is 2^30 or more";
  return "";
}

size_t linear_forward_workspace(const LinearProblem& p) {
  return sizeof(float) * static_cast<size_t>(floats(p.m, p.n, p.k));
}

void launch_linear_forward(const LinearProblem& l, const Launch& launch) {
  with_type(l.dtype, [&]<class T>() {
    LinearParameters p{};
    p.rows = l.m;
    p.cols = l.n;
    p.depth = l.k;
    p.bias = l.bias;
    p.out = l.y;
    p.relu_mask = l.relu_mask;
    p.mask_bytes = (l.n + 7) / 8;
    launch_pass<T, LinearPass::kForward>(l.dtype, p, {l.x, l.m, l.k, l.x_stride},
                                         {l.w, l.n, l.k, l.w_stride}, launch);
  });
}

size_t linear_backward_workspace(const LinearBackwardProblem& p) {
  return sizeof(float) *
         static_cast<size_t>(std::max(floats(p.m, p.k, p.n), floats(p.n, p.k, p.m)));
}

void launch_linear_backward(const LinearBackwardProblem& l, const Launch& launch) {
  with_type(l.dtype, [&]<class T>() {
    LinearParameters p{};
    p.relu_mask = const_cast<uint8_t*>(l.relu_mask);
    p.mask_bytes = (l.n + 7) / 8;
    const Matrix grad_y{l.grad_y, l.m, l.n, l.grad_y_stride};
    if (l.grad_x != nullptr) {
      p.rows = l.m;
      p.cols = l.k;
      p.depth = l.n;
      p.out = l.grad_x;
      launch_pass<T, LinearPass::kGradInput>(l.dtype, p, grad_y, {l.w, l.n, l.k, l.w_stride},
                                             launch);
    }
    if (l.grad_w != nullptr) {
      p.rows = l.n;
      p.cols = l.k;
      p.depth = l.m;
      p.out = l.grad_w;
      p.grad_bias = l.grad_bias;
      launch_pass<T, LinearPass::kGradWeight>(l.dtype, p, grad_y, {l.x, l.m, l.k, l.x_stride},
                                              launch);
    }
  });
}

}  // namespace fastattn::cuda
