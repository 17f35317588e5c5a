// Linear+ReLU: a kernel for each product, and one more where its sum is split. Small MLPs: a kernel
// for all layers in each direction, and for each gradient of a weight one as of a linear layer.
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
__global__ void __launch_bounds__(kSplitThreads)
    add_splits_kernel(const __grid_constant__ LinearParameters p) {
  add_splits<T, kPass>(p);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    mlp_kernel(const __grid_constant__ MlpParameters p) {
  Tile::run(p);
}

// A matrix [rows, cols] in memory.
struct Matrix {
  const void* data;
  int64_t rows, cols, stride;
};

CUtensorMap map_of(Dtype dtype, const Matrix& m, int box_rows) {
  return tensor_map<2>(dtype, m.data, {m.cols, m.rows}, {m.stride}, box_rows);
}

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

// Floats of the workspace for split sums. Products run one after another and share it.
int64_t floats(int64_t rows, int64_t cols, int64_t depth) {
  const Plan plan(rows, cols, depth);
  return plan.splits == 1 ? 0 : plan.splits * rows * (cols + 1);
}

template <class T, LinearPass kPass>
void launch_pass(Dtype dtype, LinearParameters p, const Matrix& a, const Matrix& b,
                 const Launch& launch) {
  constexpr bool kForward = kPass == LinearPass::kForward;
  const Plan plan(p.rows, p.cols, p.depth);
  p.a = map_of(dtype, a, kPass == LinearPass::kGradWeight ? 64 : 128);
  p.b = map_of(dtype, b, kForward ? plan.columns : 64);
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
  add_splits_kernel<T, kPass>
      <<<static_cast<unsigned>((threads + kSplitThreads - 1) / kSplitThreads), kSplitThreads, 0,
         static_cast<cudaStream_t>(launch.stream)>>>(p);
  check(cudaGetLastError(), "launch of add_splits");
}

template <class T, bool kForward>
void launch_chain(const MlpParameters& p, int columns, const Launch& launch) {
  const auto run = [&]<class Tile>() {
    allow_shared(mlp_kernel<Tile>, Tile::kSharedBytes);
    mlp_kernel<Tile><<<static_cast<unsigned>((p.rows + 63) / 64), Tile::kThreads,
                       Tile::kSharedBytes, static_cast<cudaStream_t>(launch.stream)>>>(p);
    check(cudaGetLastError(), "launch of mlp");
  };
  if (columns == 256) {
    run.template operator()<MlpTile<T, kForward, 256>>();
  } else {
    run.template operator()<MlpTile<T, kForward, 128>>();
  }
}

// Of the layers whose results the kernel holds.
template <class Layers>
int columns_of(const Layers* layers, size_t count) {
  int64_t widest = 0;
  for (size_t l = 0; l < count; ++l) widest = std::max(widest, layers[l].n);
  return widest > 128 ? 256 : 128;
}

// The gradients of the hidden activations, and what is behind them: sums of split products.
struct MlpWorkspace {
  char* hidden[MlpParameters::kMostLayers];  // [m, strides[l]]
  int64_t strides[MlpParameters::kMostLayers];
  float* sums;
  size_t bytes;

  MlpWorkspace(const LinearBackwardProblem* layers, size_t count, char* memory) {
    Carver carver(memory);
    int64_t most = 0;
    for (size_t l = 0; l < count; ++l) {
      const LinearBackwardProblem& b = layers[l];
      strides[l] = (b.n + 7) / 8 * 8;
      if (l + 1 < count) hidden[l] = carver.take<char>(2 * b.m * strides[l]);
      if (b.grad_w != nullptr) most = std::max(most, floats(b.n, b.k, b.m));
      if (b.grad_x != nullptr) most = std::max(most, floats(b.m, b.k, b.n));
    }
    sums = carver.take<float>(most);
    bytes = carver.bytes();
  }
};

}  // namespace

std::string unsupported_mlp(const LinearProblem* layers, size_t count) {
  if (count > MlpParameters::kMostLayers) return "there are more than 8 layers";
  for (size_t l = 0; l < count; ++l) {
    const LinearProblem& p = layers[l];
    std::string reason = unsupported_linear(p.dtype, p.m, p.n, p.k);
    if (reason.empty() && p.n > 256) reason = "a layer is wider than 256";
    if (!reason.empty()) return reason;
  }
  return "";
}

void launch_mlp_forward(const LinearProblem* layers, size_t count, const Launch& launch) {
  with_type(layers[0].dtype, [&]<class T>() {
    const LinearProblem& first = layers[0];
    const int columns = columns_of(layers, count);
    MlpParameters p{};
    p.first = map_of(first.dtype, {first.x, first.m, first.k, first.x_stride}, 64);
    p.count = static_cast<int>(count);
    p.rows = first.m;
    for (size_t l = 0; l < count; ++l) {
      const LinearProblem& layer = layers[l];
      p.layers[l] = {map_of(layer.dtype, {layer.w, layer.n, layer.k, layer.w_stride}, columns),
                     layer.bias,
                     nullptr,
                     layer.y,
                     layer.n,
                     static_cast<int>(layer.n),
                     static_cast<int>(layer.k)};
    }
    launch_chain<T, true>(p, columns, launch);
  });
}

size_t mlp_backward_workspace(const LinearBackwardProblem* layers, size_t count) {
  return MlpWorkspace(layers, count, nullptr).bytes;
}

void launch_mlp_backward(const LinearBackwardProblem* layers, size_t count, const Launch& launch) {
  with_type(layers[0].dtype, [&]<class T>() {
    const MlpWorkspace workspace(layers, count, launch.workspace);
    const LinearBackwardProblem& last = layers[count - 1];
    const auto gradient_of = [&](size_t l) -> Matrix {
      if (l + 1 == count) return {last.grad_y, last.m, last.n, last.grad_y_stride};
      return {workspace.hidden[l], last.m, layers[l].n, workspace.strides[l]};
    };
    MlpParameters p{};
    p.first = map_of(last.dtype, gradient_of(count - 1), 64);
    p.rows = last.m;
    for (size_t l = count - 1; l > 0; --l) {
      const LinearBackwardProblem& layer = layers[l];
      p.layers[p.count++] = {map_of(layer.dtype, {layer.w, layer.n, layer.k, layer.w_stride}, 64),
                             nullptr,
                             layers[l - 1].relu_output,
                             workspace.hidden[l - 1],
                             workspace.strides[l - 1],
                             static_cast<int>(layer.k),
                             static_cast<int>(layer.n)};
    }
    if (p.count > 0) launch_chain<T, false>(p, columns_of(layers, count - 1), launch);
    const Launch products{launch.stream, reinterpret_cast<char*>(workspace.sums)};
    for (size_t l = 0; l < count; ++l) {
      const LinearBackwardProblem& layer = layers[l];
      LinearParameters q{};
      if (layer.grad_x != nullptr) {
        q.rows = layer.m;
        q.cols = layer.k;
        q.depth = layer.n;
        q.out = layer.grad_x;
        launch_pass<T, LinearPass::kGradInput>(
            layer.dtype, q, gradient_of(l), {layer.w, layer.n, layer.k, layer.w_stride}, products);
      }
      if (layer.grad_w != nullptr) {
        q.rows = layer.n;
        q.cols = layer.k;
        q.depth = layer.m;
        q.out = layer.grad_w;
        q.grad_bias = layer.grad_bias;
        launch_pass<T, LinearPass::kGradWeight>(
            layer.dtype, q, gradient_of(l), {layer.x, layer.m, layer.k, layer.x_stride}, products);
      }
    }
  });
}

std::string unsupported_linear(Dtype dtype, int64_t m, int64_t n, int64_t k) {
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
    p.relu_mask = l.bits;
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
    p.relu_mask = const_cast<uint8_t*>(l.bits);
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
