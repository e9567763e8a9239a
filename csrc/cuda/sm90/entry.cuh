// How the entry points of Hopper's products are named: <shape>_product.
#pragma once

#include "cuda/sm90/product.cuh"
#include "cuda/sm90/wgrad.cuh"

#define PYROUTE_PRODUCT(shape)                                                                                         \
    PYROUTE_KERNEL(shape##_product, shape.threads(), 1, ProductArgs) { multiply_product<shape>(args); }
#define PYROUTE_WGRAD(shape)                                                                                           \
    PYROUTE_KERNEL(shape##_product, shape.threads(), 1, WgradArgs) { multiply_wgrad<shape>(args); }
