"""Second moments of a layer's activations, accumulated batch by batch.

Every function takes an accumulator and one batch of the residual stream [batch, seq, hidden] and returns the
accumulator with the batch added; the accumulator's buffers are reused. Sums run over all tokens, in float32 and
at the highest matmul precision (TPUs and GPUs would round the factors otherwise). Where a batch comes with weights
[batch, seq], each token counts as often as its weight says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.token_blocks import by_token_blocks
from intraslice_jax.config import LayerShape
from intraslice_jax.models.attention import Attention, attend_mapped
from intraslice_jax.models.decoder import Block
from intraslice_jax.models.mlp import MLP, inner_activations
from intraslice_jax.models.norm import Norm
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.programs import by_shape

Moments = TypeVar("Moments")


class AttentionMoments(NamedTuple):
    """What says which heads and RoPE pairs matter (docs/method.md 2.1, 2.2)."""

    head_gram: Float[Array, "heads v v"]
    """Sum of y_h^T y_h for the o-projection's input y."""
    pair_scores: Float[Array, "heads qk"]
    """Sum of |q_c k_c| per query head and channel, after RoPE."""
    rotary_query_gram: Float[Array, "heads rotary rotary"]
    """Sum of q_h^T q_h over the rotated channels, after RoPE."""
    rotary_key_gram: Float[Array, "kv rotary rotary"]
    """Sum of k^T k over them."""
    rotary_key_sum: Float[Array, "kv rotary"]
    """Sum of k over them."""
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


class DriftMoments(NamedTuple):
    """What says how a module's inputs predict its drift from the dense model (docs/method.md 6.7)."""

    cross: Float[Array, "inputs hidden"]
    """Sum of inputs^T drift."""
    drift_sum: Float[Array, " hidden"]
    tokens: Float[Array, "1"]
    """Sum of the tokens' weights."""


def empty_attention_moments(shape: LayerShape) -> AttentionMoments:
    """An empty accumulator for the attention of a layer."""
    heads, kv, v, qk = shape.num_attention_heads, shape.num_key_value_heads, shape.v_head_dim, shape.qk_head_dim
    rotary, rest = shape.rotary_dim, qk - shape.rotary_dim
    return zeros_like_moments(
        AttentionMoments,
        head_gram=(heads, v, v),
        pair_scores=(heads, qk),
        rotary_query_gram=(heads, rotary, rotary),
        rotary_key_gram=(kv, rotary, rotary),
        rotary_key_sum=(kv, rotary),
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


def empty_drift_moments(inputs: int, hidden: int) -> DriftMoments:
    """An empty accumulator for a drift."""
    return zeros_like_moments(DriftMoments, cross=(inputs, hidden), drift_sum=(hidden,), tokens=(1,))


def zeros_like_moments(kind: Callable[..., Moments], **shapes: tuple[int, ...]) -> Moments:
    """An empty accumulator."""
    # `jnp.zeros` would compile a program for every shape.
    return kind(**{name: jax.device_put(np.zeros(shape, np.float32)) for name, shape in shapes.items()})


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _gram(y: Float[Array, "tokens channels"]) -> Float[Array, "channels channels"]:
    """y^T y by column blocks: what lies below the block diagonal is copied and not computed."""
    channels = y.shape[1]
    # Two blocks are 3/4 of the arithmetic and four 5/8, but products with fewer columns run more slowly.
    blocks = 4 if channels >= 2048 else 2
    if channels < 256 or channels % blocks:
        return _product("ni,nj->ij", y, y)
    width = channels // blocks
    starts = range(0, channels, width)
    rows = {i: _product("ni,nj->ij", y[:, i : i + width], y[:, i:]) for i in starts}

    def upper(i: int, j: int) -> Array:
        return rows[i][:, j - i : j - i + width]

    # Block by block: transposing the whole would take a third of the products' time.
    return jnp.block([[upper(i, j) if i <= j else upper(j, i).T for j in starts] for i in starts])


def _flat(y: Array) -> Array:
    """[batch, seq, heads, v] to [tokens, heads * v] in float32."""
    return y.reshape(y.shape[0] * y.shape[1], -1).astype(jnp.float32)


Weights = Float[Array, "batch seq"] | None


def _rooted(y: Array, weights: Weights) -> Array:
    """Activations [batch, seq, ...] times the roots of their weights: products of two of them are weighted."""
    return y if weights is None else y * jnp.sqrt(weights).reshape(*weights.shape, *(1,) * (y.ndim - 2))


def _weighted(y: Float[Array, "batch seq ..."], weights: Weights) -> tuple[Array, Array]:
    """Rows [tokens, channels] whose second moment is the weighted one, and the weighted sum over tokens."""
    flat = _flat(y)
    if weights is None:
        return flat, flat.sum(0)
    root = jnp.sqrt(weights).reshape(-1, 1)
    return flat * root, (flat * weights.reshape(-1, 1)).sum(0)


def _add_pair(moments: MapMoments, inputs: Array, targets: Array, weights: Weights = None) -> MapMoments:
    (x, input_sum), (y, target_sum) = _weighted(inputs, weights), _weighted(targets, weights)
    return MapMoments(
        moments.gram + _gram(x),
        moments.cross + _product("ni,nj->ij", x, y),
        moments.target_gram + _gram(y),
        moments.input_sum + input_sum,
        moments.target_sum + target_sum,
    )


def _head_grams(y: Float[Array, "batch seq heads width"]) -> Float[Array, "heads width width"]:
    """y_h^T y_h of every head. With heads first the products are of plain matrices, several times as fast on a CPU."""
    heads = y.reshape(y.shape[0] * y.shape[1], *y.shape[2:]).swapaxes(0, 1)
    return _product("hnv,hnw->hvw", heads, heads)


class Mixed(NamedTuple):
    """An attention's queries and keys (after RoPE), values and output y on one batch, and the tokens' weights."""

    q: Float[Array, "batch seq heads qk"]
    k: Float[Array, "batch seq kv qk"]
    v: Float[Array, "batch seq kv v"]
    y: Float[Array, "batch seq heads v"]
    weights: Weights = None


@jax.jit
def mix(block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable) -> Mixed:
    """Runs the attention as it is, up to the o-projection's input."""
    q, k, v = block.attention.project(block.input_norm(x), rope)
    return Mixed(q, k, v, block.attention.mix_projected(q, k, v))


@functools.partial(jax.jit, static_argnames=("query_to_kv", "rotary_dim", "joint_pairs"), donate_argnums=0)
def add_attention(
    moments: AttentionMoments,
    mixed: Mixed,
    query_to_kv: tuple[int, ...],
    rotary_dim: int,
    joint_pairs: bool = True,
) -> AttentionMoments:
    """Adds a batch to the moments of the attention as it is; to those of rotated channels only with `joint_pairs`.

    Only those of the output are weighted: a key is read by all later tokens, so no token's weight is its own.
    """
    q, k, y = (a.astype(jnp.float32) for a in (mixed.q, mixed.k, mixed.y))
    (turned_q, rest_q), (turned_k, rest_k) = (jnp.split(a, [rotary_dim], -1) for a in (q, k))
    new = moments._replace(
        head_gram=moments.head_gram + _head_grams(_rooted(y, mixed.weights)),
        pair_scores=moments.pair_scores + jnp.abs(q * k[:, :, jnp.asarray(query_to_kv)]).sum((0, 1)),
        rest_query_gram=moments.rest_query_gram + _head_grams(rest_q),
        rest_key_gram=moments.rest_key_gram + _head_grams(rest_k),
    )
    if not joint_pairs:
        return new
    return new._replace(
        rotary_query_gram=moments.rotary_query_gram + _head_grams(turned_q),
        rotary_key_gram=moments.rotary_key_gram + _head_grams(turned_k),
        rotary_key_sum=moments.rotary_key_sum + turned_k.sum((0, 1)),
    )


@jax.jit
def mlp_input(
    block: Block, after_attention: Float[Array, "batch seq hidden"], source: Float[Array, "batch seq hidden"] | None
) -> Float[Array, "batch seq hidden"]:
    """What a layer's MLP reads, after its norm."""
    return block.mlp_input(source, after_attention)


@by_shape
@functools.partial(jax.jit, donate_argnums=1)
def finish_layer(
    block: Block,
    after_attention: Float[Array, "batch seq hidden"],
    source: Float[Array, "batch seq hidden"] | None,
) -> Float[Array, "batch seq hidden"]:
    """The residual stream behind a layer, given it behind the layer's attention."""
    return after_attention + by_token_blocks(block.mlp, block.mlp_input(source, after_attention))


@by_shape
@functools.partial(jax.jit, static_argnames=("scale", "sliding_window"), donate_argnums=0)
def add_kept_attention(
    moments: MapMoments,
    mixed: Mixed,
    heads: Int[Array, " kept"],
    kv: Int[Array, " kept"],
    query_maps: Float[Array, "kept qk width"],
    key_maps: Float[Array, "kept qk width"],
    scale: float,
    sliding_window: int | None,
) -> tuple[MapMoments, Float[Array, "batch seq kept v"]]:
    """Adds a batch to the moments of the attention re-run with what is kept (docs/method.md 2.3).

    Inputs are y' of the kept heads, whose queries and keys went through a map each (RoPE done), targets are the
    full attention's y on the same x.

    Returns:
        The accumulator, and y'.
    """
    kept = attend_mapped(mixed.q, mixed.k, mixed.v, heads, kv, query_maps, key_maps, scale, sliding_window)
    return _add_pair(moments, kept, mixed.y, mixed.weights), kept


@jax.jit
def attend(block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable) -> Float[Array, "batch seq hidden"]:
    """The residual stream behind a layer's attention, given it before."""
    return x + block.attention(block.input_norm(x), rope)


@jax.jit
def drift(
    module: Attention | MLP,
    activations: Array,
    before: Float[Array, "batch seq hidden"],
    dense: Float[Array, "batch seq hidden"],
) -> Float[Array, "batch seq hidden"]:
    """The dense model's stream behind a module, less what the unpruned module gives behind a pruned stream; float32.

    Args:
        module: unpruned.
        activations: the input of its output projection, on the pruned stream.
        before: the pruned stream before it.
        dense: the dense stream behind it.
    """
    return dense.astype(jnp.float32) - before.astype(jnp.float32) - module.output(activations).astype(jnp.float32)


@functools.partial(jax.jit, donate_argnums=0)
def add_drift(
    moments: DriftMoments, inputs: Array, drifts: Float[Array, "batch seq hidden"], weights: Weights = None
) -> DriftMoments:
    """Adds a batch of what a pruned module maps to the stream, [batch, seq, ...], against the drift."""
    (x, _), (d, total) = _weighted(inputs, weights), _weighted(drifts, weights)
    tokens = jnp.asarray(len(x), jnp.float32) if weights is None else weights.sum()
    cross = moments.cross + _product("ni,nj->ij", x, d)
    return DriftMoments(cross, moments.drift_sum + total, moments.tokens + tokens[None])


@by_shape
@jax.jit
def leave_attention(
    x: Float[Array, "batch seq hidden"],
    kept: Float[Array, "batch seq kept v"],
    output: Float[Array, "kept v hidden"],
    bias: Float[Array, " hidden"] | None,
) -> Float[Array, "batch seq hidden"]:
    """The residual stream behind an attention of which y' is known, given it before."""
    out = x + jnp.einsum("bthv,hvd->btd", kept, output)
    return out if bias is None else out + bias[None, None]


@by_shape
@functools.partial(jax.jit, donate_argnums=1)
def finish_selected(
    mlp: MLP,
    after_attention: Float[Array, "batch seq hidden"],
    inner: Float[Array, "batch seq inner"],
    channels: Int[Array, " kept"],
) -> Float[Array, "batch seq hidden"]:
    """`finish_layer` where the new MLP's inner activations are some of the old one's."""
    return after_attention + mlp.output(inner[..., channels])


@by_shape
@functools.partial(jax.jit, donate_argnums=0)
def attend_and_add_mlp(
    moments: GramMoments, block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable, weights: Weights = None
) -> tuple[GramMoments, Float[Array, "batch seq hidden"], Float[Array, "batch seq inner"]]:
    """Runs the (pruned) attention and adds the moments of the down-projection's input.

    Returns:
        The accumulator, the residual stream behind the attention, and the down-projection's input.
    """
    after_attention = x + block.attention(block.input_norm(x), rope)
    inner = by_token_blocks(block.mlp.inner, block.mlp_input(x, after_attention))
    return _add_gram(moments, inner, weights), after_attention, inner


@functools.partial(jax.jit, donate_argnums=0)
def add_mlp(
    moments: GramMoments, norm: Norm, mlp: MLP, x: Float[Array, "batch seq hidden"], weights: Weights = None
) -> tuple[GramMoments, Float[Array, "batch seq inner"]]:
    """Adds the moments of the down-projection's input, and returns that, given what the MLP's norm reads."""
    inner = by_token_blocks(mlp.inner, norm(x))
    return _add_gram(moments, inner, weights), inner


def _add_gram(moments: GramMoments, inner: Float[Array, "batch seq inner"], weights: Weights) -> GramMoments:
    z, total = _weighted(inner, weights)
    return GramMoments(moments.gram + _gram(z), moments.total + total)


@by_shape
@functools.partial(jax.jit, static_argnames="hidden_act", donate_argnums=0)
def add_mlp_map(
    moments: MapMoments,
    hidden_act: str,
    small: dict[str, Array],
    dense: dict[str, Array],
    x: Float[Array, "batch seq hidden"],
) -> MapMoments:
    """Adds a batch of what an MLP reads: inputs are a small MLP's inner activations, targets the dense one's."""
    kept, full = (
        by_token_blocks(functools.partial(inner_activations, hidden_act, weights), x) for weights in (small, dense)
    )
    return _add_pair(moments, kept, full)
