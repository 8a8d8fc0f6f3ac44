"""Losses of tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    return _by_rows(_token_nll, decoder, hidden, targets)


class Predictions(NamedTuple):
    """A next-token distribution p at each position, as far as divergences from it need it.

    Attributes:
        hidden: behind the final norm.
        expected: the mean row of the head under p, float32.
        total: log of the sum of the exponentiated logits, float32.
    """

    hidden: Float[Array, "batch seq hidden"]
    expected: Float[Array, "batch seq hidden"]
    total: Float[Array, "batch seq"]


def predictions(decoder: Decoder, hidden: Float[Array, "batch seq hidden"]) -> Predictions:
    """What the head makes of hidden states behind the final norm."""
    return Predictions(hidden, *_by_rows(_predictions, decoder, hidden))


def token_kl(
    decoder: Decoder, reference: Predictions, other: Float[Array, "batch seq hidden"]
) -> Float[Array, "batch seq"]:
    """KL divergence of the next-token distribution under `other` from the reference, in nats, float32.

    With p at h and q at h' it is (h - h')^T E_p[head row] - log Z(h) + log Z(h'): one product with the head.

    Args:
        decoder: whose head is applied to both.
        reference: of the same head.
        other: behind the final norm, of what is judged.
    """
    return _by_rows(_token_kl, decoder, *reference, other)


def token_kl_gradient(
    decoder: Decoder, hidden: Float[Array, "batch seq hidden"], other: Float[Array, "batch seq hidden"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq hidden"]]:
    """`token_kl` from the one to the other, and each token's gradient with respect to its row of `other`; float32."""
    return _by_rows(_token_kl_gradient, decoder, hidden, other)


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


def _by_rows(function: Callable[..., Any], decoder: Decoder, *arrays: Array) -> Any:
    """A function of head, bias and arrays [batch, ...], in which every device row takes its own sequences."""
    bias = None if decoder.lm_head_bias is None else decoder.lm_head_bias[...]
    head = gathered(decoder.head)
    mesh = mesh_of(head)
    if mesh is None or len(arrays[0]) % ways(mesh):
        return function(head, bias, *arrays)
    return _on_mesh(function, mesh, head, bias, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _on_mesh(function: Callable[..., Any], mesh: Mesh, head: Array, bias: Array | None, *arrays: Array) -> Any:
    """One loop over the chunks of all sequences would bring them to every row."""
    rows, whole = PartitionSpec(DATA), PartitionSpec()
    specs = (whole, whole, *(rows for _ in arrays))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, axis_names={DATA}, check_vma=False)
    return sharded(head, bias, *arrays)


@jax.custom_vjp
def _chunked_nll(head: Array, bias: Array | None, hidden: Array, targets: Array) -> Array:
    def chunk_nll(chunk: tuple[Array, ...]) -> Array:
        states, ids = chunk
        logits = _logits(head, bias, states)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, 1) - chosen

    return _by_chunks(chunk_nll, targets.shape, hidden, targets)


def _token_nll_forward(head: Array, bias: Array | None, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """The losses, and what each one's gradient is with respect to its hidden state."""

    def chunk_nll(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        states, ids = chunk
        logits = _logits(head, bias, states)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        expected, total = _expected_row(head, logits)
        return total - chosen, expected - head[ids].astype(jnp.float32)

    nll, gradient = _by_chunks(chunk_nll, targets.shape, hidden, targets)
    return nll, gradient.astype(hidden.dtype)


def _token_nll_backward(gradient: Array, cotangent: Array) -> tuple[None, None, Array, None]:
    along = gradient.astype(jnp.float32) * cotangent[..., None]
    return None, None, along.astype(gradient.dtype), None


_chunked_nll.defvjp(_token_nll_forward, _token_nll_backward)
_token_nll = jax.jit(_chunked_nll)


@jax.jit
def _predictions(head: Array, bias: Array | None, hidden: Array) -> tuple[Array, Array]:
    def chunk_predictions(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        return _expected_row(head, _logits(head, bias, chunk[0]))

    return _by_chunks(chunk_predictions, hidden.shape[:2], hidden)


@jax.jit
def _token_kl(head: Array, bias: Array | None, hidden: Array, expected: Array, total: Array, other: Array) -> Array:
    def chunk_total(chunk: tuple[Array, ...]) -> Array:
        return jax.nn.logsumexp(_logits(head, bias, chunk[0]), 1)

    less = hidden.astype(jnp.float32) - other.astype(jnp.float32)
    return jnp.sum(less * expected, -1) - total + _by_chunks(chunk_total, total.shape, other)


@jax.jit
def _token_kl_gradient(head: Array, bias: Array | None, hidden: Array, other: Array) -> tuple[Array, Array]:
    def chunk_kl(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        reference, judged = (jax.nn.log_softmax(_logits(head, bias, states), 1) for states in chunk)
        likely = jnp.exp(reference)
        return jnp.sum(likely * (reference - judged), 1), _mean_row(head, jnp.exp(judged) - likely)

    return _by_chunks(chunk_kl, hidden.shape[:2], hidden, other)


@jax.jit
def _token_scores(head: Array, bias: Array | None, hidden: Array, targets: Array) -> tuple[Array, Array]:
    def chunk_scores(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        states, ids = chunk
        logits = _logits(head, bias, states)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, 1), jnp.argmax(logits, 1).astype(jnp.int32) == ids

    return _by_chunks(chunk_scores, targets.shape, hidden, targets)


def _logits(head: Array, bias: Array | None, states: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
    logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)[None]


def _mean_row(head: Array, weights: Float[Array, "tokens vocab"]) -> Float[Array, "tokens hidden"]:
    return jnp.einsum("nv,vd->nd", weights.astype(head.dtype), head, preferred_element_type=jnp.float32)


def _expected_row(
    head: Array, logits: Float[Array, "tokens vocab"]
) -> tuple[Float[Array, "tokens hidden"], Float[Array, " tokens"]]:
    """The head's mean row under the softmax of the logits, and the log of the sum of their exponentials.

    With one exponential per logit: `logsumexp` and then the weights would take two, a tenth of the whole time on a CPU.
    """
    most = logits.max(1)
    weights = jnp.exp(logits - most[:, None])
    total = jnp.einsum("nv,v->n", weights, jnp.ones_like(weights[0]), precision=jax.lax.Precision.HIGHEST)
    return _mean_row(head, weights) / total[:, None], most + jnp.log(total)


def _by_chunks(function: Callable[[tuple[Array, ...]], Any], shape: tuple[int, ...], *arrays: Array) -> Any:
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
