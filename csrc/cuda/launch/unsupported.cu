// What the kernels do not do; backends.py says the same before anything is launched.
#include "cuda/launch/attention.cuh"

namespace fastattn::cuda {

int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

std::string unsupported(const AttentionProblem& p, bool backward) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v), most = backward ? 128 : 256;
  if (capability() != 90) return "the GPU is not of compute capability 9.0";
  if (p.dtype != Dtype::kBFloat16 && p.dtype != Dtype::kFloat16)
    return "the dtype is neither bfloat16 nor float16";
  if (std::min(p.head_dim, p.head_dim_v) == 0) return "head dim 0";
  if (dim > most) return "head dim " + std::to_string(dim) + " is above " + std::to_string(most);
  if (p.starts_q != nullptr) return "the sequences are packed";
  if (p.dropout_p > 0.0) return "there is dropout";
  if (p.softcap > 0.0) return "there is a softcap";
  if (p.slopes != nullptr) return "there are ALiBi slopes";
  if (p.mask_kind == MaskKind::kFloat) return "the mask is a float mask";
  if (p.mask.head_stride != 0 || p.mask.row_stride != 0)
    return "the mask is not the same for all heads and queries";
  if (!(p.scale > 0.0)) return "the scale is not positive";
  if (p.seq_q >= kNoBound / 2 || p.seq_k >= kNoBound / 2 || p.batch * p.heads_q >= kNoBound / 2)
    return "an extent is 2^29 or more";
  return "";
}

}  // namespace fastattn::cuda
