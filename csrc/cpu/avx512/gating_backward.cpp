// The portable source, compiled for this folder's instruction set.
#include "cpu/scalar/gating_backward.cpp"
