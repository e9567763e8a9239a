"""Hidden states that are a function of real English text, without a download and without training.

The text is Python's own manual (``pydoc_data.topics``). A word's vector comes from counting: how much more often than
by chance each other word stands next to it (positive pointwise mutual information, reduced by a truncated singular
value decomposition; Levy and Goldberg 2014). Words that are used alike get alike vectors, so a router sends them to the
same experts. A token's state is its word's vector, a part that is the word's alone, and a little of both neighbours.
The router's rows are the vectors of words drawn from the text: random, not learnt, but of the right kind, since a
trained row is the centroid of what its expert serves.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from .terminal import UsageError

Array = Any

RANK = 150  # dimensions of the counted vectors before they are spread over `hidden`
CONTEXTS = 1000  # the most frequent words, whose neighbourhood is counted
WINDOW = 2  # words on either side that count as neighbours
OWN = 0.3  # share of the part that is a word's alone
NEIGHBOURS = 0.25  # share of each neighbour's vector in a token's state
LOGIT_SCALE = 8.0  # spreads the logits over about -2 .. 8


class Text(NamedTuple):
    """A text as word ids."""

    ids: Array  # int64 [num_words]
    vocabulary: list[str]


class TextStates(NamedTuple):
    """What a layer of a model would see of the first ``num_tokens`` words."""

    ids: Array  # int64 [T]
    hidden: Array  # float32 [T, H], root mean square 1
    router: Array  # float32 [E, H]
    router_words: list[str]  # the word behind each row of the router


def read_text() -> Text:
    """The words of the Python manual's topics, in lower case."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python comes without pydoc_data, the text that the demo reads") from None
    prose = "\n".join(topics[name] for name in sorted(topics)).lower()
    index: dict[str, int] = {}
    ids = [index.setdefault(word, len(index)) for word in re.findall(r"[^\W\d]\w*", prose)]
    return Text(np.array(ids), list(index))


def text_states(text: Text, num_tokens: int, hidden: int, num_experts: int, seed: int) -> TextStates:
    """States of the first ``num_tokens`` words, and a router for them."""
    rng = np.random.default_rng(seed)
    vectors = _word_vectors(text, rng)
    size = vectors.shape[0]
    spread = _unit(vectors @ rng.standard_normal((vectors.shape[1], hidden), dtype=np.float32))
    counts = np.bincount(text.ids, minlength=size).astype(np.float32)
    spread = _unit(spread - 0.9 * (counts @ spread) / counts.sum())  # what all words share tells no two apart
    of_word = spread + np.float32(OWN) * rng.standard_normal(spread.shape, dtype=np.float32)

    ids = text.ids[:num_tokens]
    states = of_word[ids]
    states[1:] += np.float32(NEIGHBOURS) * of_word[ids[:-1]]
    states[:-1] += np.float32(NEIGHBOURS) * of_word[ids[1:]]

    common = np.minimum(np.bincount(ids, minlength=size), 3)  # words seen three times or more come first
    chosen = np.resize(np.lexsort((rng.random(size), -common)), num_experts)
    router = of_word[chosen] * np.float32(LOGIT_SCALE / hidden)
    return TextStates(ids, _unit(states), router, [text.vocabulary[word] for word in chosen])


def _word_vectors(text: Text, rng: np.random.Generator) -> Array:
    """Positive pointwise mutual information of neighbouring words, factored: [vocabulary, RANK] float32."""
    size = len(text.vocabulary)
    frequent = np.argsort(-np.bincount(text.ids, minlength=size), kind="stable")[:CONTEXTS]
    context = np.full(size, -1)
    context[frequent] = np.arange(len(frequent))
    counts = np.zeros(size * len(frequent), np.float32)
    for distance in range(1, WINDOW + 1):
        earlier, later = text.ids[:-distance], text.ids[distance:]
        for word, near in ((earlier, context[later]), (later, context[earlier])):
            counts += np.bincount((word * len(frequent) + near)[near >= 0], minlength=counts.size)
    together = counts.reshape(size, len(frequent))
    smoothed = together.sum(axis=0) ** 0.75  # rare words are overrated by counts alone
    expected = together.sum(axis=1, keepdims=True) * (smoothed / smoothed.sum())
    with np.errstate(divide="ignore"):
        information = np.maximum(np.log(together / np.maximum(expected, np.float32(1e-9))), 0)

    # A random basis, once through the matrix and back, spans the leading singular vectors well enough.
    basis = _orthonormal(information @ rng.standard_normal((information.shape[1], RANK + 20), dtype=np.float32))
    basis = _orthonormal(information @ (information.T @ basis))
    squares, left = np.linalg.eigh(basis.T @ information @ (information.T @ basis))
    vectors: Array = basis @ (left[:, -RANK:] * np.maximum(squares[-RANK:], 0) ** 0.25)  # times sqrt(singular value)
    return vectors


def _orthonormal(y: Array) -> Array:
    """A basis of the columns of ``y``, through a small matrix: threads wait for each other in a QR of many rows."""
    squares, vectors = np.linalg.eigh((y.T @ y).astype(np.float64))
    scale = np.maximum(squares, squares[-1] * 1e-6) ** -0.5
    return y @ (vectors * scale).astype(np.float32)


def _unit(x: Array) -> Array:
    """Rows with root mean square 1, as a model's normalisation leaves them."""
    return x / np.maximum(np.sqrt(np.mean(x * x, axis=1, keepdims=True)), np.float32(1e-6))
