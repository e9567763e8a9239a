"""Expert routing for Mixture-of-Experts models: top-k gating, token permutation, FP8 grouped GEMM."""

from ._backend import BackendInfo, backends, get_num_threads, set_num_threads
from .router_config import RouterConfig
from .router_presets import presets

__version__ = "0.1.0"

__all__ = [
    "BackendInfo",
    "RouterConfig",
    "__version__",
    "backends",
    "get_num_threads",
    "presets",
    "set_num_threads",
]
