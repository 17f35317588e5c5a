#define FASTATTN_ISA generic
#include "cpu/kernels.h"
