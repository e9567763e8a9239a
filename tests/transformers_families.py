"""A tiny random model of every MoE family in transformers, and the table of what pyroute does with each.

``python tests/transformers_families.py`` writes the table of docs/transformers.md; tests/test_transformers.py compares.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

# Every spelling of a size that some configuration has; a configuration takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 8, "num_experts": 8,
    "num_local_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2,
    "moe_topk": 2, "top_k_experts": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "num_dense_layers": 0,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "shared_expert_intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "moe_layer_start_index": 0, "n_shared_experts": 1, "num_shared_experts": 1,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16,
}  # fmt: skip

_LINEAR = {"num_hidden_layers": 4}  # every fourth layer has the attention that counts positions
_LATENT = {"head_dim": None, "num_key_value_heads": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "glm4_moe_lite", "glm_moe_dsa"),
        _LATENT,
    ),
    **dict.fromkeys(("mistral4", "mistral_large4"), _LATENT),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear", "qwen3_5_moe", "qwen3_next", "qwen4_exp"), _LINEAR),
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 24]},
    "gemma4": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "enable_moe_block": True},
    "glm5_next": {**_LATENT, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "zaya": {"num_experts_per_tok": 1},
    # outside the experts interface
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
    },
    "jetmoe": {"kv_channels": 8},
    "llama4": {"intermediate_size_mlp": 48},
    "longcat_flash": {
        "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "zero_expert_num": 4, "num_layers": 2,
        "num_key_value_heads": 4,
    },
    "step3p7": {"sliding_window": 8, "mlp_layer_types": ["dense", "sparse"], "swiglu_limits": [0.0, 1.5]},
}  # fmt: skip


# Families whose models need more than sizes to be built small: their experts are compared alone.
EXPERTS_ONLY = {
    "bailing_hybrid", "beam", "deepseek_ocr2", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "kimi_linear", "qwen4_exp",
}  # fmt: skip


def families() -> list[str]:
    """Model types whose experts go through transformers' experts interface."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    found = (p for p in models.glob("*/modeling_*.py") if "@use_experts_implementation" in p.read_text())
    return sorted(p.parent.name for p in found if p.stem == f"modeling_{p.parent.name}")


def outside_families() -> list[str]:
    """Model types whose experts do not go through that interface, and that pyroute covers."""
    from pyroute.integrations.transformers.swapping import all_families

    return sorted(set(all_families()) - set(families()))


def candidates(family: str) -> list[type]:
    """Model classes to try, those with logits first, then text models."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    classes = [c for c in classes if getattr(c, "config_class", None) and "PreTrained" not in c.__name__]
    patterns = (
        r"ForCausalLM$",
        r"TextModel$|TalkerModel$",
        r"ForTokenClassification$",
        r"ForConditionalGeneration$",
        r"Model$",
    )
    return [c for pattern in patterns for c in classes if re.search(pattern, c.__name__)]


def tiny_config(model_class: type, family: str) -> Any:
    config_class = model_class.config_class
    known = {field.name for field in dataclasses.fields(config_class)}
    wanted = {**SIZES, **OVERRIDES.get(family, {})}
    config = config_class(**{name: value for name, value in wanted.items() if name in known and value is not None})
    if family == "dbrx":
        config.attn_config.rope_theta = 10000.0  # its own class lacks what its model reads
    return config


def experts_of(model: Any) -> list[Any]:
    from pyroute.integrations.transformers.outside import FORWARDS

    return [m for m in model.modules() if hasattr(m, "is_transposed") or type(m).__name__ in FORWARDS]


def tiny_model(family: str) -> Any:
    """A model of a few ten thousand parameters with experts large enough to matter; LookupError with the reasons."""
    import torch

    reasons = []
    for model_class in candidates(family):
        try:
            config = tiny_config(model_class, family)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class._from_config(copy.deepcopy(config)).parameters())
            if size > 1e7:
                reasons.append(f"{model_class.__name__} has {size} parameters")
                continue
            torch.manual_seed(0)
            model = model_class._from_config(config, experts_implementation="eager").float().eval()
            routers = [p for p in model.parameters() if p.shape == (SIZES["num_experts"], SIZES["hidden_size"])]
            for parameter in (*routers, *(p for module in experts_of(model) for p in module.parameters())):
                torch.nn.init.normal_(parameter, std=0.2)
            for name, buffer in model.named_buffers():  # biases that choose
                if name.endswith(("e_score_correction_bias", "expert_bias")):
                    torch.nn.init.normal_(buffer, std=0.1)
            model(input_ids=torch.arange(3, 9)[None])
            if experts_of(model):
                return model
            reasons.append(f"{model_class.__name__} has no experts")
        except Exception as error:
            reasons.append(f"{model_class.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
    raise LookupError("; ".join(reasons))


def experts_class(family: str) -> type:
    """The family's experts module, which the interface's decorator has marked."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    return next(c for c in classes if hasattr(c, "_apply_gate") and hasattr(c.forward, "__wrapped__"))


def tiny_experts(family: str) -> Any:
    """The experts module alone, for families whose models need more than sizes."""
    import torch

    experts = experts_class(family)
    reasons = []
    for model_class in candidates(family):
        try:
            config = tiny_config(model_class, family)
            for name, value in SIZES.items():  # sizes that a module reads and the configuration computes otherwise
                if getattr(config, name, value) is None:
                    setattr(config, name, value)
            takes_size = "intermediate_size" in inspect.signature(experts.__init__).parameters
            module = experts(config, *(SIZES["moe_intermediate_size"],) * takes_size)
            if sum(p.numel() for p in module.parameters()) > 1e6:
                continue
            torch.manual_seed(0)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            return module
        except Exception as error:
            reasons.append(f"{model_class.__name__}: {type(error).__name__}: {error}")
    raise LookupError("; ".join(reasons))


def router_classes(family: str) -> list[type]:
    """The classes of a family that look like routers."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    return [c for c in classes if re.search(r"(Router|MoE\w*Gate)$", c.__name__) and "Vision" not in c.__name__]


def tiny_router(family: str) -> Any:
    """The router alone, for families whose experts are compared alone."""
    import torch

    for model_class in candidates(family):
        for router_class in router_classes(family):
            try:
                config = tiny_config(model_class, family)
                for name, value in SIZES.items():
                    if getattr(config, name, value) is None:
                        setattr(config, name, value)
                torch.manual_seed(0)
                router = router_class(config)
            except Exception:
                continue
            for tensor in (*router.parameters(), *router.buffers()):
                torch.nn.init.normal_(tensor, std=0.2)
            return router
    raise LookupError(family)


def rules(swapped: Any) -> str:
    """The routers' part of a line: rules without the sizes of the tiny model, or why a router keeps its own code."""
    texts = [text for text in swapped.swapped.values() if text.startswith("num_experts=")]
    words = {re.sub(r"(num_experts|top_k|num_groups|topk_groups)=\d+,?", "", text).strip(",") for text in texts}
    known = [f"`{word}`" if word else "`score=softmax`" for word in sorted(words)]
    known += [f"its own: {why}" for why in sorted(set(swapped.left.values()))]
    return "; ".join(known) or ("with the experts" if "Llama4TextMoe" in swapped.swapped else "its own")


def line(family: str, module: Any, model: Any, swapped: Any) -> str:
    """The family's line of the table, after ``module`` has run on pyroute."""
    activation = module.__dict__.get("_pyroute_activation")
    way = "step by step" if activation is None else f"`{activation[0]}`"
    if family in outside_families() and activation is None:
        way = f"`{type(module).__name__}`"
    compared = "experts module" if model is None else f"`{type(model).__name__}`"
    return f"| {family} | {compared} | {way} | {rules(swapped)} |"


def call_experts(module: Any, forward: Any) -> list[Any]:
    """One call of an experts module through ``forward``: the result and all gradients."""
    import torch

    generator = torch.Generator().manual_seed(2)
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(11, hidden, generator=generator, requires_grad=True)
    ids = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(11)])
    weights = torch.rand(11, 2, generator=generator).requires_grad_()
    y = forward(module, x, ids, weights)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weights, *module.parameters()))]


def write_table() -> None:
    import warnings

    import torch

    from pyroute.integrations import transformers as integration

    warnings.simplefilter("ignore")
    lines = []
    for family in (*families(), *outside_families()):
        model = None if family in EXPERTS_ONLY else tiny_model(family)
        if model is None:
            module = tiny_experts(family)
            call_experts(module, integration.experts_forward)
            swapped = integration.swap(tiny_router(family))
        else:
            module = experts_of(model)[0]
            swapped = integration.swap(model)
            model(input_ids=torch.arange(3, 9)[None])
        lines.append(line(family, module, model, swapped))
    path = Path(__file__).resolve().parent.parent / "docs" / "transformers.md"
    head, rule, _ = path.read_text().partition("|---|---|---|---|\n")
    path.write_text(head + rule + "\n".join(lines) + "\n")


if __name__ == "__main__":
    write_table()
