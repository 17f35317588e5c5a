// The Hopper linear+ReLU kernel on the emulated block, against sums in double. Prints what is wrong
// and returns 1; shapes are "m k n blocks" in the arguments, seeds vary inside.
#include "cuda/kernels/linear_relu_sm90.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace fastattn::cuda;

namespace {

struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};

ptx::TensorMap matrix(std::vector<bf16>& data, int64_t rows, int64_t cols, int box_rows) {
  ptx::TensorMap map;
  map.base = reinterpret_cast<char*>(data.data());
  map.rank = 2;
  map.extents[0] = cols;
  map.extents[1] = rows;
  map.stride_bytes[1] = 2 * cols;
  map.box[0] = 64;
  map.box[1] = box_rows;
  map.swizzle = ptx::Swizzle::k128;
  return map;
}

template <int kBlockN, int kStages>
bool right(int64_t m, int64_t k, int64_t n, int blocks, emulator::Timing timing) {
  using Kernel = LinearForward<bf16, kBlockN, kStages>;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto fill = [&](int64_t count, float scale) {
    std::vector<bf16> values(static_cast<size_t>(count));
    for (bf16& v : values) v = bf16(normal(random) * scale);
    return values;
  };
  std::vector<bf16> x = fill(m * k, 1.0f), bias = fill(n, 1.0f);
  std::vector<bf16> w = fill(n * k, 1.0f / std::sqrt(static_cast<float>(k + 1)));
  const int64_t mask_bytes = (n + 7) / 8;
  std::vector<bf16> y(static_cast<size_t>(m * n), bf16(NAN));
  std::vector<uint8_t> mask(static_cast<size_t>(m * mask_bytes), 0xaa);
  const LinearParameters p{matrix(x, m, k, Kernel::kBlockM),
                           matrix(w, n, k, kBlockN),
                           bias.data(),
                           y.data(),
                           mask.data(),
                           m,
                           n,
                           k};
  for (int i = 0; i < blocks; ++i) {
    ptx::place() = {i, blocks};
    emulator::Block block(Kernel::kThreads, Kernel::kSharedBytes, timing);
    block.run([&] { Kernel::run(p); });
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const auto at = [](const std::vector<bf16>& v, int64_t e) {
        return static_cast<double>(static_cast<float>(v[static_cast<size_t>(e)]));
      };
      double sum = at(bias, j), size = std::abs(sum);
      for (int64_t e = 0; e < k; ++e) {
        sum += at(x, i * k + e) * at(w, j * k + e);
        size += std::abs(at(x, i * k + e) * at(w, j * k + e));
      }
      const double expected = sum > 0 ? sum : 0.0, got = at(y, i * n + j);
      // One rounding to bf16, k in float.
      const bool close = std::abs(got - expected) <= expected / 256 + 1e-6 * size;
      const bool bit = mask[static_cast<size_t>(i * mask_bytes + j / 8)] >> (j % 8) & 1;
      if (!close || bit != (got > 0)) {
        std::printf("wrong: %ldx%ld->%ld block %d seed %lu at (%ld, %ld): %g for %g, bit %d\n", m,
                    k, n, kBlockN, timing.seed, i, j, got, expected, bit);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (int a = 1; a + 3 < argc; a += 4) {
      const int64_t m = std::atol(argv[a]), k = std::atol(argv[a + 1]), n = std::atol(argv[a + 2]);
      for (uint64_t seed = 0; seed < 3; ++seed) {
        const emulator::Timing timing{seed, seed == 0};
        const int blocks = std::atoi(argv[a + 3]);
        if (!right<128, 3>(m, k, n, blocks, timing)) return 1;
        if (seed == 1 && !right<256, 2>(m, k, n, blocks, timing)) return 1;
      }
    }
  } catch (const emulator::Error& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
  return 0;
}
