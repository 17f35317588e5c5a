// Attention forward: the bits of a key mask, if there is one, then the kernel.
#include "cuda/launch/attention.cuh"
#include "cuda/launch/key_words.cuh"

namespace fastattn::cuda {
namespace {

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ AttentionForwardParameters p) {
  Tile::run(p);
}

struct Workspace {
  int* next_tile;
  uint32_t* key_words;
  size_t bytes;

  Workspace(const AttentionProblem& p, char* memory) {
    Carver carver(memory);
    next_tile = carver.take<int>(1);
    key_words = carver.take<uint32_t>(p.batch * words_of(p));
    bytes = carver.bytes();
  }
};

template <class Tile>
void launch_tile(const AttentionProblem& p, const Launch& launch) {
  const Workspace workspace(p, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaMemsetAsync(workspace.next_tile, 0, sizeof(int), stream), "cudaMemsetAsync");
  const int words = words_of(p);
  launch_key_words(p, workspace.key_words, words, stream);
  const int64_t reached = reached_keys(p), group = p.heads_q / p.heads_k;
  const AttentionForwardParameters parameters{
      map_of(p, p.q, p.heads_q, p.seq_q, p.head_dim, 64),
      map_of(p, p.k, p.heads_k, reached, p.head_dim, Tile::kBlockK),
      map_of(p, p.v, p.heads_k, reached, p.head_dim_v, Tile::kBlockK),
      map_of(p, p.out, p.heads_q, p.seq_q, p.head_dim_v, 64),
      static_cast<float*>(p.lse),
      static_cast<float*>(p.row_max),
      static_cast<float*>(p.log_sum),
      workspace.next_tile,
      band_of(p, workspace.key_words, words),
      blocks_of(p.batch * p.heads_q, p.seq_q, Tile::kBlockQ,
                2 * p.seq_k * (p.head_dim + p.head_dim_v), group),
      narrow(p.heads_q),
      narrow(group),
      static_cast<float>(p.scale),
      static_cast<float>(p.scale * kLog2E)};
  const HeadBlocks& tiles = parameters.tiles;
  launch_persistent(attention_forward_kernel<Tile>, parameters, int64_t{tiles.heads} * tiles.blocks,
                    Tile::kThreads, Tile::kSharedBytes, launch);
}

#if defined(FASTATTN_TUNE)
int choice = 0;  // of the tiles for D = 64

// Whether `choice` names a tile, which it then has launched.
template <class T>
bool launch_choice(const AttentionProblem& p, const Launch& launch) {
  switch (choice) {
    case 1:
      return launch_tile<Forward64<T, 0, 0>>(p, launch), true;
    case 2:
      return launch_tile<Forward64<T, 1, 8>>(p, launch), true;
    case 3:
      return launch_tile<Forward64<T, 2, 8>>(p, launch), true;
    case 4:
      return launch_tile<Forward64<T, 4, 8>>(p, launch), true;
    default:
      return false;
  }
}
#endif

}  // namespace

size_t attention_forward_workspace(const AttentionProblem& p) {
  return Workspace(p, nullptr).bytes;
}

void launch_attention_forward(const AttentionProblem& p, const Launch& launch) {
  with_type(p.dtype, [&]<class T>() {
#if defined(FASTATTN_TUNE)
    if (padded_dim(p) == 64 && p.mask_kind == MaskKind::kNone && launch_choice<T>(p, launch))
      return;
#endif
    const auto masked = [&]<bool kKeyWords>() {
      switch (padded_dim(p)) {
        case 64:
          return launch_tile<ForwardTile<T, 64, kKeyWords>>(p, launch);
        case 128:
          return launch_tile<ForwardTile<T, 128, kKeyWords>>(p, launch);
        default:
          return launch_tile<ForwardTile<T, 256, kKeyWords>>(p, launch);
      }
    };
    if (p.mask_kind == MaskKind::kNone) {
      masked.template operator()<false>();
    } else {
      masked.template operator()<true>();
    }
  });
}

}  // namespace fastattn::cuda

#if defined(FASTATTN_TUNE)
// For benchmarks/gpu/tune.py: which of the tiles above is launched, 0 for the one of config.cuh.
extern "C" __attribute__((visibility("default"))) void fastattn_choose_forward64(int choice) {
  fastattn::cuda::choice = choice;
}
#endif
