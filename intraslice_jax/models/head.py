"""Losses of tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from intraslice_jax.models.decoder import Decoder
from intraslice_jax.parallel.mesh import DATA, ways
from intraslice_jax.parallel.placement import gathered, mesh_of

CHUNK = 256
"""Tokens whose logits exist at once: 50 MB in float32 for a vocabulary of 49,152."""


def token_nll(
    decoder: Decoder, hidden: Float[Array, "batch seq hidden"], targets: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Negative log-likelihoods of the targets in nats, float32.

    Differentiable with respect to `hidden`: its gradient is made from the same logits, which are not kept.

    Args:
        decoder: whose head is applied.
        hidden: what `Decoder.hidden_states` returns: behind the final norm.
        targets: the token that follows each position.
    """
    bias = None if decoder.lm_head_bias is None else decoder.lm_head_bias[...]
    head = gathered(decoder.head)
    mesh = mesh_of(head)
    if mesh is None or len(hidden) % ways(mesh):
        return _token_nll(head, bias, hidden, targets)
    return _token_nll_on_mesh(mesh, head, bias, hidden, targets)


@functools.partial(jax.jit, static_argnames="mesh")
def _token_nll_on_mesh(mesh: Mesh, head: Array, bias: Array | None, hidden: Array, targets: Array) -> Array:
    """Every device row takes the chunks of its own sequences; one loop over all would bring them to every row."""
    rows, whole = PartitionSpec(DATA), PartitionSpec()
    specs = (whole, whole, rows, rows)
    sharded = jax.shard_map(_token_nll, mesh=mesh, in_specs=specs, out_specs=rows, axis_names={DATA}, check_vma=False)
    return sharded(head, bias, hidden, targets)


def token_kl(
    decoder: Decoder, hidden: Float[Array, "batch seq hidden"], other: Float[Array, "batch seq hidden"]
) -> Float[Array, "batch seq"]:
    """KL divergence of the next-token distribution under `other` from that under `hidden`, in nats, float32.

    Args:
        decoder: whose head is applied to both.
        hidden: behind the final norm, of the reference.
        other: behind the final norm, of what is judged.
    """
    bias = None if decoder.lm_head_bias is None else decoder.lm_head_bias[...]
    return _token_kl(decoder.head, bias, hidden, other)


@jax.jit
def _token_kl(head: Array, bias: Array | None, hidden: Array, other: Array) -> Array:
    def chunk_kl(chunk: tuple[Array, Array]) -> Array:
        reference, judged = (jax.nn.log_softmax(_logits(head, bias, states), 1) for states in chunk)
        return jnp.sum(jnp.exp(reference) * (reference - judged), 1)

    return _by_chunks(chunk_kl, hidden.shape[:2], hidden, other)


def token_scores(
    decoder: Decoder, hidden: Float[Array, "scored hidden"], targets: Int[Array, " scored"]
) -> tuple[Float[Array, " scored"], Bool[Array, " scored"]]:
    """Log-probabilities of the targets in nats, float32, and which targets are the likeliest token.

    Args:
        decoder: whose head is applied.
        hidden: rows of what `Decoder.hidden_states` returns.
        targets: the token that follows each.
    """
    bias = None if decoder.lm_head_bias is None else decoder.lm_head_bias[...]
    return _token_scores(decoder.head, bias, hidden, targets)


@jax.custom_vjp
def _chunked_nll(head: Array, bias: Array | None, hidden: Array, targets: Array) -> Array:
    def chunk_nll(chunk: tuple[Array, Array]) -> Array:
        states, ids = chunk
        logits = _logits(head, bias, states)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, 1) - chosen

    return _by_chunks(chunk_nll, targets.shape, hidden, targets)


def _token_nll_forward(head: Array, bias: Array | None, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """The losses, and what each one's gradient is with respect to its hidden state."""

    def chunk_nll(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        states, ids = chunk
        logits = _logits(head, bias, states)
        total = jax.nn.logsumexp(logits, 1)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        likely = jnp.exp(logits - total[:, None]).astype(head.dtype)
        expected = jnp.einsum("nv,vd->nd", likely, head, preferred_element_type=jnp.float32)
        return total - chosen, expected - head[ids].astype(jnp.float32)

    nll, gradient = _by_chunks(chunk_nll, targets.shape, hidden, targets)
    return nll, gradient.astype(hidden.dtype)


def _token_nll_backward(gradient: Array, cotangent: Array) -> tuple[None, None, Array, None]:
    along = gradient.astype(jnp.float32) * cotangent[..., None]
    return None, None, along.astype(gradient.dtype), None


_chunked_nll.defvjp(_token_nll_forward, _token_nll_backward)
_token_nll = jax.jit(_chunked_nll)


@jax.jit
def _token_scores(head: Array, bias: Array | None, hidden: Array, targets: Array) -> tuple[Array, Array]:
    def chunk_scores(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        states, ids = chunk
        logits = _logits(head, bias, states)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, 1), jnp.argmax(logits, 1).astype(jnp.int32) == ids

    return _by_chunks(chunk_scores, targets.shape, hidden, targets)


def _logits(head: Array, bias: Array | None, states: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
    logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)[None]


def _by_chunks(function: Callable[[tuple[Array, Array]], Any], shape: tuple[int, ...], *arrays: Array) -> Any:
    """What a function gives per token, in this shape, from arrays with this shape in front."""
    tokens = math.prod(shape)
    size = min(CHUNK, tokens)
    chunks = -(-tokens // size)

    def cut(array: Array) -> Array:
        flat = array.reshape(tokens, *array.shape[len(shape) :])
        padded = jnp.pad(flat, ((0, chunks * size - tokens), *((0, 0),) * (flat.ndim - 1)))
        return padded.reshape(chunks, size, *flat.shape[1:])

    given = jax.lax.map(function, tuple(map(cut, arrays)))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:tokens].reshape(*shape, *a.shape[2:]), given)
