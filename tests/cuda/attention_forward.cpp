// The Hopper attention forward on emulated blocks, against a softmax in double. A case is "dim
// heads_q heads_k seq_q seq_k left right padded blocks", -1 for no bound; padded keys at the end of
// the second batch element are NaN.
#include "cuda/kernels/attention_forward_sm90.h"

#include "emulated.h"

using namespace fastattn::cuda;

namespace {

template <class Kernel>
int run(const std::vector<int64_t>& a, emulator::Timing timing) {
  const int64_t dim = a[0], heads_q = a[1], heads_k = a[2], seq_q = a[3], seq_k = a[4];
  const int64_t left = a[5] < 0 ? kNoBound : a[5], right = a[6] < 0 ? kNoBound : a[6];
  const int64_t padded = a[7], batch = 2, group = heads_q / heads_k;
  std::mt19937 random(7);
  Tensor4 q(batch, heads_q, seq_q, dim), k(batch, heads_k, seq_k, dim), v(k), o(q);
  q.fill(random, 2.0f), k.fill(random), v.fill(random);
  const int words = static_cast<int>((seq_k + Kernel::kBlockK - 1) / Kernel::kBlockK) *
                    Kernel::kBlockK / 32;
  std::vector<uint32_t> bits(static_cast<size_t>(batch * words), 0);
  const auto seen = [&](int64_t b, int64_t j) {
    return b == 0 || padded == 0 || (j + padded < seq_k && j % 11 != 3);
  };
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < seq_k; ++j) {
      if (seen(b, j)) {
        bits[static_cast<size_t>(b * words + j / 32)] |= 1u << j % 32;
        continue;
      }
      for (int64_t h = 0; h < heads_k; ++h) {
        for (int64_t d = 0; d < dim; ++d) k.data[k.at(b, h, j, d)] = v.data[v.at(b, h, j, d)] = bf16(NAN);
      }
    }
  }
  // Keys that no query sees are cut off.
  const int64_t reached = std::min(seq_k, seq_q + right);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads_k; ++h) {
      for (int64_t j = reached; j < seq_k; ++j) {
        for (int64_t d = 0; d < dim; ++d) k.data[k.at(b, h, j, d)] = v.data[v.at(b, h, j, d)] = bf16(NAN);
      }
    }
  }
  std::vector<float> lse(static_cast<size_t>(batch * heads_q * seq_q), NAN);
  int next_tile = 0;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const auto blocks_q = static_cast<int>((seq_q + Kernel::kBlockQ - 1) / Kernel::kBlockQ);
  const AttentionForwardParameters p{
      q.map(64), k.map(Kernel::kBlockK, reached), v.map(Kernel::kBlockK, reached), o.map(64),
      lse.data(), &next_tile,
      {static_cast<int>(seq_q), static_cast<int>(reached), static_cast<int>(left),
       static_cast<int>(right), padded > 0 ? bits.data() : nullptr, words},
      {static_cast<int>(batch * heads_q), static_cast<int>(heads_q), blocks_q},
      static_cast<int>(heads_q), static_cast<int>(group), scale,
      scale * 1.44269504f};
  emulator::run_grid(static_cast<int>(a[8]), Kernel::kThreads, Kernel::kSharedBytes, timing,
                     [&] { Kernel::run(p); });
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads_q; ++h) {
      for (int64_t i = 0; i < seq_q; ++i) {
        std::vector<double> weight(static_cast<size_t>(seq_k), 0.0);
        double sum = 0;
        for (int64_t j = 0; j < seq_k; ++j) {
          if (j < i - left || j > i + right || !seen(b, j)) continue;
          double score = 0;
          for (int64_t d = 0; d < dim; ++d) score += q(b, h, i, d) * k(b, h / group, j, d);
          sum += weight[static_cast<size_t>(j)] = std::exp(score * static_cast<double>(scale));
        }
        const double expected_lse = std::log(sum);
        const double got_lse =
            static_cast<double>(lse[static_cast<size_t>((b * heads_q + h) * seq_q + i)]);
        if (!(got_lse == expected_lse || std::abs(got_lse - expected_lse) < 1e-4))
          return failed("lse", timing, h, i, got_lse, expected_lse);
        for (int64_t d = 0; d < dim; ++d) {
          double expected = 0, size = 0;
          for (int64_t j = 0; j < seq_k; ++j) {
            if (weight[static_cast<size_t>(j)] == 0.0) continue;
            const double part = weight[static_cast<size_t>(j)] / sum * v(b, h / group, j, d);
            expected += part;
            size += std::abs(part);
          }
          // The probabilities and the result are rounded to bf16.
          const double got = o(b, h, i, d);
          if (!(std::abs(got - expected) <= size / 256 + std::abs(expected) / 256 + 1e-6))
            return failed("o", timing, i, d, got, expected);
        }
      }
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, 9, [](const std::vector<int64_t>& a, emulator::Timing timing) {
    if (a[0] <= 64) return run<AttentionForward<bf16, 64, 128, 3, 2>>(a, timing);
    if (a[0] <= 128) return run<AttentionForward<bf16, 128, 128, 2, 2>>(a, timing);
    return run<AttentionForward<bf16, 256, 64, 2, 2>>(a, timing);
  });
}
