"""RouterConfig: everything that decides how a model's router turns logits into expert ids and weights."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

from . import _check

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
ScoreStage = Literal["pre", "post"]
GroupScore = Literal["max", "top2_sum", "topn_sum"]
Renormalize = Literal["sum", "clamp"]
WeightOn = Literal["output", "pre_down", "input"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "score": ("softmax", "sigmoid", "sqrtsoftplus"),
    "score_stage": ("pre", "post"),
    "group_score": ("max", "top2_sum", "topn_sum"),
    "weight_on": ("output", "pre_down", "input"),
}


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """One model's routing rule: frozen, hashable, checked on construction.

    A selection bias is an argument of the call, not part of the rule, since it is trained.

    Parameters
    ----------
    num_experts : int
        Routed experts E, at least 1. Shared experts are not routed and do not count.
    top_k : int
        Experts per token k, in 1..num_experts.
    score : {"softmax", "sigmoid", "sqrtsoftplus"}
        From logits to scores; sqrtsoftplus is ``sqrt(log(1 + exp(z)))``.
    score_stage : {"pre", "post"}
        ``"pre"``: the weights are scores over all experts, taken at the chosen ids. ``"post"``: softmax over the k
        chosen logits only. ``"post"`` asks for softmax without groups and without renormalisation: the other scores
        work per expert, so that both stages would be the same, and a softmax over k sums to 1 already.
    num_groups, topk_groups : int
        The experts form ``num_groups`` equal runs of consecutive ids, and a token takes its experts from its best
        ``topk_groups`` of them, which must hold top_k experts. 1 and 1: no groups.
    group_score : {"max", "top2_sum", "topn_sum"}
        What ranks a group: the sum of its largest 1, 2 or ``top_k // topk_groups`` keys. Not used with one group.
    renormalize : {None, "sum", "clamp"} or bool
        ``"sum"`` (or True) divides a token's weights by ``their sum + renormalize_eps``, ``"clamp"`` by
        ``max(their sum, renormalize_eps)``; None (or False) leaves them. With top_k = 1 the weight is then 1 and its
        gradient 0.
    renormalize_eps : float
        At least 0.
    scaling_factor : float
        Multiplies the weights at the end, above 0.
    weight_on : {"output", "pre_down", "input"}
        Where the layer applies a weight: to an expert's output, before its down projection, or to its input.

    Raises
    ------
    TypeError, ValueError
        In one sentence that names the field.

    Examples
    --------
    >>> config = RouterConfig(64, 6, renormalize=True, scaling_factor=2.5)
    >>> str(config)
    'num_experts=64,top_k=6,renormalize=sum,scaling_factor=2.5'
    >>> RouterConfig.from_string(str(config)) == config
    True
    """

    num_experts: int
    top_k: int
    score: Score = "softmax"
    score_stage: ScoreStage = "pre"
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "max"
    renormalize: Renormalize | bool | None = None
    renormalize_eps: float = 1e-20
    scaling_factor: float = 1.0
    weight_on: WeightOn = "output"

    def __post_init__(self) -> None:
        num_experts = self._set_integer("num_experts", 2**31 - 1)  # ids are int32
        top_k = self._set_integer("top_k", num_experts, "num_experts")
        for field, allowed in _CHOICES.items():
            _check.one_of("RouterConfig", field, getattr(self, field), allowed)
        if isinstance(self.renormalize, bool):
            object.__setattr__(self, "renormalize", "sum" if self.renormalize else None)
        _check.one_of("RouterConfig", "renormalize", self.renormalize, ("sum", "clamp", None))
        eps = _check.real("RouterConfig", "renormalize_eps", self.renormalize_eps, minimum=0.0)
        object.__setattr__(self, "renormalize_eps", eps + 0.0)  # -0.0 becomes +0.0: equal configs, equal strings
        factor = _check.real("RouterConfig", "scaling_factor", self.scaling_factor)
        if factor <= 0.0:
            raise _check.value_error("RouterConfig", "scaling_factor", "above 0", factor)
        object.__setattr__(self, "scaling_factor", factor)
        self._check_groups(num_experts, top_k)
        self._check_stage()

    def _set_integer(self, field: str, high: int, high_name: str = "") -> int:
        number = _check.integer("RouterConfig", field, getattr(self, field), 1, high, high_name)
        object.__setattr__(self, field, number)  # a NumPy integer becomes int: one config, one hash, one string
        return number

    def _check_groups(self, num_experts: int, top_k: int) -> None:
        num_groups = self._set_integer("num_groups", num_experts, "num_experts")
        topk_groups = self._set_integer("topk_groups", num_groups, "num_groups")
        if num_experts % num_groups:
            raise _check.value_error(
                "RouterConfig", "num_groups", f"a divisor of num_experts ({num_experts})", num_groups
            )
        held = topk_groups * self.experts_per_group
        if held < top_k:
            expected = f"enough groups of {self.experts_per_group} to hold top_k ({top_k}) experts"
            raise _check.value_error("RouterConfig", "topk_groups", expected, topk_groups)
        if num_groups == 1:
            return
        if self.group_score == "top2_sum" and self.experts_per_group < 2:
            raise _check.value_error("RouterConfig", "group_score", "'max' with groups of one expert", "'top2_sum'")
        if self.group_score == "topn_sum" and top_k < topk_groups:
            expected = f"'max' or 'top2_sum' with top_k ({top_k}) below topk_groups ({topk_groups})"
            raise _check.value_error("RouterConfig", "group_score", expected, "'topn_sum'")

    def _check_stage(self) -> None:
        if self.score_stage == "pre":
            return
        if self.score != "softmax":
            raise _check.value_error("RouterConfig", "score_stage", f"'pre' with score '{self.score}'", "'post'")
        if self.num_groups > 1:
            raise _check.value_error("RouterConfig", "num_groups", "1 with score_stage 'post'", self.num_groups)
        if self.renormalize:
            expected = "None with score_stage 'post', whose weights sum to 1"
            raise _check.value_error("RouterConfig", "renormalize", expected, repr(self.renormalize))

    @property
    def experts_per_group(self) -> int:
        """Experts in one group: ``num_experts // num_groups``."""
        return self.num_experts // self.num_groups

    @property
    def group_topn(self) -> int:
        """How many of a group's largest keys its score sums: 1, 2 or ``top_k // topk_groups``."""
        return {"max": 1, "top2_sum": 2, "topn_sum": self.top_k // self.topk_groups}[self.group_score]

    def __str__(self) -> str:
        """``field=value`` for every field that is not at its default, in the order of the fields, joined by commas.

        The same config gives the same string in every process, and :meth:`from_string` gives the same config back:
        floats are written with the fewest digits that read back exactly.
        """
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return ",".join(f"{field.name}={value}" for field, value in fields if value != field.default)

    @staticmethod
    def from_string(text: str) -> RouterConfig:
        """The config whose ``str()`` is ``text``; ValueError for anything else that is not one."""
        if not isinstance(text, str):
            raise _check.type_error("RouterConfig.from_string", "text", "a string", _check.describe(text))
        return _parse(text)

    @staticmethod
    def preset(name: str) -> RouterConfig:
        """The rule of a released model; ValueError for a name that :func:`pyroute.presets` does not list.

        Examples
        --------
        >>> RouterConfig.preset("deepseek-v3").top_k
        8
        """
        from . import router_presets

        return router_presets.preset(name)

    @staticmethod
    def from_model_config(model_config: Any) -> RouterConfig:
        """The rule of a model, from the model's own configuration.

        Parameters
        ----------
        model_config : object
            A transformers configuration, its dict, or the path of a config.json or of the folder that holds one. Of a
            multimodal model the language part is taken.

        Returns
        -------
        RouterConfig
            ``model_type`` decides what the configuration leaves to the model's code. A type that is not known works if
            the configuration says the score function and whether weights are renormalised.

        Raises
        ------
        TypeError, ValueError
            In one sentence: what is missing, what contradicts, or a routing that RouterConfig does not cover.
        OSError
            If the file cannot be read.

        Examples
        --------
        >>> sizes = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
        >>> str(RouterConfig.from_model_config(sizes))
        'num_experts=8,top_k=2,renormalize=sum'
        """
        from . import router_models

        return router_models.from_model_config(model_config)


@functools.lru_cache(maxsize=256)  # an op that carries its config as text reads it on every call: 15 us without
def _parse(text: str) -> RouterConfig:
    types = {field.name: str(field.type) for field in dataclasses.fields(RouterConfig)}
    values: dict[str, Any] = {}
    for item in text.split(","):
        field, _, value = item.partition("=")
        if field not in types or field in values:
            expected = "'field=value' items with each field once"
            raise _check.value_error("RouterConfig.from_string", "text", expected, repr(text))
        try:
            values[field] = {"int": int, "float": float}.get(types[field], str)(value)
        except ValueError:
            kind = "an integer" if types[field] == "int" else "a number"
            raise _check.value_error("RouterConfig.from_string", field, kind, repr(value)) from None
    if not {"num_experts", "top_k"} <= values.keys():
        expected = "a text with num_experts and top_k"
        raise _check.value_error("RouterConfig.from_string", "text", expected, repr(text))
    return RouterConfig(**values)
