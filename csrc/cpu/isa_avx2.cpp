#define FASTATTN_ISA avx2
#include "cpu/kernels.h"
