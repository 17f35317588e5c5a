// The Hopper kernels of linear+ReLU on emulated blocks, against sums in double. A case is "m k n
// splits blocks".
#include "cuda/kernels/linear_sm90.h"

#include "emulated.h"

using namespace fastattn::cuda;

namespace {

ptx::TensorMap matrix(Tensor4& t, int rows) {
  ptx::TensorMap map = t.map(rows);
  map.rank = 2;
  return map;
}

// Launches a pass, with the sum over its parts.
template <LinearPass kPass, int kBlockN, int kStages>
void launch(LinearParameters p, int blocks, emulator::Timing timing) {
  using Kernel = Linear<bf16, kPass, kBlockN, kStages>;
  std::vector<float> sums(static_cast<size_t>(p.splits * p.rows * p.cols), NAN);
  std::vector<float> bias_sums(static_cast<size_t>(p.splits * p.rows), NAN);
  p.sums = sums.data();
  p.bias_sums = bias_sums.data();
  emulator::run_grid(blocks, Kernel::kThreads, Kernel::kSharedBytes, timing,
                     [&] { Kernel::run(p); });
  if (p.splits == 1) return;
  const auto threads = p.rows * ((p.cols + 7) / 8);
  emulator::run_grid(static_cast<int>((threads + 255) / 256), 256, 0, timing,
                     [&] { add_splits<bf16, kPass>(p); });
}

int compare(const char* what, emulator::Timing timing, const Tensor4& got,
            const std::vector<double>& expected, const std::vector<double>& size) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = static_cast<double>(static_cast<float>(got.data[i]));
    // One rounding to bf16, sums in float.
    if (!(std::abs(value - expected[i]) <= std::abs(expected[i]) / 256 + 1e-6 * size[i]))
      return failed(what, timing, static_cast<int64_t>(i) / got.cols,
                    static_cast<int64_t>(i) % got.cols, value, expected[i]);
  }
  return 0;
}

template <int kBlockN, int kStages>
int run(const std::vector<int64_t>& a, emulator::Timing timing) {
  const int64_t m = a[0], k = a[1], n = a[2], mask_bytes = (n + 7) / 8;
  const auto splits = static_cast<int>(a[3]), blocks = static_cast<int>(a[4]);
  std::mt19937 random(7);
  Tensor4 x(1, 1, m, k), w(1, 1, n, k), bias(1, 1, 1, n), grad_y(1, 1, m, n);
  constexpr auto kPitch = Pitch::kContiguous;
  Tensor4 y(1, 1, m, n, kPitch), grad_x(1, 1, m, k, kPitch), grad_w(1, 1, n, k, kPitch);
  Tensor4 grad_bias(1, 1, 1, n);
  x.fill(random), w.fill(random, 1.0f / std::sqrt(static_cast<float>(k + 1)));
  bias.fill(random), grad_y.fill(random);
  std::vector<uint8_t> mask(static_cast<size_t>(m * mask_bytes), 0xaa);
  const auto base = [&](int64_t rows, int64_t cols, int64_t depth) {
    LinearParameters p{};
    p.rows = rows, p.cols = cols, p.depth = depth, p.splits = splits;
    p.relu_mask = mask.data(), p.mask_bytes = mask_bytes;
    return p;
  };
  LinearParameters forward = base(m, n, k);
  forward.a = matrix(x, 128), forward.b = matrix(w, kBlockN);
  forward.bias = bias.data.data(), forward.out = y.data.data();
  launch<LinearPass::kForward, kBlockN, kStages>(forward, blocks, timing);
  std::vector<double> expected, size;
  std::vector<char> kept;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias(0, 0, 0, j), sizes = std::abs(sum);
      for (int64_t e = 0; e < k; ++e) {
        sum += x(0, 0, i, e) * w(0, 0, j, e);
        sizes += std::abs(x(0, 0, i, e) * w(0, 0, j, e));
      }
      expected.push_back(sum > 0 ? sum : 0.0);
      size.push_back(sizes);
      kept.push_back(mask[static_cast<size_t>(i * mask_bytes + j / 8)] >> (j % 8) & 1);
      if (kept.back() != (y(0, 0, i, j) > 0)) return failed("bit", timing, i, j, kept.back(), 0);
    }
    const uint32_t last = mask[static_cast<size_t>((i + 1) * mask_bytes - 1)];
    if (n % 8 != 0 && last >> n % 8 != 0) return failed("padding", timing, i, 0, last, 0);
  }
  if (compare("y", timing, y, expected, size) != 0) return 1;

  LinearParameters input = base(m, k, n);
  input.a = matrix(grad_y, 128), input.b = matrix(w, 64), input.out = grad_x.data.data();
  launch<LinearPass::kGradInput, kBlockN, kStages>(input, blocks, timing);
  LinearParameters weight = base(n, k, m);
  weight.a = matrix(grad_y, 64), weight.b = matrix(x, 64), weight.out = grad_w.data.data();
  weight.grad_bias = grad_bias.data.data();
  launch<LinearPass::kGradWeight, kBlockN, kStages>(weight, blocks, timing);
  std::vector<double> dx(static_cast<size_t>(m * k)), dw(static_cast<size_t>(n * k));
  std::vector<double> db(static_cast<size_t>(n)), dx_size(dx), dw_size(dw), db_size(db);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      if (!kept[static_cast<size_t>(i * n + j)]) continue;
      const double g = grad_y(0, 0, i, j);
      const auto add = [](std::vector<double>& to, std::vector<double>& sizes, int64_t at,
                          double part) {
        to[static_cast<size_t>(at)] += part;
        sizes[static_cast<size_t>(at)] += std::abs(part);
      };
      add(db, db_size, j, g);
      for (int64_t e = 0; e < k; ++e) {
        add(dx, dx_size, i * k + e, g * w(0, 0, j, e));
        add(dw, dw_size, j * k + e, g * x(0, 0, i, e));
      }
    }
  }
  return compare("dx", timing, grad_x, dx, dx_size) + compare("dw", timing, grad_w, dw, dw_size) +
         compare("db", timing, grad_bias, db, db_size);
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, 5, [](const std::vector<int64_t>& a, emulator::Timing timing) {
    return timing.seed == 1 ? run<256, 2>(a, timing) : run<128, 3>(a, timing);
  });
}
