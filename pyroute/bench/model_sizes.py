"""Parameters and operations of whole released models, counted from the sizes in their published configurations.

Counted: embedding and output head, attention projections, router, routed and shared experts, dense layers. Left out:
norms, biases and DeepSeek's extra prediction module, together under 2 % of any of these models.
"""

from __future__ import annotations

from typing import NamedTuple

from ..router_presets import ModelShape, model_shape


class Attention(NamedTuple):
    """The projections of one layer: parameters, and width of queries plus values summed over the heads."""

    parameters: int
    width: int


def grouped_query(hidden: int, heads: int, kv_heads: int, head_dim: int) -> Attention:
    """Queries, keys, values and the output projection; several heads share their keys and values."""
    return Attention(hidden * head_dim * (2 * heads + 2 * kv_heads), 2 * heads * head_dim)


def latent(
    hidden: int, heads: int, q_rank: int, kv_rank: int, nope: int = 128, rope: int = 64, value: int = 128
) -> Attention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): low-rank queries, keys and values."""
    queries = hidden * q_rank + q_rank * heads * (nope + rope)
    keys_values = hidden * (kv_rank + rope) + kv_rank * heads * (nope + value)
    return Attention(queries + keys_values + heads * value * hidden, heads * (nope + rope + value))


class ModelSizes(NamedTuple):
    """One released model: ``preset`` names its MoE layer, ``published_*`` are its authors' parameter counts."""

    preset: str
    layers: int
    dense_layers: int  # of these, without experts
    dense_intermediate: int
    vocabulary: int
    attention: Attention
    published_total: float
    published_active: float

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.preset)

    @property
    def expert(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.shape.hidden * self.shape.intermediate

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def routed_experts(self) -> int:
        """Parameters of all routed experts: what FP8 makes small."""
        return self.moe_layers * self.shape.num_experts * self.expert

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding, and as many of the output head."""
        return self.vocabulary * self.shape.hidden

    @property
    def always(self) -> int:
        """Parameters that every token multiplies with, whatever its experts: the output head among them."""
        shape = self.shape
        router_and_shared = shape.hidden * shape.num_experts + 3 * shape.hidden * shape.shared_intermediate
        dense = self.dense_layers * 3 * shape.hidden * self.dense_intermediate
        return self.layers * self.attention.parameters + self.moe_layers * router_and_shared + dense + self.embedding

    @property
    def total(self) -> int:
        return self.routed_experts + self.always + self.embedding

    @property
    def active(self) -> int:
        """Parameters that one token multiplies with; its row of the embedding is read, not multiplied."""
        return self.moe_layers * self.shape.top_k * self.expert + self.always

    def attention_flops(self, sequence: int) -> float:
        """Operations per token of scores and weighted values, forward, over a causal ``sequence``."""
        return 2.0 * self.layers * self.attention.width * (sequence + 1) / 2


# The configurations are those that the models' authors publish beside the weights.
MODELS = {
    model.preset: model
    for model in (
        ModelSizes("deepseek-v3", 61, 3, 18432, 129280, latent(7168, 128, 1536, 512), 671e9, 37e9),
        ModelSizes("kimi-k2", 61, 1, 18432, 163840, latent(7168, 64, 1536, 512), 1.04e12, 32e9),
        ModelSizes("mixtral", 32, 0, 0, 32000, grouped_query(4096, 32, 8, 128), 46.7e9, 12.9e9),
        ModelSizes("qwen3-moe", 48, 0, 0, 151936, grouped_query(2048, 32, 4, 128), 30.5e9, 3.3e9),
        ModelSizes("qwen3-moe-235b", 94, 0, 0, 151936, grouped_query(4096, 64, 4, 128), 235e9, 22e9),
        ModelSizes("gpt-oss", 36, 0, 0, 201088, grouped_query(2880, 64, 8, 64), 116.8e9, 5.1e9),
    )
}
