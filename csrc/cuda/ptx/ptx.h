// The instructions that kernels are made of, one a function: PTX under nvcc, plain C++ on an
// emulated block under any other compiler.
#pragma once

#if defined(__CUDACC__)
#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_UNROLL _Pragma("unroll")
#define FASTATTN_NO_UNROLL _Pragma("unroll 1")
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/thread.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#else
#define FASTATTN_DEVICE inline
#define FASTATTN_UNROLL
#define FASTATTN_NO_UNROLL
#include "cuda/emulator/wgmma.h"
#endif
