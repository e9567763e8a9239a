// The portable source, compiled for this folder's instruction set.
#include "cpu/scalar/grouped_gemm_decode.cpp"
