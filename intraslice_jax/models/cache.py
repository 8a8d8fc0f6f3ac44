"""Running a decoder token by token: keys and values are kept, each layer's in its own widths.

Prompts of different lengths lie left-aligned in one batch. A token's slot in the cache is its position, so what
a shorter prompt left behind its end is overwritten by its continuation and never seen before that.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from intraslice_jax.config import RopeConfig
from intraslice_jax.models.attention import attend
from intraslice_jax.models.decoder import Block, Decoder
from intraslice_jax.models.norm import Norm
from intraslice_jax.models.rope import RopeTable, rope_table
from intraslice_jax.parallel.placement import gathered


class LayerCache(NamedTuple):
    """One layer's keys (behind RoPE) and values."""

    keys: Float[Array, "batch slots kv qk"]
    values: Float[Array, "batch slots kv v"]


def prefill(
    decoder: Decoder, tokens: Int[Array, "batch seq"], lengths: Int[Array, " batch"], slots: int
) -> tuple[Float[Array, "batch vocab"], list[LayerCache]]:
    """Reads prompts and returns the logits behind the last token of each, float32, and the filled caches.

    Args:
        decoder: any decoder; a block compiles once per distinct layer shape and pair (seq, slots).
        tokens: int32 prompts, left-aligned; what stands behind a prompt's end does not matter.
        lengths: int32 tokens of each prompt.
        slots: how many tokens the cache can hold, at least seq.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    x, rope = decoder.embed(tokens), cache_rope(decoder, positions, lengths)
    caches = []
    for block in decoder.layers:
        x, cache = prefill_block(gathered(block), x, rope, slots)
        caches.append(cache)
    return logits_at(decoder, x, lengths - 1), caches


def decode(
    decoder: Decoder, tokens: Int[Array, " batch"], positions: Int[Array, " batch"], caches: list[LayerCache]
) -> tuple[Float[Array, "batch vocab"], list[LayerCache]]:
    """One more token for every row: the logits behind it, float32, and the caches that hold it.

    The caches given are used up. With RoPE types that depend on the context's length (`dynamic`, `longrope`), the
    new token is rotated for the length that it completes, and cached keys stay as they were rotated.

    Args:
        decoder: the one that filled the caches; a block compiles once per distinct layer shape.
        tokens: int32 ids.
        positions: int32 position of each token, that is how many tokens came before it.
        caches: what `prefill` or `decode` returned.
    """
    at = positions[:, None]
    x, rope = decoder.embed(tokens[:, None]), cache_rope(decoder, at, positions + 1)
    updated = []
    for block, cache in zip(decoder.layers, caches, strict=True):
        x, cache = decode_block(gathered(block), x, rope, cache, at)
        updated.append(cache)
    return logits_at(decoder, x, jnp.zeros_like(positions)), updated


@functools.partial(jax.jit, static_argnames="slots")
def prefill_block(
    block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable, slots: int
) -> tuple[Float[Array, "batch seq hidden"], LayerCache]:
    """One layer of `prefill`."""
    attention = block.attention
    q, k, v = attention.project(block.input_norm(x), rope)
    after = x + attention.output(attention.mix_projected(q, k, v))
    room = ((0, 0), (0, slots - x.shape[1]), (0, 0), (0, 0))
    return after + block.mlp(block.mlp_input(x, after)), LayerCache(jnp.pad(k, room), jnp.pad(v, room))


@functools.partial(jax.jit, donate_argnames="cache")
def decode_block(
    block: Block,
    x: Float[Array, "batch 1 hidden"],
    rope: RopeTable,
    cache: LayerCache,
    positions: Int[Array, "batch 1"],
) -> tuple[Float[Array, "batch 1 hidden"], LayerCache]:
    """One layer of `decode`; uses up the cache."""
    attention = block.attention
    q, k, v = attention.project(block.input_norm(x), rope)
    cache = LayerCache(_write(cache.keys, k, positions), _write(cache.values, v, positions))
    distance = positions[:, :, None] - jnp.arange(cache.keys.shape[1], dtype=jnp.int32)[None, None]
    visible = distance >= 0
    if attention.sliding_window is not None:
        visible &= distance < attention.sliding_window
    mixed = attend(q, cache.keys, cache.values, visible, attention.query_to_kv, attention.scale)
    after = x + attention.output(mixed)
    return after + block.mlp(block.mlp_input(x, after)), cache


def _write(
    cache: Float[Array, "batch slots kv width"],
    new: Float[Array, "batch 1 kv width"],
    positions: Int[Array, "batch 1"],
) -> Float[Array, "batch slots kv width"]:
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, positions].set(new, mode="drop", unique_indices=True)


def cache_rope(decoder: Decoder, positions: Int[Array, "batch seq"], lengths: Int[Array, " batch"]) -> RopeTable:
    """Tables for positions of rows whose whole contexts have these lengths."""
    config = decoder.config
    return _rope_rows(config.rope, config.rotary_dim, config.max_position_embeddings, positions, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rope_rows(rope: RopeConfig, rotary_dim: int, limit: int, positions: Array, lengths: Array) -> RopeTable:
    """Every row's tables for its own length, so that a row does not depend on what shares its batch."""

    def row(positions: Array, length: Array) -> RopeTable:
        return RopeTable(*(part[0] for part in rope_table(rope, rotary_dim, limit, positions[None], length)))

    return jax.vmap(row)(positions, lengths)


def logits_at(decoder: Decoder, x: Array, index: Int[Array, " batch"]) -> Float[Array, "batch vocab"]:
    """Logits, float32, at one index of each row of the residual stream behind the last layer."""
    bias = None if decoder.lm_head_bias is None else decoder.lm_head_bias[...]
    return _norm_and_head(decoder.norm, decoder.head, bias, x, index)


@jax.jit
def _norm_and_head(norm: Norm, head: Array, bias: Array | None, x: Array, index: Array) -> Array:
    last = jnp.take_along_axis(x, index[:, None, None], 1)
    out = jnp.einsum("bd,vd->bv", norm(last)[:, 0], head, preferred_element_type=jnp.float32)
    return out if bias is None else out + bias.astype(jnp.float32)[None]
