// Attention backward: delta and softmax, the kernel, dQ's conversion.
#include "cuda/launch/attention.cuh"
#include "cuda/launch/key_words.cuh"

namespace fastattn::cuda {
namespace {

template <class T, int kDim>
__global__ void __launch_bounds__(kRowThreads)
    delta_kernel(const __grid_constant__ DeltaParameters p) {
  delta<T, kDim>(p);
}
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardParameters p) {
  Tile::run(p);
}
template <class T, int kDim>
__global__ void __launch_bounds__(kRowThreads)
    grad_query_kernel(const __grid_constant__ GradQueryParameters p) {
  grad_query<T, kDim>(p);
}

struct Workspace {
  int *next_tile, *turns;  // turns follow
  uint32_t* key_words;
  float *softmax, *delta, *grad_q;
  int blocks_q;
  int64_t blocks;  // of queries, of all heads
  size_t counter_bytes, bytes;

  Workspace(const AttentionProblem& p, char* memory) {
    const int dim = padded_dim(p), block = kGradQueryBlock / dim;
    blocks_q = narrow((p.seq_q + block - 1) / block);
    blocks = p.batch * p.heads_q * blocks_q;
    Carver carver(memory);
    next_tile = carver.take<int>(1);
    turns = carver.take<int>(blocks);
    counter_bytes = carver.bytes();
    key_words = carver.take<uint32_t>(p.batch * words_of(p));
    softmax = carver.take<float>(2 * blocks * block);
    delta = carver.take<float>(blocks * block);
    grad_q = carver.take<float>(blocks * block * dim);
    bytes = carver.bytes();
  }
};

unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

template <class T, class Tile>
void launch_tile(const AttentionBackwardProblem& b, const Launch& launch) {
  const AttentionProblem& p = b.forward;
  const Workspace workspace(p, launch.workspace);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaMemsetAsync(workspace.next_tile, 0, workspace.counter_bytes, stream),
        "cudaMemsetAsync");
  const int words = words_of(p), blocks_q = workspace.blocks_q;
  launch_key_words(p, workspace.key_words, words, stream);
  if (words > 0) {  // nobody is the first to add
    check(cudaMemsetAsync(workspace.grad_q, 0, workspace.blocks * (4 * kGradQueryBlock), stream),
          "cudaMemsetAsync");
  }
  const int64_t reached = reached_keys(p), group = p.heads_q / p.heads_k;
  const DeltaParameters of_rows{rows_of(p.out),
                                rows_of(b.grad_out),
                                static_cast<const float*>(p.row_max),
                                static_cast<const float*>(p.log_sum),
                                static_cast<const float*>(b.grad_lse),
                                narrow(p.heads_q),
                                narrow(p.seq_q),
                                blocks_q,
                                narrow(p.head_dim_v),
                                workspace.softmax,
                                workspace.delta};
  delta_kernel<T, Tile::kDim><<<grid(workspace.blocks), kRowThreads, 0, stream>>>(of_rows);
  check(cudaGetLastError(), "launch of delta");
  const AttentionBackwardParameters parameters{
      map_of(p, p.q, p.heads_q, p.seq_q, p.head_dim, Tile::kBlockQ),
      map_of(p, p.k, p.heads_k, reached, p.head_dim, Tile::kBlockK),
      map_of(p, p.v, p.heads_k, reached, p.head_dim_v, Tile::kBlockK),
      map_of(p, b.grad_out, p.heads_q, p.seq_q, p.head_dim_v, Tile::kBlockQ),
      map_of(p, b.grad_k, p.heads_k, p.seq_k, p.head_dim, 64),
      map_of(p, b.grad_v, p.heads_k, p.seq_k, p.head_dim_v, 64),
      workspace.softmax,
      workspace.delta,
      workspace.grad_q,
      workspace.turns,
      workspace.next_tile,
      band_of(p, workspace.key_words, words),
      blocks_of(p.batch * p.heads_k, p.seq_k, Tile::kBlockK,
                group * p.seq_q * (2 * (p.head_dim + p.head_dim_v) + 4 * p.head_dim), 1),
      words > 0 || p.seq_q - p.seq_k > p.left,
      narrow(p.heads_k),
      narrow(group),
      blocks_q,
      static_cast<float>(p.scale),
      static_cast<float>(p.scale * kLog2E)};
  const HeadBlocks& tiles = parameters.tiles;
  launch_persistent(attention_backward_kernel<Tile>, parameters,
                    int64_t{tiles.heads} * tiles.blocks, Tile::kThreads, Tile::kSharedBytes,
                    launch);
  if (!b.needs_q) return;
  const GradQueryParameters of_grad_q{
      workspace.grad_q, workspace.softmax, rows_of(b.grad_q),  narrow(p.heads_q),
      narrow(p.seq_q),  blocks_q,          narrow(p.head_dim), static_cast<float>(p.scale)};
  grad_query_kernel<T, Tile::kDim><<<grid(workspace.blocks), kRowThreads, 0, stream>>>(of_grad_q);
  check(cudaGetLastError(), "launch of grad_query");
}

}  // namespace

size_t attention_backward_workspace(const AttentionBackwardProblem& b) {
  return Workspace(b.forward, nullptr).bytes;
}

void launch_attention_backward(const AttentionBackwardProblem& b, const Launch& launch) {
  with_type(b.forward.dtype, [&]<class T>() {
    const bool masked = b.forward.mask_kind != MaskKind::kNone;
    if (padded_dim(b.forward) == 64) {
      masked ? launch_tile<T, BackwardTile<T, 64, true>>(b, launch)
             : launch_tile<T, BackwardTile<T, 64, false>>(b, launch);
    } else {
      masked ? launch_tile<T, BackwardTile<T, 128, true>>(b, launch)
             : launch_tile<T, BackwardTile<T, 128, false>>(b, launch);
    }
  });
}

}  // namespace fastattn::cuda
