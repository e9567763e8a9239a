"""Expert choice: every expert takes its best tokens, so that all experts carry the same load."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _backend, _check
from . import _gating_contract as contract
from ._array import gating as array_gating
from ._array import gating_losses as array_losses
from ._check import Array
from .gating import Gating


class ExpertChoice(NamedTuple):
    """What the experts chose.

    Attributes
    ----------
    token_idx : int32 [num_experts, capacity]
        Token ids, best first, distinct in a row; -1 where there are fewer real tokens than ``capacity``.
    token_weights : float32 [num_experts, capacity], float64 for float64 logits
        The softmax score of the expert for the token; exactly 0 where the id is -1.
    num_tokens : int
    """

    token_idx: Array
    token_weights: Array
    num_tokens: int

    def to_gating(self) -> Gating:
        """The same assignments by token, as :func:`plan_routes` and :func:`topk_gating_backward` read them.

        ``top_k`` is then the largest number of experts that took one token (at least 1), which depends on the data: on
        a GPU this waits for it, and takes CuPy's arrays. A token's experts are in ascending order, the slots that it
        does not need are -1.
        The gradient of the logits is that of ``RouterConfig(num_experts, top_k)``, a softmax without renormalisation.
        """
        if _check.is_device_array(self.token_idx):
            expected = "NumPy or CuPy arrays, since top_k depends on them"
            raise _check.type_error("ExpertChoice.to_gating", "token_idx", expected, _check.describe(self.token_idx))
        xp = _backend.array_module(self.token_idx)
        return Gating(*array_gating.by_token(xp, self.token_idx, self.token_weights, self.num_tokens))


def expert_choice_gating(
    logits: Any, capacity: int, *, token_mask: Any = None, backend: str | None = None
) -> ExpertChoice:
    """Let every expert choose its ``capacity`` best tokens by softmax score.

    The scores are a softmax over experts, as in :func:`topk_gating`; each expert takes the tokens with its largest
    scores. Equal scores: the lower token id. A token may be taken by any number of experts, or by none. A NaN score
    ranks below all others.

    Not causal: whether a token is taken depends on later tokens, so this serves training and encoders. For the same
    reason the result depends on the batch, unlike that of :func:`topk_gating`.

    Parameters
    ----------
    logits : float32, bfloat16, float16 or float64 [num_tokens, num_experts]
    capacity : int, at least 0
        Tokens per expert; ``num_tokens * capacity_factor / num_experts`` for an average of ``capacity_factor`` experts
        per token.
    token_mask : bool [num_tokens], optional
        False: the token is never taken.
    backend : {None, "numpy", "cupy", "cpu", "cuda"}

    Returns
    -------
    ExpertChoice
        The same bytes on every backend, instruction set and thread count.

    Raises
    ------
    TypeError, ValueError
        For a wrong kind, dtype, shape or range, before any work.

    Notes
    -----
    Expert choice routing, arXiv:2202.09368. The cpu backend keeps one integer per logit while it works.

    Examples
    --------
    >>> choice = pyroute.expert_choice_gating(np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], np.float32), 1)
    >>> choice.token_idx.tolist(), choice.to_gating().topk_idx.tolist()
    ([[0], [2]], [[0], [-1], [1]])
    """
    function = "expert_choice_gating"
    z = contract.logits_array(function, logits, None)
    capacity = _check.integer(function, "capacity", capacity, 0, 2**31 - 1)
    mask = contract.mask_array(function, token_mask, z.shape[0])
    chosen = _backend.choose(function, backend, z, mask)
    if chosen == "cuda":
        from ._device import gating as device

        return ExpertChoice(*device.expert_choice(z, capacity, mask), z.shape[0])
    xp = _backend.array_module(z)
    tokens = xp.nonzero(array_losses.real_tokens(xp, mask, z.shape[0]))[0].astype(xp.int32)
    match chosen:
        case "cpu":
            dtype = contract.weight_dtype(z)
            shape = (z.shape[1], capacity)
            idx, weights = _backend.empty(shape, np.int32), _backend.empty(shape, dtype)
            keys = _backend.empty((z.shape[1], tokens.size), dtype.replace("float", "int"))
            _backend.core.expert_choice(z, _check.DTYPE_NAMES[z.dtype], tokens, keys, idx, weights)
        case _:
            idx, weights = array_gating.expert_choice(xp, z, capacity, tokens)
    return ExpertChoice(idx, weights, z.shape[0])
