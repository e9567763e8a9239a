"""Every preset against its model: golden vectors of the published formula, and the router class of transformers.

The golden vectors need nothing but NumPy. The rest runs where torch and transformers are installed, on random weights.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

import numpy as np
import pytest
from golden import make_routers

import pyroute
from pyroute import RouterConfig
from pyroute.router_presets import model_shape

GOLDEN = dict(np.load(make_routers.PATH))

# Presets that are one rule under several names.
SAME_RULE = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-v3.2": "deepseek-v3",
    "mixtral-8x22b": "mixtral",
    "qwen3-moe-235b": "qwen3-moe",
}


def weight_bound(config, logits, ids, weights, ulp):
    """How far a computed weight may be from the real one, [T, k]; ``ulp`` is 2**-24 for float32, 2**-53 for float64.

    A softmax score is good to ``12 + 2 * (max z - z)`` ulp, the others to 8. A sum over k adds its worst term's error
    and k - 1 roundings, eps one, the division one, the factor two: its own rounding and the product's. Scores below
    2**-126 are multiples of 2**-149. Some formulas are published without an eps where the preset has 1e-20: that moves
    a weight by 1e-20 / sum, and the sum is at least the best sigmoid.
    """
    chosen = np.take_along_axis(logits.astype(np.float64), ids, axis=1)
    spread = logits.max(axis=1, keepdims=True).astype(np.float64) - chosen
    relative = 12 + 2 * spread if config.score == "softmax" else np.full(chosen.shape, 8.0)
    if config.renormalize:
        relative = relative + relative.max(axis=1, keepdims=True) + config.top_k + 1
    no_eps = 1e-20 * (1 + np.exp(-chosen.max(axis=1, keepdims=True))) if config.renormalize_eps == 1e-20 else 0.0
    return ((relative + 2) * ulp + no_eps) * np.abs(weights) + config.scaling_factor * 2.0**-148


def counts_of(ids, num_experts):
    return np.bincount(ids.reshape(-1), minlength=num_experts).astype(np.int32)


# --- golden vectors ---------------------------------------------------------------------------------------------------


def test_golden_file_is_what_its_script_computes():
    models = {key.split("/")[0] for key in GOLDEN}
    assert models == {*make_routers.MODELS, "deepseek-v4-hash"}
    for model in make_routers.MODELS:
        ids, weights = make_routers.expected(model, GOLDEN[f"{model}/logits"], GOLDEN.get(f"{model}/bias"))
        assert np.array_equal(ids, GOLDEN[f"{model}/ids"])
        assert np.allclose(
            weights, GOLDEN[f"{model}/weights"], rtol=1e-14, atol=0
        )  # exp may differ by an ulp elsewhere


def test_every_preset_has_golden_vectors():
    assert {*make_routers.MODELS, *SAME_RULE} == set(pyroute.presets())
    for name, other in SAME_RULE.items():
        assert RouterConfig.preset(name) == RouterConfig.preset(other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("model", make_routers.MODELS)
def test_preset_gives_the_golden_vectors(model, dtype, floor):
    config = RouterConfig.preset(model)
    logits = GOLDEN[f"{model}/logits"].astype(dtype)
    bias = GOLDEN[f"{model}/bias"].astype(dtype) if f"{model}/bias" in GOLDEN else None
    ids, weights, counts = pyroute.topk_gating(logits, config, bias=bias, backend=floor.backend)
    expected = GOLDEN[f"{model}/weights"]
    assert np.array_equal(ids, GOLDEN[f"{model}/ids"])
    assert np.array_equal(counts, counts_of(ids, config.num_experts))
    assert weights.dtype == dtype
    error = np.abs(weights.astype(np.float64) - expected)
    assert (error <= weight_bound(config, logits, ids, expected, np.finfo(dtype).epsneg)).all()


def test_hash_layers_take_their_ids_from_a_table(floor):
    """DeepSeek-V4's first layers: the caller looks the ids up, the same rule weighs them. An expert may occur twice."""
    config = RouterConfig.preset("deepseek-v4")
    logits, table_ids = GOLDEN["deepseek-v4-hash/logits"], GOLDEN["deepseek-v4-hash/ids"]
    ids, weights, counts = pyroute.topk_gating(logits, config, topk_idx=table_ids, backend=floor.backend)
    expected = GOLDEN["deepseek-v4-hash/weights"]
    assert np.array_equal(ids, table_ids)
    assert np.array_equal(counts, counts_of(table_ids, 256))
    error = np.abs(weights.astype(np.float64) - expected)
    assert (error <= weight_bound(config, logits, table_ids, expected, 2.0**-24)).all()


# --- transformers -----------------------------------------------------------------------------------------------------


class HfModel(NamedTuple):
    """A configuration of transformers and its router class; ``fields`` differ from the configuration's defaults."""

    model_type: str
    router: str  # module.Class under transformers.models
    fields: dict[str, Any]


HF_PRESETS = {
    "deepseek-v2": HfModel(
        "deepseek_v2",
        "deepseek_v2.DeepseekV2TopkRouter",
        {
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v2-lite": HfModel("deepseek_v2", "deepseek_v2.DeepseekV2TopkRouter", {"num_experts_per_tok": 6}),
    "deepseek-v3": HfModel("deepseek_v3", "deepseek_v3.DeepseekV3TopkRouter", {}),
    "deepseek-v3.2": HfModel("deepseek_v32", "deepseek_v32.DeepseekV32TopkRouter", {}),
    "deepseek-v4": HfModel("deepseek_v4", "deepseek_v4.DeepseekV4TopKRouter", {}),
    "deepseek-v4-pro": HfModel(
        "deepseek_v4",
        "deepseek_v4.DeepseekV4TopKRouter",
        {"n_routed_experts": 384, "routed_scaling_factor": 2.5},
    ),
    "ernie-4.5": HfModel("ernie4_5_moe", "ernie4_5_moe.Ernie4_5_MoeTopKRouter", {}),
    "glm-4.5": HfModel(
        "glm4_moe", "glm4_moe.Glm4MoeTopkRouter", {"n_routed_experts": 160, "routed_scaling_factor": 2.5}
    ),
    "glm-4.5-air": HfModel("glm4_moe", "glm4_moe.Glm4MoeTopkRouter", {}),
    "gpt-oss": HfModel("gpt_oss", "gpt_oss.GptOssTopKRouter", {}),
    "gpt-oss-20b": HfModel("gpt_oss", "gpt_oss.GptOssTopKRouter", {"num_local_experts": 32}),
    "granite-moe": HfModel(
        "granitemoe", "granitemoe.GraniteMoeTopKRouter", {"num_local_experts": 32, "num_experts_per_tok": 8}
    ),
    "granite-moe-3b": HfModel(
        "granitemoe", "granitemoe.GraniteMoeTopKRouter", {"num_local_experts": 40, "num_experts_per_tok": 8}
    ),
    "kimi-k2": HfModel(
        "deepseek_v3",
        "deepseek_v3.DeepseekV3TopkRouter",
        {"n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    ),
    "lfm2-moe": HfModel("lfm2_moe", "lfm2_moe.Lfm2MoeTopKRouter", {}),
    "llama4": HfModel("llama4_text", "llama4.Llama4Router", {}),
    "llama4-maverick": HfModel("llama4_text", "llama4.Llama4Router", {"num_local_experts": 128}),
    "minimax-m2": HfModel("minimax_m2", "minimax_m2.MiniMaxM2TopKRouter", {}),
    "mixtral": HfModel("mixtral", "mixtral.MixtralTopKRouter", {}),
    "olmoe": HfModel("olmoe", "olmoe.OlmoeTopKRouter", {}),
    "qwen2-moe": HfModel("qwen2_moe", "qwen2_moe.Qwen2MoeTopKRouter", {}),
    "qwen3-moe": HfModel("qwen3_moe", "qwen3_moe.Qwen3MoeTopKRouter", {"norm_topk_prob": True}),
    "qwen3-next": HfModel("qwen3_next", "qwen3_next.Qwen3NextTopKRouter", {}),
}

_GROUPED = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.75}
_NO_AUX = {"n_routed_experts": 32, "num_experts_per_tok": 5, **_GROUPED}
# Other model types that from_model_config knows: small sizes, every key away from its default.
HF_OTHERS = [
    HfModel("afmoe", "afmoe.AfmoeTokenChoiceRouter", {"num_experts": 24, "route_scale": 1.5}),
    HfModel("dots1", "dots1.Dots1TopkRouter", _NO_AUX),
    HfModel("exaone_moe", "exaone_moe.ExaoneMoeTopkRouter", {"num_experts": 32, **_GROUPED}),
    HfModel("flex_olmo", "flex_olmo.FlexOlmoTopKRouter", {"num_experts": 24, "norm_topk_prob": True}),
    HfModel("glm4_moe_lite", "glm4_moe_lite.Glm4MoeLiteTopkRouter", _NO_AUX),
    HfModel("glm4v_moe_text", "glm4v_moe.Glm4vMoeTextTopkRouter", _NO_AUX),
    HfModel("glm_moe_dsa", "glm_moe_dsa.GlmMoeDsaTopkRouter", _NO_AUX),
    HfModel("granitemoehybrid", "granitemoehybrid.GraniteMoeHybridTopKRouter", {"num_local_experts": 24}),
    HfModel("granitemoeshared", "granitemoeshared.GraniteMoeSharedTopKRouter", {"num_local_experts": 24}),
    HfModel("hy_v3", "hy_v3.HYV3TopKRouter", {"num_experts": 24, "router_scaling_factor": 1.5}),
    HfModel("jamba", "jamba.JambaTopKRouter", {"num_experts": 24}),
    HfModel(
        "kimi_linear",
        "kimi_linear.KimiLinearTopkRouter",
        {"num_experts": 32, "num_experts_per_token": 5, "num_expert_group": 4, "topk_group": 2},
    ),
    HfModel("minimax", "minimax.MiniMaxTopKRouter", {"num_local_experts": 24}),
    HfModel("mistral4", "mistral4.Mistral4TopkRouter", _NO_AUX),
    HfModel("mistral4", "mistral4.Mistral4TopkRouter", {**_NO_AUX, "norm_topk_prob": False}),
    HfModel("qwen3_5_moe_text", "qwen3_5_moe.Qwen3_5MoeTopKRouter", {"num_experts": 24}),
    HfModel("qwen3_moe", "qwen3_moe.Qwen3MoeTopKRouter", {"norm_topk_prob": False}),
    HfModel("qwen3_vl_moe_text", "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter", {"num_local_experts": 24}),
    HfModel("solar_open", "solar_open.SolarOpenTopkRouter", _NO_AUX),
]

HIDDEN = 64
TOKENS = 48


def hf_config(model):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    if model.model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model.model_type}")
    return transformers.CONFIG_MAPPING[model.model_type](**model.fields)


def hf_router(model, config, seed):
    """The router with random float32 weights; and a random selection bias, None if the model has none."""
    import torch

    module, class_name = model.router.split(".")
    try:
        router_class = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), class_name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {model.router}")
    config.hidden_size = HIDDEN
    router = router_class(config).float()
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    for name, tensor in [*router.named_buffers(), *router.named_parameters()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data = torch.randn(tensor.shape, generator=generator) / 10
            return router, tensor
    if bias_argument(router):
        return router, torch.randn(router.num_experts, generator=generator) / 10
    return router, None


def bias_argument(router):
    """The argument of forward that brings the bias, where the block owns it rather than the router; else None."""
    arguments = inspect.signature(router.forward).parameters
    return next((name for name in ("e_score_correction_bias", "expert_bias") if name in arguments), None)


def hf_route(router, bias, hidden):
    """(logits [T, E], weights [T, k], ids [T, k]) of the class, in torch."""
    import torch

    if type(router).__name__.startswith("Afmoe"):
        hidden = hidden[None]  # this one insists on a batch
    out = router(hidden, **({bias_argument(router): bias} if bias_argument(router) else {}))
    if type(router).__name__ == "Llama4Router":  # dense sigmoid scores [T, E], zero where not chosen
        scores, logits = out
        weights, ids = torch.topk(scores, router.top_k, dim=-1)
        return logits, weights, ids
    return out


def check_against_class(model, seed):
    """Our gating on the class's own logits: the same sets of ids, per id a weight within both sides' error, and the
    gradient that autograd gives the logits through the class."""
    config = hf_config(model)
    import torch

    ours = RouterConfig.from_model_config(config)
    router, bias = hf_router(model, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    hf_logits, hf_weights, hf_ids = hf_route(router, bias, torch.randn(TOKENS, HIDDEN, generator=generator))
    grad_of_expert = torch.randn(TOKENS, ours.num_experts, generator=generator)  # of the weight, were the expert chosen
    (hf_grad,) = torch.autograd.grad(hf_weights, hf_logits, grad_of_expert.gather(1, hf_ids))
    logits, weights, ids = (tensor.detach().numpy() for tensor in (hf_logits, hf_weights, hf_ids))
    bias = None if bias is None else bias.detach().reshape(-1).numpy()

    gating = pyroute.topk_gating(logits, ours, bias=bias)
    our_ids, our_weights, counts = gating
    assert our_ids.shape == ids.shape
    order, our_order = np.argsort(ids, axis=1), np.argsort(our_ids, axis=1)
    ids = np.take_along_axis(ids, order, 1)
    assert np.array_equal(ids, np.take_along_axis(our_ids, our_order, 1))
    assert np.array_equal(counts, counts_of(ids, ours.num_experts))
    weights = np.take_along_axis(weights, order, 1).astype(np.float64)
    error = np.abs(np.take_along_axis(our_weights, our_order, 1) - weights)
    bound = 2 * weight_bound(ours, logits, ids, weights, 2.0**-24)
    assert (error <= bound).all()

    grad_weights = np.take_along_axis(grad_of_expert.numpy(), our_ids, 1)
    grad = pyroute.topk_gating_backward(grad_weights, logits, gating, ours, bias=bias)
    # A gradient is weight * (grad - weighted mean of grads) times a factor of at most 1: the weight's error times twice
    # the largest grad, and as much again for the derivative of the score. Per token, not per element.
    largest = np.abs(grad_weights).max(axis=1, keepdims=True)
    assert (np.abs(grad - hf_grad.numpy()) <= 4 * largest * bound.max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("name", HF_PRESETS)
def test_preset_routes_as_the_class_of_transformers(name):
    model = HF_PRESETS[name]
    assert RouterConfig.from_model_config(hf_config(model)) == RouterConfig.preset(name)
    for seed in (0, 10, 20):
        check_against_class(model, seed)


@pytest.mark.parametrize("model", HF_OTHERS, ids=lambda model: model.model_type)
def test_model_type_routes_as_the_class_of_transformers(model):
    for seed in (0, 10, 20):
        check_against_class(model, seed)


# Where the class's defaults are the released model: the sizes of the layer, read independently of our table.
HF_SIZES = {
    "deepseek-v3": "moe_intermediate_size",
    "deepseek-v3.2": "moe_intermediate_size",
    "deepseek-v4": "moe_intermediate_size",
    "ernie-4.5": "moe_intermediate_size",
    "glm-4.5-air": "moe_intermediate_size",
    "gpt-oss": "intermediate_size",
    "lfm2-moe": "moe_intermediate_size",
    "llama4": "intermediate_size",
    "minimax-m2": "intermediate_size",
    "mixtral": "intermediate_size",
    "qwen2-moe": "moe_intermediate_size",
    "qwen3-moe": "moe_intermediate_size",
    "qwen3-next": "moe_intermediate_size",
}


@pytest.mark.parametrize("name", HF_SIZES)
def test_model_shape_is_the_class_default(name):
    config = hf_config(HF_PRESETS[name])
    shape = model_shape(name)
    assert (shape.hidden, shape.intermediate) == (config.hidden_size, getattr(config, HF_SIZES[name]))
    shared = [getattr(config, key, 0) for key in ("n_shared_experts", "moe_num_shared_experts")]
    shared_intermediate = getattr(config, "shared_expert_intermediate_size", 0) or sum(shared) * shape.intermediate
    if name == "llama4":  # one shared expert of the same width, which the configuration does not count
        shared_intermediate = shape.intermediate
    assert shape.shared_intermediate == shared_intermediate


def test_every_rule_that_transformers_has_is_compared():
    from pyroute import router_models

    compared = {model.model_type for model in [*HF_PRESETS.values(), *HF_OTHERS]}
    assert set(router_models._RULES) - compared == {"kimi_k2"}  # its code on the hub is DeepSeek-V3's
