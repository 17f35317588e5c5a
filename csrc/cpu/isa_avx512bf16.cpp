#define FASTATTN_ISA avx512bf16
#define FASTATTN_ONLY_BF16
#include "cpu/kernels.h"
