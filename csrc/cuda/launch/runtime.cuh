// What every launch needs of the CUDA runtime and driver.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/problem.h"
#include "cuda/launch/check.cuh"
#include "cuda/launch/launch.h"
#if defined(FASTATTN_WATCHDOG)
#include "cuda/launch/watchdog.cuh"
#endif

namespace fastattn::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  // A thread of autograd's may have no context before its first call, and tensor maps need one.
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The driver's function, found at run time: the library loads where there is no driver.
inline auto encode_function() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("fastattn: this driver has no cuTensorMapEncodeTiled; 525 does");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

inline void require(bool holds, const char* what, int64_t got) {
  if (holds) return;
  throw std::runtime_error(std::string("fastattn: TMA needs ") + what + ", got " +
                           std::to_string(got));
}

// Rows of 16-bit elements for TMA, in boxes of 64 columns with the 128-byte swizzle. Extents
// innermost first; strides in elements, without the first.
template <int kRank>
CUtensorMap tensor_map(Dtype dtype, const void* data, const int64_t (&extents)[kRank],
                       const int64_t (&strides)[kRank - 1], int box_rows) {
  cuuint64_t sizes[kRank], bytes[kRank - 1];
  cuuint32_t box[kRank], steps[kRank];
  int64_t dense = extents[0];
  const auto beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16);
  require(beyond == 0, "an address that is 0 modulo 16", beyond);
  require(box_rows >= 1 && box_rows <= 256, "boxes of 1 to 256 rows", box_rows);
  for (int d = 0; d < kRank; ++d) {
    require(extents[d] >= 1 && extents[d] <= int64_t{1} << 32, "extents of 1 to 2^32", extents[d]);
    sizes[d] = static_cast<cuuint64_t>(extents[d]);
    box[d] = d == 0 ? 64 : d == 1 ? static_cast<cuuint32_t>(box_rows) : 1;
    steps[d] = 1;
    if (d + 1 == kRank) break;
    // The stride of an extent of 1 is never used, but must be a legal one.
    const int64_t stride = extents[d + 1] > 1 ? strides[d] : (dense + 7) / 8 * 8;
    require(stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39,
            "strides that are multiples of 8 elements below 2^39", stride);
    dense = stride * extents[d + 1];
    bytes[d] = static_cast<cuuint64_t>(2 * stride);
  }
  CUtensorMap map;
  const CUresult result =
      encode_function()(&map,
                        dtype == Dtype::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        kRank, const_cast<void*>(data), sizes, bytes, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("fastattn: cuTensorMapEncodeTiled failed with code " +
                             std::to_string(result));
  return map;
}

// Beyond 48 KB shared memory must be asked for, of the current device.
template <class Parameters>
void allow_shared(void (*kernel)(Parameters), int bytes) {
#if defined(FASTATTN_WATCHDOG)
  start_watchdog();  // kernels that wait have more than that
#endif
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
}

// Launches `kernel` on at most one block a multiprocessor.
template <class Parameters>
void launch_persistent(void (*kernel)(Parameters), const Parameters& p, int64_t tiles, int threads,
                       int shared_bytes, const Launch& launch) {
  allow_shared(kernel, shared_bytes);
  const int64_t most = device_attribute(cudaDevAttrMultiProcessorCount);
  const auto blocks = static_cast<unsigned>(tiles < most ? tiles : most);
  kernel<<<blocks, static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(launch.stream)>>>(p);
  check(cudaGetLastError(), "launch");
}

// Calls f.template operator()<T>() for the problem's type.
template <class F>
void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kBFloat16) {
    f.template operator()<__nv_bfloat16>();
  } else {
    f.template operator()<__half>();
  }
}

// Parts of a workspace, each 256-byte aligned; without memory behind it, it only counts.
class Carver {
 public:
  explicit Carver(char* memory) : memory_(memory) {}
  template <class V>
  V* take(int64_t count) {
    V* part = memory_ == nullptr ? nullptr : reinterpret_cast<V*>(memory_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(V) + 255) / 256 * 256;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace fastattn::cuda
