// For tests: what avx512bf16 computes, on any processor (simd.h).
#define FASTATTN_ISA emulated
#define FASTATTN_EMULATED
#include "cpu/kernels.h"
