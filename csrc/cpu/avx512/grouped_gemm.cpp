// The portable source, compiled for this folder's instruction set.
#include "cpu/scalar/grouped_gemm.cpp"
