"""Second moments of a layer's activations, accumulated batch by batch.

Every function takes an accumulator and one batch of the residual stream [batch, seq, hidden] and returns the
accumulator with the batch added; the accumulator's buffers are reused. Sums run over all tokens, in float32 and
at the highest matmul precision (TPUs and GPUs would round the factors otherwise).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from intraslice_jax.config import LayerShape
from intraslice_jax.models.attention import attend_causally
from intraslice_jax.models.decoder import Block
from intraslice_jax.models.mlp import inner_activations
from intraslice_jax.models.rope import RopeTable

Moments = TypeVar("Moments")


class AttentionMoments(NamedTuple):
    """What says which heads and RoPE pairs matter (docs/method.md 2.1, 2.2)."""

    head_gram: Float[Array, "heads v v"]
    """Sum of y_h^T y_h for the o-projection's input y."""
    pair_scores: Float[Array, "heads qk"]
    """Sum of |q_c k_c| per query head and channel, after RoPE."""
    rest_query_gram: Float[Array, "heads rest rest"]
    """Sum of q_h^T q_h over the channels that are not rotated."""
    rest_key_gram: Float[Array, "kv rest rest"]
    """Sum of k^T k over them."""


class MapMoments(NamedTuple):
    """What a regression of target activations on inputs needs."""

    gram: Float[Array, "inputs inputs"]
    cross: Float[Array, "inputs targets"]
    target_gram: Float[Array, "targets targets"]
    input_sum: Float[Array, " inputs"]
    target_sum: Float[Array, " targets"]


class GramMoments(NamedTuple):
    """Second moment and sum of one set of activations."""

    gram: Float[Array, "channels channels"]
    total: Float[Array, " channels"]


def empty_attention_moments(shape: LayerShape) -> AttentionMoments:
    """An empty accumulator for the attention of a layer."""
    heads, kv, v, qk = shape.num_attention_heads, shape.num_key_value_heads, shape.v_head_dim, shape.qk_head_dim
    rest = qk - shape.rotary_dim
    return zeros_like_moments(
        AttentionMoments,
        head_gram=(heads, v, v),
        pair_scores=(heads, qk),
        rest_query_gram=(heads, rest, rest),
        rest_key_gram=(kv, rest, rest),
    )


def empty_map_moments(inputs: int, targets: int) -> MapMoments:
    """An empty accumulator for a regression."""
    return zeros_like_moments(
        MapMoments,
        gram=(inputs, inputs),
        cross=(inputs, targets),
        target_gram=(targets, targets),
        input_sum=(inputs,),
        target_sum=(targets,),
    )


def zeros_like_moments(kind: Callable[..., Moments], **shapes: tuple[int, ...]) -> Moments:
    """An empty accumulator."""
    return kind(**_zeros(tuple(shapes.items())))


@functools.partial(jax.jit, static_argnums=0)
def _zeros(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Array]:
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes}


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _flat(y: Array) -> Array:
    """[batch, seq, heads, v] to [tokens, heads * v] in float32."""
    return y.reshape(y.shape[0] * y.shape[1], -1).astype(jnp.float32)


def _add_pair(moments: MapMoments, inputs: Array, targets: Array) -> MapMoments:
    return MapMoments(
        moments.gram + _product("ni,nj->ij", inputs, inputs),
        moments.cross + _product("ni,nj->ij", inputs, targets),
        moments.target_gram + _product("ni,nj->ij", targets, targets),
        moments.input_sum + inputs.sum(0),
        moments.target_sum + targets.sum(0),
    )


@functools.partial(jax.jit, donate_argnums=0)
def add_attention(
    moments: AttentionMoments, block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable
) -> AttentionMoments:
    """Adds a batch to the moments of the attention as it is."""
    attention = block.attention
    q, k, v = attention.project(block.input_norm(x), rope)
    y = attention.mix_projected(q, k, v).astype(jnp.float32)
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    rotary_dim = 2 * attention.rope_pairs.shape[-1]
    rest_q, rest_k = q[..., rotary_dim:], k[..., rotary_dim:]
    return AttentionMoments(
        moments.head_gram + _product("bthv,bthw->hvw", y, y),
        moments.pair_scores + jnp.abs(q * k[:, :, jnp.asarray(attention.query_to_kv)]).sum((0, 1)),
        moments.rest_query_gram + _product("bthv,bthw->hvw", rest_q, rest_q),
        moments.rest_key_gram + _product("bthv,bthw->hvw", rest_k, rest_k),
    )


@jax.jit
def mlp_input(
    block: Block, after_attention: Float[Array, "batch seq hidden"], source: Float[Array, "batch seq hidden"] | None
) -> Float[Array, "batch seq hidden"]:
    """What a layer's MLP reads, after its norm."""
    return block.mlp_input(source, after_attention)


@functools.partial(jax.jit, donate_argnums=1)
def finish_layer(
    block: Block,
    after_attention: Float[Array, "batch seq hidden"],
    source: Float[Array, "batch seq hidden"] | None,
) -> Float[Array, "batch seq hidden"]:
    """The residual stream behind a layer, given it behind the layer's attention."""
    return after_attention + block.mlp(block.mlp_input(source, after_attention))


@functools.partial(jax.jit, donate_argnums=0)
def add_kept_attention(
    moments: MapMoments,
    block: Block,
    x: Float[Array, "batch seq hidden"],
    rope: RopeTable,
    heads: Int[Array, " kept"],
    query_maps: Float[Array, "kept qk width"],
    key_maps: Float[Array, "kept qk width"],
) -> MapMoments:
    """Adds a batch to the moments of the attention re-run with what is kept (docs/method.md 2.3).

    Inputs are y' of the kept heads, whose queries and keys went through a map each (RoPE done), targets are the
    full attention's y on the same x.
    """
    attention = block.attention
    q, k, v = attention.project(block.input_norm(x), rope)
    full = _flat(attention.mix_projected(q, k, v))
    kv = jnp.asarray(attention.query_to_kv)[heads]
    kept_q = jnp.einsum("bthk,hkw->bthw", q[:, :, heads], query_maps.astype(q.dtype))
    kept_k = jnp.einsum("bthk,hkw->bthw", k[:, :, kv], key_maps.astype(k.dtype))
    every = tuple(range(heads.shape[0]))
    kept = attend_causally(kept_q, kept_k, v[:, :, kv], every, attention.scale, attention.sliding_window)
    return _add_pair(moments, _flat(kept), full)


@functools.partial(jax.jit, donate_argnums=0)
def attend_and_add_mlp(
    moments: GramMoments, block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable
) -> tuple[GramMoments, Float[Array, "batch seq hidden"]]:
    """Runs the (pruned) attention and adds the moments of the down-projection's input.

    Returns:
        The accumulator and the residual stream behind the attention.
    """
    after_attention = x + block.attention(block.input_norm(x), rope)
    z = _flat(block.mlp.inner(block.mlp_input(x, after_attention)))
    gram = moments.gram + _product("ni,nj->ij", z, z)
    return GramMoments(gram, moments.total + z.sum(0)), after_attention


@functools.partial(jax.jit, static_argnames="hidden_act", donate_argnums=0)
def add_mlp_map(
    moments: MapMoments,
    hidden_act: str,
    small: dict[str, Array],
    dense: dict[str, Array],
    x: Float[Array, "batch seq hidden"],
) -> MapMoments:
    """Adds a batch of what an MLP reads: inputs are a small MLP's inner activations, targets the dense one's."""
    kept, full = (_flat(inner_activations(hidden_act, weights, x)) for weights in (small, dense))
    return _add_pair(moments, kept, full)
