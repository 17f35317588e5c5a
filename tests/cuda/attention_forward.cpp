// The Hopper attention forward on emulated blocks.
#include "cuda/kernels/attention_forward_sm90.h"

#include "attention_case.h"

using namespace fastattn::cuda;

namespace {

template <class Kernel>
int run(const std::vector<int64_t>& arguments, emulator::Timing timing) {
  AttentionCase& a = AttentionCase::of(arguments);
  Tensor4 o(a.batch, a.heads_q, a.seq_q, a.dim);
  std::vector<float> lse(a.lse.size(), NAN);
  int next_tile = 0;
  const std::vector<uint32_t> words = a.key_words(Kernel::kBlockK);
  const AttentionForwardParameters p{a.q.map(64),
                                     a.k.map(Kernel::kBlockK, a.reached),
                                     a.v.map(Kernel::kBlockK, a.reached),
                                     o.map(64),
                                     lse.data(),
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
    if (!(lse[i] == a.lse[i] || std::abs(lse[i] - a.lse[i]) < 1e-4f))
      return failed("lse", timing, static_cast<int64_t>(i), 0, static_cast<double>(lse[i]),
                    static_cast<double>(a.lse[i]));
  }
  return compare("o", timing, o, a.o);
}

template <int kDim, int kBlockK, int kConsumers, int kStages, bool kKeyWords>
using Kernel = AttentionForward<bf16, kDim, kBlockK, kConsumers, kStages, kKeyWords>;

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, 9, [](const std::vector<int64_t>& a, emulator::Timing timing) {
    const bool masked = a[7] > 0;
    if (a[0] <= 64)
      return (masked ? run<Kernel<64, 128, 2, 3, true>>
                     : run<Kernel<64, 128, 3, 3, false>>)(a, timing);
    if (a[0] <= 128)
      return (masked ? run<Kernel<128, 128, 2, 2, true>>
                     : run<Kernel<128, 128, 2, 2, false>>)(a, timing);
    return (masked ? run<Kernel<256, 64, 2, 2, true>> : run<Kernel<256, 64, 2, 2, false>>)(a,
                                                                                           timing);
  });
}
