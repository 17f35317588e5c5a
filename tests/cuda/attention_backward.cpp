// The Hopper attention backward on emulated blocks, with the kernels before and behind it.
#include "attention_case.h"
#include "cuda/kernels/attention_rows.h"
#include "cuda/launch/config.cuh"

using namespace fastattn::cuda;

namespace {

Rows rows(Tensor4& x) {
  return {reinterpret_cast<char*>(x.data.data()), x.heads * x.rows * x.pitch, x.rows * x.pitch,
          x.pitch};
}

template <class Kernel>
int run(const std::vector<int64_t>& arguments, emulator::Timing timing) {
  AttentionCase& a = AttentionCase::of(arguments);
  Tensor4 dq(a.batch, a.heads_q, a.seq_q, a.dim, Pitch::kContiguous);
  Tensor4 dk(a.batch, a.heads_k, a.seq_k, a.dim), dv(dk);
  const auto on_grid = [&](int blocks, const std::function<void()>& body) {
    emulator::run_grid(blocks, kRowThreads, 0, timing, body);
  };
  const auto batch = static_cast<int>(a.batch), heads = static_cast<int>(a.heads_q);
  const auto dim = static_cast<int>(a.dim), seq_q = static_cast<int>(a.seq_q);
  const auto seq_k = static_cast<int>(a.seq_k);
  const bool masked = a.padded > 0;

  std::vector<uint32_t> words(a.key_words(128).size(), 0xffffffffu);
  const auto per_batch = static_cast<int>(words.size()) / batch;
  const KeyWordsParameters of_mask{a.mask.data(), 1,     {batch},   {a.seq_k},   1,
                                   batch,         seq_k, per_batch, words.data()};
  on_grid((static_cast<int>(words.size()) + kRowThreads - 1) / kRowThreads,
          [&] { key_words(of_mask); });
  if (words != a.key_words(128)) return failed("key words", timing, 0, 0, 0, 0);

  const HeadBlocks of_queries = a.tiles(a.heads_q, a.seq_q, Kernel::kBlockQ);
  const int all = of_queries.tiles();
  DeviceVector<float> softmax(static_cast<size_t>(2 * all * Kernel::kBlockQ), NAN);
  DeviceVector<float> delta(static_cast<size_t>(all * Kernel::kBlockQ), NAN);
  const DeltaParameters of_rows{rows(a.out),
                                rows(a.grad_out),
                                a.row_max.data(),
                                a.log_sum.data(),
                                a.grad_lse.data(),
                                heads,
                                seq_q,
                                of_queries.blocks,
                                dim,
                                softmax.data(),
                                delta.data()};
  on_grid(all, [&] { fastattn::cuda::delta<bf16, Kernel::kDim>(of_rows); });

  DeviceVector<float> sums(static_cast<size_t>(all * Kernel::kBlockQ * Kernel::kDim),
                           masked ? 0.0f : NAN);
  std::vector<int> turns(static_cast<size_t>(all), 0);
  int next_tile = 0;
  const AttentionBackwardParameters p{a.q.map(Kernel::kBlockQ),
                                      a.k.map(128, a.reached),
                                      a.v.map(128, a.reached),
                                      a.grad_out.map(Kernel::kBlockQ),
                                      dk.map(64),
                                      dv.map(64),
                                      softmax.data(),
                                      delta.data(),
                                      sums.data(),
                                      turns.data(),
                                      &next_tile,
                                      a.band(128, words),
                                      a.tiles(a.heads_k, a.seq_k, 128),
                                      masked || a.seq_q - a.seq_k > a.left,
                                      static_cast<int>(a.heads_k),
                                      static_cast<int>(a.group),
                                      of_queries.blocks,
                                      static_cast<float>(a.scale),
                                      static_cast<float>(a.scale * 1.4426950408889634)};
  emulator::run_grid(a.blocks, Kernel::kThreads, Kernel::kSharedBytes, timing,
                     [&] { Kernel::run(p); });
  const GradQueryParameters of_dq{
      sums.data(), softmax.data(),    rows(dq), heads,
      seq_q,       of_queries.blocks, dim,      static_cast<float>(a.scale)};
  on_grid(all, [&] { grad_query<bf16, Kernel::kDim>(of_dq); });
  return compare("dq", timing, dq, a.dq) + compare("dk", timing, dk, a.dk) +
         compare("dv", timing, dv, a.dv);
}

}  // namespace

int main(int argc, char** argv) {
  return run_cases(argc, argv, 10, [](const std::vector<int64_t>& a, emulator::Timing timing) {
    const auto of = [&]<bool kKeyWords>() {
      return (a[0] <= 64 ? run<BackwardTile<bf16, 64, kKeyWords>>
                         : run<BackwardTile<bf16, 128, kKeyWords>>)(a, timing);
    };
    return a[7] > 0 ? of.operator()<true>() : of.operator()<false>();
  });
}
