"""Floating-point operations that a decoder's parts need, a multiplication and an addition being two.

Only matrix products are counted, and of attention only what a causal mask leaves: what a program does beyond that is
its own loss.
"""

from __future__ import annotations

from intraslice_jax.config import LayerShape, ModelConfig


def query_key_value(model: ModelConfig, shape: LayerShape, tokens: int) -> int:
    """The three input projections of an attention."""
    heads, kv = shape.num_attention_heads, shape.num_key_value_heads
    return 2 * tokens * model.hidden_size * (heads * shape.qk_head_dim + kv * (shape.qk_head_dim + shape.v_head_dim))


def scores_and_mixing(shape: LayerShape, sequences: int, seq: int) -> int:
    """Query-key products and weighted values of whole sequences."""
    return 2 * sequences * visible_pairs(seq, shape.sliding_window) * mixed_channels(shape)


def mixed_channels(shape: LayerShape) -> int:
    """Query and value channels of all heads: what a pair of positions costs multiplications."""
    return shape.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim)


def visible_pairs(seq: int, window: int | None = None) -> int:
    """Pairs of a position and one that it sees, itself included."""
    near = min(seq, window or seq)
    return near * (near + 1) // 2 + (seq - near) * near


def attention_output(model: ModelConfig, shape: LayerShape, tokens: int) -> int:
    """The o-projection."""
    return 2 * tokens * model.hidden_size * shape.num_attention_heads * shape.v_head_dim


def mlp_inner(model: ModelConfig, shape: LayerShape, tokens: int) -> int:
    """Gate and up projection."""
    return 2 * tokens * model.hidden_size * shape.intermediate_size * (2 if model.gated_mlp else 1)


def mlp_output(model: ModelConfig, shape: LayerShape, tokens: int) -> int:
    """The down-projection."""
    return 2 * tokens * model.hidden_size * shape.intermediate_size


def head(model: ModelConfig, tokens: int) -> int:
    """Logits of so many tokens."""
    return 2 * tokens * model.hidden_size * model.vocab_size


def gram(channels: int, tokens: int) -> int:
    """One half, with the diagonal, of a symmetric second moment."""
    return tokens * channels * (channels + 1)


def linear_layer(model: ModelConfig, shape: LayerShape, tokens: int) -> int:
    """All projections of a decoder layer."""
    parts = (query_key_value, attention_output, mlp_inner, mlp_output)
    return sum(part(model, shape, tokens) for part in parts)


def prefill_layer(model: ModelConfig, shape: LayerShape, sequences: int, seq: int) -> int:
    """A decoder layer on whole sequences."""
    return linear_layer(model, shape, sequences * seq) + scores_and_mixing(shape, sequences, seq)


def decode_layer(model: ModelConfig, shape: LayerShape, sequences: int, context: int) -> int:
    """A decoder layer on one token of each sequence that sees `context` positions, itself included."""
    seen = min(context, shape.sliding_window or context)
    return linear_layer(model, shape, sequences) + 2 * sequences * seen * mixed_channels(shape)
