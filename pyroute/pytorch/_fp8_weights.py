"""FP8 forms of weights: made once for each state of a weight, which for a wide one is once an optimizer step.

A form belongs to a storage, a place in it and the version counter that in-place operations move; it goes with the
storage. It is part of no graph and of no gradient: an op that is given the wide weight looks it up, so forward,
recompute, backward and every micro-batch of a step read the same codes. The weight itself would not do as a key:
checkpointing hands its recomputed forward another tensor over the same storage. Nor would versions alone: fused AdamW
writes without moving them, and so does FSDP where it gathers weights, so every optimizer's step drops all forms.

On a GPU a form belongs to the stream that made it too: there alone it is known to be written before it is read, and
read before its memory serves another. A stream that captures a graph takes no form and leaves none: what a graph reads
it has to compute, or it would replay codes of weights that have changed since, from memory that is another's by then.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .._check import one_of
from ..quantization import Fp8Array, beside_transposed, quantize_fp8
from ._tensors import array, captures, stream_of

BLOCK = (128, 128)

_keeps_transposed = False

_forms: Any = WeakIdKeyDictionary()  # storage: {place: (version, form)}
_transposed: Any = WeakIdKeyDictionary()  # storage of frozen codes: {place: (state, codes transposed or None)}
_lock = threading.Lock()


def fp8_weight(function: str, argument: str, w: Tensor, scale_format: Any, for_dgrad: bool = False) -> Fp8Array:
    """``w`` in e4m3 with 128x128 blocks."""
    if w.is_inference() or captures(w):  # an inference tensor has no version counter
        return quantize_fp8(array(function, argument, w), block=BLOCK, scale_format=scale_format)
    _watch_optimizers()
    storage, version = w.untyped_storage(), w._version
    place = (w.data_ptr(), w.dtype, w.shape, w.stride(), scale_format, stream_of(w))
    with _lock:
        known = _forms.setdefault(storage, {}).get(place)
    form = known[1] if known is not None and known[0] == version else None
    keeps = for_dgrad and _keeps_transposed
    if form is not None and not (keeps and form.codes_transposed is None):
        return form
    if form is None:
        form = quantize_fp8(array(function, argument, w), block=BLOCK, scale_format=scale_format)
    if keeps:
        form = form.with_transposed_codes()
    with _lock:
        _forms.setdefault(storage, {})[place] = (version, form)
    return form


def frozen_weight(codes: Tensor, q: Fp8Array) -> Fp8Array:
    """``q``, whose codes are that tensor's, as dgrad is to read it: beside its transposed codes, if those are kept.

    An optimizer's step leaves frozen codes as they are, so they are transposed once, and again after a write. Memory
    that comes and goes under one storage, as where FSDP gathers weights, is transposed again where it has moved.
    """
    if not _keeps_transposed or codes.is_inference() or captures(codes):
        return q
    storage, state = codes.untyped_storage(), (codes._version, codes.data_ptr())
    place = (codes.storage_offset(), codes.dtype, codes.shape, codes.stride(), stream_of(codes))
    with _lock:
        known = _transposed.setdefault(storage, {}).get(place)
    if known is None or known[0] != state:
        known = (state, q.with_transposed_codes().codes_transposed)
        with _lock:
            _transposed.setdefault(storage, {})[place] = known
    return beside_transposed(q, known[1])


def keep_transposed_weights(keep: bool = True) -> None:
    """Whether ``precision="fp8"`` keeps the weights' codes transposed too, which dgrad reads on a Hopper GPU.

    By default every backward pass transposes them, one weight after another, into memory that it gives back. Kept, they
    are made by the first backward pass after a weight has changed, once for all micro-batches of a step (of a frozen
    Fp8Tensor once for good), and take one more byte for each element of the weights. The results are the same bytes;
    other cards and the CPU keep nothing.
    """
    global _keeps_transposed
    _keeps_transposed = one_of("keep_transposed_weights", "keep", keep, (True, False))
    if not keep:
        forget_fp8_weights()


def forget_fp8_weights() -> None:
    """Quantise and transpose every weight again when it is next used.

    Needed only after a write that neither PyTorch's version counters nor an optimizer's step show: through ``.data``,
    or NumPy.
    """
    _forget_forms()
    with _lock:
        _transposed.clear()


def _forget_forms(*_: Any) -> None:
    with _lock:
        _forms.clear()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_forget_forms)
