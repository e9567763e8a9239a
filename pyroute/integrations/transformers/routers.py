"""The forward of transformers' routers on ``topk_gating``, for every class whose rule is a RouterConfig.

A router's rule is found by trying its own code: on random tokens and weights the class gives logits, weights and ids,
and the RouterConfig that gives the same is its rule. Some tokens have logits near -14, -30 and -46, where a sigmoid is
as small as the 1e-6, 1e-12 and 1e-20 that models add to their sums, so that these too are told apart. A class whose
code is no RouterConfig (sparsemixer, a learnt factor per expert, two kinds of experts in one softmax) keeps its own
forward.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...pytorch import router_logits, topk_gating
from ...router_config import RouterConfig

RULE = "_pyroute_rule"
_rules: dict[Any, Rule | NoRuleError] = {}

_BIAS_ARGUMENTS = ("e_score_correction_bias", "expert_bias")
_GROUPS, _TOPK_GROUPS = ("num_group", "n_group"), ("topk_group",)
_FACTORS = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
_SUMS = [("sum", eps) for eps in (1e-20, 0.0, 1e-15, 1e-12, 1e-6)]
_RENORMALIZE = [(None, 1e-20), *_SUMS, ("clamp", 1e-12)]
_SCORES = [("softmax", "pre"), ("sigmoid", "pre"), ("sqrtsoftplus", "pre"), ("softmax", "post")]


class Rule(NamedTuple):
    """What a router module computes, and where its tensors are."""

    config: RouterConfig
    weight: str  # name of the parameter [num_experts, hidden]
    logit_bias: str | None
    selection_bias: str | None  # name of a tensor, or "" for an argument of forward
    table: str | None  # experts by token id, which forward is given
    in_float32: bool  # the product, whatever the model's type
    logits_float32: bool  # the returned logits
    weights_float32: bool  # the returned weights


class NoRuleError(Exception):
    """Why a router is no RouterConfig."""


def rule_of(module: Any) -> Rule:
    """The module's rule, found at its first call; NoRuleError with the reason for any other router."""
    found = module.__dict__.get(RULE)
    if found is None:
        found = module.__dict__[RULE] = _found(module)
    if isinstance(found, NoRuleError):
        raise found
    return found


def _found(module: Any) -> Rule | NoRuleError:
    """Trying takes 20 to 400 ms, so once for all layers that differ in nothing but their tensors."""
    try:
        layout = _layout(module)
    except NoRuleError as reason:
        return reason
    scalars = (int, float, str, bool, type(None))
    settings = ((name, value if isinstance(value, scalars) else type(value)) for name, value in vars(module).items())
    kept = (item for item in settings if item[0] not in ("training", "layer_idx", RULE))
    key = (type(module), layout, tuple(sorted(kept, key=lambda item: item[0])))
    if key not in _rules:
        with torch.no_grad():
            _rules[key] = _recognised(module, layout)
    return _rules[key]


def _recognised(module: Any, layout: _Layout) -> Rule | NoRuleError:
    try:
        return _recognise(module, layout)
    except NoRuleError as reason:
        return reason


def router_forward(self: Any, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
    """``(router_logits, top_k_weights, top_k_index int64)`` of [..., hidden], as the module's own forward."""
    known = self.__dict__.get(RULE)
    if known is None and not torch.compiler.is_compiling():
        known = self.__dict__[RULE] = _found(self)
    if not isinstance(known, Rule):
        return type(self)._pyroute_original.forward(self, hidden_states, *arguments, **named)
    weight = _tensor(self, known.weight)
    x = hidden_states.reshape(-1, weight.shape[1])
    bias = None if known.logit_bias is None else _tensor(self, known.logit_bias)
    if known.in_float32:
        logits = router_logits(_operand(x), _operand(weight))
        logits = logits if bias is None else logits + bias.float()
    else:
        logits = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
        logits = logits.float() if known.logits_float32 else logits
    argument: Any = next(iter((*arguments, *named.values())), None)
    correction, ids = None, None
    if known.selection_bias is not None:
        correction = argument if known.selection_bias == "" else _tensor(self, known.selection_bias)
        correction = correction.detach().reshape(-1).float()
    if known.table:
        ids = _tensor(self, known.table)[argument.reshape(-1)]
    gating = topk_gating(logits, known.config, bias=correction, topk_idx=ids)
    weights = gating.topk_weights if known.weights_float32 else gating.topk_weights.to(hidden_states.dtype)
    return logits, weights, gating.topk_idx.long()


def _operand(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


def _tensor(module: Any, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    result: Tensor = module
    return result


# --- finding the rule -------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    weight: str
    logit_bias: str | None
    selection_bias: str | None
    table: str | None
    num_experts: int
    hidden: int


def _layout(module: Any) -> _Layout:
    """The tensors of a router; NoRuleError if there are others, or an argument that is no bias."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tables = [name for name, tensor in tensors.items() if tensor.dim() == 2 and not tensor.is_floating_point()]
    for name in tables:
        tensors.pop(name)
    matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2 and min(tensor.shape) > 1]
    if len(matrices) != 1:
        raise NoRuleError(f"it has {len(matrices)} matrices where a router has one")
    weight = matrices.pop()
    num_experts, hidden = tensors.pop(weight).shape
    logit_bias = weight.removesuffix("weight") + "bias"
    has_bias = tensors.pop(logit_bias, None) is not None
    selection = next((name for name in tensors if name.rpartition(".")[2] == "e_score_correction_bias"), None)
    tensors.pop(selection or "", None)
    if tensors:
        raise NoRuleError(f"RouterConfig has nothing like its {', '.join(sorted(tensors))}")
    arguments = list(inspect.signature(type(module)._pyroute_original.forward).parameters)[2:]
    known = ("input_ids",) if tables else _BIAS_ARGUMENTS
    if len(arguments) > 1 or len(tables) > 1 or any(name not in known for name in arguments):
        raise NoRuleError(f"its forward takes {', '.join(arguments)}")
    if arguments and not tables:
        selection = ""
    return _Layout(weight, logit_bias if has_bias else None, selection, next(iter(tables), None), num_experts, hidden)


class _Trial(NamedTuple):
    logits: Tensor
    weights: Tensor
    ids: Tensor
    expected_logits: Tensor
    bias: Tensor | None


def _try(module: Any, layout: _Layout, seed: int, dtype: torch.dtype = torch.float32, training: bool = False) -> _Trial:
    """What the module's own code gives for random tokens and weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = draw(48, layout.hidden), draw(layout.num_experts, layout.hidden) * 2 / layout.hidden**0.5
    x[:, 0], weight[:, 0] = torch.tensor([0.0] * 24 + [-14.0] * 8 + [-30.0] * 8 + [-46.0] * 8), 1.0
    # mostly below -1: code that masks groups with 0 instead of -inf then prefers what it has masked
    bias = 0.5 * draw(layout.num_experts) - 1.5 if layout.selection_bias is not None else None
    replaced = {layout.weight: weight.to(dtype)}
    arguments: list[Tensor] = []
    if layout.logit_bias:
        replaced[layout.logit_bias] = (0.1 * draw(layout.num_experts)).to(dtype)
    if bias is not None and layout.selection_bias:
        replaced[layout.selection_bias] = bias.reshape(_tensor(module, layout.selection_bias).shape)
    elif bias is not None:
        arguments.append(bias)
    if layout.table:
        top_k = _tensor(module, layout.table).shape[1]
        replaced[layout.table] = torch.rand(48, layout.num_experts, generator=generator).argsort(1)[:, :top_k]
        arguments.append(torch.arange(48))
    try:
        out = _called(module, training, replaced, (x.to(dtype), *arguments))
    except NoRuleError:  # a class that asks for [batch, length, hidden]
        out = _called(module, training, replaced, (x.to(dtype)[None], *arguments))
    logit_bias = replaced.get(layout.logit_bias or "")
    product = torch.nn.functional.linear(x.to(dtype), replaced[layout.weight], logit_bias)
    if not isinstance(out, tuple) or len(out) != 3 or not all(isinstance(t, Tensor) and t.dim() > 1 for t in out):
        raise NoRuleError("its forward gives something else than logits, weights and ids")
    logits, weights, ids = (t.reshape(-1, t.shape[-1]) for t in out)
    floating = [t.is_floating_point() for t in (logits, weights, ids)]
    if floating != [True, True, False] or logits.shape != product.shape or weights.shape != ids.shape:
        raise NoRuleError("its forward gives something else than logits, weights and ids")
    return _Trial(logits, weights, ids, product, bias)


def _called(module: Any, training: bool, replaced: dict[str, Tensor], arguments: tuple[Any, ...]) -> Any:
    """The module's own forward, on a copy that has these tensors."""
    original = type(module)._pyroute_original
    try:
        twin = copy.deepcopy(module)
        twin.__class__ = original
        twin.train(training)
        for name, tensor in replaced.items():
            owner, _, last = name.rpartition(".")
            part = twin.get_submodule(owner)
            part._parameters.pop(last, None)
            part._buffers[last] = tensor
        return original.forward(twin, *arguments)
    except Exception as error:
        raise NoRuleError(f"its forward did not run on trial tokens ({type(error).__name__})") from error


def _recognise(module: Any, layout: _Layout) -> Rule:
    for seed in (0, 1):  # a near tie of one of them may fall the other way
        trial = _try(module, layout, seed)
        if not torch.allclose(trial.logits, trial.expected_logits, rtol=1e-4, atol=1e-4):
            raise NoRuleError("its logits are not the product of tokens and weight")
        for config, biased in _candidates(module, layout, trial.ids.shape[-1]):
            if _same(trial, config, biased, layout):
                if not _same(_try(module, layout, seed, training=True), config, biased, layout):
                    raise NoRuleError("its code gives other experts or weights in training")
                return _types(module, layout if biased else layout._replace(selection_bias=None), config)
    raise NoRuleError("its code gives other experts or weights than any RouterConfig")


def _types(module: Any, layout: _Layout, config: RouterConfig) -> Rule:
    """Which types a bfloat16 module computes and returns."""
    try:
        trial = _try(module, layout, 0, torch.bfloat16)
    except NoRuleError:  # a module that only runs in float32
        return Rule(config, *layout[:4], True, True, True)
    in_float32 = trial.logits.dtype == torch.float32 and not torch.equal(trial.logits, trial.expected_logits.float())
    types = (in_float32, trial.logits.dtype == torch.float32, trial.weights.dtype == torch.float32)
    return Rule(config, *layout[:4], *types)


def _candidates(module: Any, layout: _Layout, top_k: int) -> Iterator[tuple[RouterConfig, bool]]:
    """Every RouterConfig that the module's attributes allow, with the bias and without."""
    num_groups, topk_groups = (_first(module, names) or 1 for names in (_GROUPS, _TOPK_GROUPS))
    groups: list[Any] = [(num_groups, topk_groups, score) for score in ("top2_sum", "max", "topn_sum")]
    groups = [*(groups if num_groups > 1 else ()), (1, 1, "max")]
    factors = dict.fromkeys((float(_first(module, _FACTORS) or 1.0), 1.0, 1 / top_k))
    biased = (True, False) if layout.selection_bias is not None else (False,)
    options = itertools.product(groups, _SCORES, _RENORMALIZE, factors, biased)
    for (num_groups, topk_groups, group_score), (score, stage), (renormalize, eps), factor, with_bias in options:
        fields: dict[str, Any] = {
            "score": score, "score_stage": stage, "num_groups": num_groups, "topk_groups": topk_groups,
            "group_score": group_score, "renormalize": renormalize, "renormalize_eps": eps, "scaling_factor": factor,
        }  # fmt: skip
        try:
            config = RouterConfig(layout.num_experts, top_k, **fields)
        except ValueError:  # groups too small for top_k, a stage that has no groups
            continue
        yield config, with_bias


def _first(module: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if getattr(module, name, None)), None)


def _same(trial: _Trial, config: RouterConfig, biased: bool, layout: _Layout) -> bool:
    given = trial.ids if layout.table else None
    got = topk_gating(trial.logits.float(), config, bias=trial.bias if biased else None, topk_idx=given)
    ids, order = trial.ids.sort(dim=-1)
    mine, my_order = got.topk_idx.long().sort(dim=-1)
    weights, my_weights = trial.weights.float().gather(1, order), got.topk_weights.gather(1, my_order)
    return torch.equal(ids, mine) and torch.allclose(weights, my_weights, rtol=2e-5, atol=0.0)
