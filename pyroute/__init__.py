"""Expert routing for Mixture-of-Experts models: top-k gating, token permutation, FP8 grouped GEMM."""

from ._backend import BackendInfo, backends, get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "__version__",
    "backends",
    "get_num_threads",
    "set_num_threads",
]
