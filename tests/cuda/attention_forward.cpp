// The Hopper attention forward on emulated blocks.
#include "attention_case.h"
#include "cuda/launch/config.cuh"

using namespace fastattn::cuda;

namespace {

template <class Kernel>
int run(const std::vector<int64_t>& arguments, emulator::Timing timing) {
  AttentionCase& a = AttentionCase::of(arguments);
  Tensor4 o(a.batch, a.heads_q, a.seq_q, a.dim);
  std::vector<float> lse(a.lse.size(), NAN), row_max(lse), log_sum(lse);
  int next_tile = 0;
  const std::vector<uint32_t> words = a.key_words(Kernel::kBlockK);
  const AttentionForwardParameters p{a.q.map(64),
                                     a.k.map(Kernel::kBlockK, a.reached),
                                     a.v.map(Kernel::kBlockK, a.reached),
                                     o.map(64),
                                     lse.data(),
                                     row_max.data(),
                                     log_sum.data(),
                                     &next_tile,
                                     a.band(Kernel::kBlockK, words),
                                     a.tiles(a.heads_q, a.seq_q, Kernel::kBlockQ),
                                     static_cast<int>(a.heads_q),
                                     static_cast<int>(a.group),
                                     static_cast<float>(a.scale),
                                     static_cast<float>(a.scale * 1.4426950408889634)};
  emulator::run_grid(a.blocks, Kernel::kThreads, Kernel::kSharedBytes, timing,
                     [&] { Kernel::run(p); });
  for (size_t i = 0; i < lse.size(); ++i) {
    const bool empty = row_max[i] == a.row_max[i] && log_sum[i] == a.log_sum[i];
    // The maximum may lag behind by the slack.
    const double parts = static_cast<double>(row_max[i] - a.row_max[i]) * a.scale +
                         static_cast<double>(log_sum[i] - a.log_sum[i]);
    const float difference = std::abs(lse[i] - a.lse[i]);
    if (!(empty || (std::abs(parts) < 1e-4 && difference <= 1e-4f + 1e-6f * std::abs(a.lse[i]))))
      return failed("lse", timing, static_cast<int64_t>(i), 0, static_cast<double>(lse[i]),
                    static_cast<double>(a.lse[i]));
  }
  return compare("o", timing, o, a.o);
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, 10, [](const std::vector<int64_t>& a, emulator::Timing timing) {
    // The tiles that are timed beside it.
    if (a[0] <= 64 && a[7] == 0 && timing.seed == 1) return run<Forward64<bf16, 4, 8>>(a, timing);
    if (a[0] <= 64 && a[7] == 0 && timing.seed == 2) return run<Forward64<bf16, 1, 0>>(a, timing);
    const auto of = [&]<bool kKeyWords>() {
      return (a[0] <= 64    ? run<ForwardTile<bf16, 64, kKeyWords>>
              : a[0] <= 128 ? run<ForwardTile<bf16, 128, kKeyWords>>
                            : run<ForwardTile<bf16, 256, kKeyWords>>)(a, timing);
    };
    return a[7] > 0 ? of.operator()<true>() : of.operator()<false>();
  });
}
