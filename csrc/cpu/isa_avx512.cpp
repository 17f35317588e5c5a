#define FASTATTN_ISA avx512
#include "cpu/kernels.h"
