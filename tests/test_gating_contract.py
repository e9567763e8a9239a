"""What the gating functions refuse: one sentence that names the argument, before any work."""

import numpy as np
import pytest

import pyroute
from pyroute import Gating, RouterConfig, balance_loss, topk_gating, topk_gating_backward, update_bias, z_loss

CONFIG = RouterConfig(8, 2)
Z = np.zeros((3, 8), np.float32)
IDS = np.zeros((3, 2), np.int32)
GATING = Gating(IDS, np.zeros((3, 2), np.float32), np.zeros(8, np.int32))
DW = np.zeros((3, 2), np.float32)
COUNTS = np.zeros(8, np.int64)
NO_CUDA = RuntimeError, "backend 'cuda' is not available: "
if pyroute.backends()["cuda"].available:  # the emulated one, beside its own tests
    NO_CUDA = TypeError, "backend must be one for the arrays' device"


def bad_ids(token, slot, value, dtype=np.int64):
    ids = np.zeros((3, 2), dtype)
    ids[token, slot] = value
    return ids


SHARED = [  # (keyword arguments, error, words of the message)
    ({"logits": Z[0]}, ValueError, "logits must be of shape"),
    ({"logits": np.zeros((3, 7), np.float32)}, ValueError, "logits must be of shape [num_tokens, num_experts=8], got"),
    ({"logits": Z.astype(np.int32)}, TypeError, "logits must be float32 or"),
    ({"logits": Z.astype(np.complex64)}, TypeError, "logits must be float32 or"),
    ({"logits": Z.astype(">f4")}, TypeError, "logits must be float32 or"),
    ({"logits": Z.tolist()}, TypeError, "logits must be an array, got list"),
    ({"logits": None}, TypeError, "logits must be an array, got None"),
    ({"logits": np.ma.array(Z)}, TypeError, "logits must be an array without a mask"),
    ({"logits": Z.astype(object)}, TypeError, "logits must be float32 or"),
    ({"token_mask": np.ones(4, bool)}, ValueError, "token_mask must be of shape [num_tokens=3]"),
    ({"token_mask": np.ones(3, np.int32)}, TypeError, "token_mask must be bool, got int32"),
    ({"token_mask": [True] * 3}, TypeError, "token_mask must be an array"),
    ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ({"backend": 1}, TypeError, "backend must be one of"),
    ({"backend": "cuda"}, *NO_CUDA),
]
CONFIGS = [
    ({"config": None}, TypeError, "config must be a RouterConfig, got None"),
    ({"config": {"num_experts": 8}}, TypeError, "config must be a RouterConfig, got dict"),
]
BIAS = [
    ({"bias": np.zeros(7, np.float32)}, ValueError, "bias must be of shape [num_experts=8], got [7]"),
    ({"bias": np.zeros((1, 8), np.float32)}, ValueError, "bias must be of shape"),
    ({"bias": np.zeros(8, np.float64)}, TypeError, "bias must be float32, got float64"),
    ({"bias": np.zeros(8, np.float16)}, TypeError, "bias must be float32, got float16"),
    ({"logits": Z.astype(np.float64), "bias": np.zeros(8, np.float32)}, TypeError, "bias must be float64, got float32"),
]
FORWARD = [
    ({"topk_idx": bad_ids(1, 1, 8)}, ValueError, "topk_idx[1, 1] must be in 0..7, or -1 for not routed, got 8"),
    ({"topk_idx": bad_ids(2, 0, -2)}, ValueError, "topk_idx[2, 0] must be in 0..7, or -1 for not routed, got -2"),
    (
        {"topk_idx": bad_ids(0, 1, 2**32)},
        ValueError,
        "topk_idx[0, 1] must be in 0..7, or -1 for not routed, got 4294967296",
    ),
    ({"topk_idx": bad_ids(0, 1, 2**64 - 1, np.uint64)}, ValueError, "got 18446744073709551615"),
    ({"topk_idx": bad_ids(0, 0, -(2**31), np.int32)}, ValueError, "got -2147483648"),
    ({"topk_idx": bad_ids(0, 0, 255, np.uint8)}, ValueError, "got 255"),
    ({"topk_idx": np.zeros((3, 3), np.int32)}, ValueError, "topk_idx must be of shape [num_tokens=3, top_k=2]"),
    ({"topk_idx": np.zeros((3, 2), bool)}, TypeError, "topk_idx must be integers, got bool"),
    ({"topk_idx": np.zeros((3, 2), np.float32)}, TypeError, "topk_idx must be integers, got float32"),
    ({"topk_idx": [[0, 1]] * 3}, TypeError, "topk_idx must be an array, got list"),
]
IDS_IN_GATING = [
    ({"gating": tuple(GATING)}, TypeError, "gating must be a Gating, got tuple"),
    ({"gating": None}, TypeError, "gating must be a Gating, got None"),
    (
        {"gating": GATING._replace(topk_idx=bad_ids(2, 1, 9))},
        ValueError,
        "gating.topk_idx[2, 1] must be in 0..7, or -1 for not routed",
    ),
    ({"gating": GATING._replace(topk_idx=IDS[:2])}, ValueError, "gating.topk_idx must be of shape"),
    ({"gating": GATING._replace(topk_idx=None)}, TypeError, "gating.topk_idx must be an array, got None"),
]
BACKWARD = [
    ({"grad_topk_weights": DW.astype(np.float64)}, TypeError, "grad_topk_weights must be float32, got float64"),
    ({"grad_topk_weights": DW[:, :1]}, ValueError, "grad_topk_weights must be of shape [num_tokens=3, top_k=2]"),
    ({"grad_topk_weights": None}, TypeError, "grad_topk_weights must be an array"),
    ({"balance_loss_coef": np.nan}, ValueError, "balance_loss_coef must be finite, got nan"),
    ({"balance_loss_coef": "0.1"}, TypeError, "balance_loss_coef must be a number, got str"),
    ({"z_loss_coef": np.inf}, ValueError, "z_loss_coef must be finite, got inf"),
    ({"z_loss_coef": True}, TypeError, "z_loss_coef must be a number"),
]


def scope_cases(name):
    pair = (COUNTS, 10)
    return [
        ({name: "tokens"}, ValueError, f"{name} must be one of 'batch', 'sequence', 'global', got 'tokens'"),
        ({name: 0}, TypeError, f"{name} must be one of"),
        ({name: "sequence"}, ValueError, "sequence_ids must be given with scope 'sequence'"),
        ({"sequence_ids": IDS[:, 0]}, ValueError, "sequence_ids must be given with scope 'sequence' and only then"),
        ({name: "sequence", "sequence_ids": IDS[:2, 0]}, ValueError, "sequence_ids must be of shape [num_tokens=3]"),
        ({name: "sequence", "sequence_ids": Z[:, 0]}, TypeError, "sequence_ids must be integers"),
        ({name: "global"}, ValueError, "global_counts must be given with scope 'global'"),
        ({"global_counts": pair}, ValueError, "global_counts must be given with scope 'global' and only then"),
        ({name: "global", "global_counts": COUNTS}, TypeError, "global_counts must be a pair"),
        ({name: "global", "global_counts": (COUNTS[:7], 9)}, ValueError, "global_counts[0] must be of shape"),
        ({name: "global", "global_counts": (COUNTS / 2, 9)}, TypeError, "global_counts[0] must be integers"),
        ({name: "global", "global_counts": (COUNTS, 2)}, ValueError, "global_counts[1] must be at least 3, got 2"),
        ({name: "global", "global_counts": (COUNTS, 9.0)}, TypeError, "global_counts[1] must be an integer"),
    ]


def call(function, defaults, change):
    return function(**{**defaults, **change})


FUNCTIONS = {
    topk_gating: ({"logits": Z, "config": CONFIG}, SHARED + CONFIGS + BIAS + FORWARD),
    topk_gating_backward: (
        {"grad_topk_weights": DW, "logits": Z, "gating": GATING, "config": CONFIG},
        SHARED + CONFIGS + BIAS[:-1] + IDS_IN_GATING + BACKWARD + scope_cases("balance_loss_scope"),
    ),
    balance_loss: (
        {"logits": Z, "gating": GATING, "config": CONFIG},
        SHARED + CONFIGS + IDS_IN_GATING + scope_cases("scope"),
    ),
    z_loss: (
        {"logits": Z},
        [case for case in SHARED if "num_experts=8" not in case[2]]
        + [({"logits": np.zeros((3, 0), np.float32)}, ValueError, "logits must be of at least one expert")],
    ),
    update_bias: (
        {"bias": np.zeros(8, np.float32), "tokens_per_expert": COUNTS},
        [
            ({"bias": np.zeros(8, np.float16)}, TypeError, "bias must be float32 or float64, got float16"),
            ({"bias": np.zeros((8, 1), np.float32)}, ValueError, "bias must be of shape [num_experts]"),
            ({"bias": [0.0] * 8}, TypeError, "bias must be an array, got list"),
            ({"tokens_per_expert": COUNTS[:7]}, ValueError, "tokens_per_expert must be of shape [num_experts=8]"),
            ({"tokens_per_expert": COUNTS / 2}, TypeError, "tokens_per_expert must be integers"),
            ({"rate": -1.0}, ValueError, "rate must be finite and at least 0.0, got -1.0"),
            ({"rate": np.nan}, ValueError, "rate must be finite"),
            ({"rate": None}, TypeError, "rate must be a number, got None"),
            ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ],
    ),
}
CASES = [
    pytest.param(function, defaults, change, error, words, id=f"{function.__name__}-{i}")
    for function, (defaults, cases) in FUNCTIONS.items()
    for i, (change, error, words) in enumerate(cases)
]


@pytest.mark.parametrize(("function", "defaults", "change", "error", "words"), CASES)
def test_refusals(function, defaults, change, error, words):
    with pytest.raises(error) as refused:
        call(function, defaults, change)
    assert str(refused.value).startswith(f"{function.__name__}: ")
    assert words in str(refused.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_defaults_are_accepted(function):
    assert call(function, FUNCTIONS[function][0], {}) is not None


def test_a_bad_id_is_named_in_reading_order(floor):
    ids = np.zeros((3, 2), np.int64)
    ids[1, 1], ids[2, 0] = 99, -7
    with pytest.raises(ValueError, match=r"topk_idx\[1, 1\] .* got 99"):
        topk_gating(Z, CONFIG, topk_idx=ids, backend=floor.backend)


def test_numpy_and_python_scalars_are_numbers():
    options = {"balance_loss_coef": np.float32(0.5), "z_loss_coef": 1}
    grad = topk_gating_backward(DW, Z, GATING, CONFIG, **options)
    assert grad.shape == (3, 8)


def test_the_room_is_public():
    names = {"Gating", "topk_gating", "topk_gating_backward", "balance_loss", "z_loss", "update_bias"}
    assert names <= set(pyroute.__all__)
