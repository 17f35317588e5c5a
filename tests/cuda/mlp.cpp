// The Hopper kernel of small MLPs on emulated blocks, both directions, against sums in double. A
// case is "rows input width width width": up to three layers, 0 for one that is not there.
#include "cuda/kernels/mlp_sm90.h"

#include "emulated.h"

using namespace fastattn::cuda;

namespace {

ptx::TensorMap matrix(Tensor4& t, int rows) {
  ptx::TensorMap map = t.map(rows);
  map.rank = 2;
  return map;
}

int compare(const char* what, emulator::Timing timing, const Tensor4& got,
            const std::vector<double>& expected, const std::vector<double>& size) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = static_cast<double>(static_cast<float>(got.data[i]));
    if (!(std::abs(value - expected[i]) <= std::abs(expected[i]) / 256 + 1e-6 * size[i]))
      return failed(what, timing, static_cast<int64_t>(i) / got.cols,
                    static_cast<int64_t>(i) % got.cols, value, expected[i]);
  }
  return 0;
}

template <int kBlockN, int kStages>
int run(const std::vector<int64_t>& a, emulator::Timing timing) {
  using Forward = Mlp<bf16, true, kBlockN, kStages>;
  using Backward = Mlp<bf16, false, kBlockN, kStages>;
  const int64_t rows = a[0];
  std::vector<int64_t> widths = {a[1]};
  for (size_t i = 2; i < 5; ++i) {
    if (a[i] > 0) widths.push_back(a[i]);
  }
  const size_t layers = widths.size() - 1;
  std::mt19937 random(7);
  Tensor4 x(1, 1, rows, widths[0]), grad_y(1, 1, rows, widths.back());
  x.fill(random), grad_y.fill(random);
  std::vector<Tensor4> w, bias, h, g;  // g[l]: the gradient of h[l]
  for (size_t l = 0; l < layers; ++l) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(widths[l]));
    w.emplace_back(1, 1, widths[l + 1], widths[l]).fill(random, scale);
    bias.emplace_back(1, 1, 1, widths[l + 1]).fill(random);
    h.emplace_back(1, 1, rows, widths[l + 1], Pitch::kContiguous);
    g.emplace_back(1, 1, rows, widths[l + 1], Pitch::kContiguous);
  }
  MlpParameters p{};
  p.first = matrix(x, 64);
  p.count = static_cast<int>(layers);
  p.rows = rows;
  for (size_t l = 0; l < layers; ++l) {
    p.layers[l] = {matrix(w[l], kBlockN),      bias[l].data.data(), nullptr,
                   h[l].data.data(),           widths[l + 1],       static_cast<int>(widths[l + 1]),
                   static_cast<int>(widths[l])};
  }
  const auto blocks = static_cast<int>((rows + 63) / 64);
  emulator::run_grid(blocks, Forward::kThreads, Forward::kSharedBytes, timing,
                     [&] { Forward::run(p); });
  MlpParameters q{};
  q.first = matrix(grad_y, 64);
  q.rows = rows;
  for (size_t l = layers - 1; l > 0; --l) {
    q.layers[q.count++] = {matrix(w[l], 64),
                           nullptr,
                           h[l - 1].data.data(),
                           g[l - 1].data.data(),
                           widths[l],
                           static_cast<int>(widths[l]),
                           static_cast<int>(widths[l + 1])};
  }
  emulator::run_grid(blocks, Backward::kThreads, Backward::kSharedBytes, timing,
                     [&] { Backward::run(q); });
  // Each layer from the kernel's own input to it: one rounding, sums in float.
  for (size_t l = 0; l < layers; ++l) {
    const Tensor4& in = l == 0 ? x : h[l - 1];
    const Tensor4& gradient = l + 1 == layers ? grad_y : g[l];
    std::vector<double> expected, size, dh(in.data.size()), dh_size(dh);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < widths[l + 1]; ++j) {
        double sum = bias[l](0, 0, 0, j), sizes = std::abs(sum);
        for (int64_t e = 0; e < widths[l]; ++e) {
          const double part = in(0, 0, i, e) * w[l](0, 0, j, e);
          sum += part;
          sizes += std::abs(part);
          if (l == 0 || in(0, 0, i, e) <= 0) continue;
          const double back = gradient(0, 0, i, j) * w[l](0, 0, j, e);
          dh[static_cast<size_t>(i * widths[l] + e)] += back;
          dh_size[static_cast<size_t>(i * widths[l] + e)] += std::abs(back);
        }
        expected.push_back(sum > 0 || l + 1 == layers ? sum : 0.0);
        size.push_back(sizes);
      }
    }
    if (compare("h", timing, h[l], expected, size) != 0) return 1;
    if (l > 0 && compare("g", timing, g[l - 1], dh, dh_size) != 0) return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, 5, [](const std::vector<int64_t>& a, emulator::Timing timing) {
    const bool wide = a[2] > 128 || a[3] > 128 || a[4] > 128;
    return wide ? run<256, 3>(a, timing) : run<128, 5>(a, timing);
  });
}
