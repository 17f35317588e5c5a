// The Hopper linear+ReLU kernel on emulated blocks, against sums in double. A case is "m k n
// blocks".
#include "cuda/kernels/linear_relu_sm90.h"

#include "emulated.h"

using namespace fastattn::cuda;

namespace {

template <class Kernel>
int run(const std::vector<int64_t>& a, emulator::Timing timing) {
  const int64_t m = a[0], k = a[1], n = a[2], mask_bytes = (n + 7) / 8;
  std::mt19937 random(7);
  Tensor4 x(1, 1, m, k), w(1, 1, n, k), bias(1, 1, 1, n), y(1, 1, m, n);
  x.fill(random), w.fill(random, 1.0f / std::sqrt(static_cast<float>(k + 1))), bias.fill(random);
  std::vector<uint8_t> mask(static_cast<size_t>(m * mask_bytes), 0xaa);
  const auto matrix = [](Tensor4& t, int rows) {
    ptx::TensorMap map = t.map(rows);
    map.rank = 2;
    return map;
  };
  const LinearParameters p{matrix(x, Kernel::kBlockM),
                           matrix(w, Kernel::kBlockN),
                           bias.data.data(),
                           y.data.data(),
                           mask.data(),
                           m,
                           n,
                           k};
  emulator::run_grid(static_cast<int>(a[3]), Kernel::kThreads, Kernel::kSharedBytes, timing,
                     [&] { Kernel::run(p); });
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias(0, 0, 0, j), size = std::abs(sum);
      for (int64_t e = 0; e < k; ++e) {
        sum += x(0, 0, i, e) * w(0, 0, j, e);
        size += std::abs(x(0, 0, i, e) * w(0, 0, j, e));
      }
      const double expected = sum > 0 ? sum : 0.0, got = y(0, 0, i, j);
      // One rounding to bf16, k in float.
      const bool close = std::abs(got - expected) <= expected / 256 + 1e-6 * size;
      const bool bit = mask[static_cast<size_t>(i * mask_bytes + j / 8)] >> (j % 8) & 1;
      if (!close || bit != (got > 0)) return failed("y", timing, i, j, got, expected);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, 4, [](const std::vector<int64_t>& a, emulator::Timing timing) {
    if (timing.seed == 1) return run<LinearForward<bf16, 256, 2>>(a, timing);
    return run<LinearForward<bf16, 128, 3>>(a, timing);
  });
}
