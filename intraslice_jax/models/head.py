"""Losses of tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from intraslice_jax.models.decoder import Decoder

CHUNK = 256
"""Tokens whose logits exist at once: 50 MB in float32 for a vocabulary of 49,152."""


def token_nll(
    decoder: Decoder, hidden: Float[Array, "batch seq hidden"], targets: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """Negative log-likelihoods of the targets in nats, float32.

    Differentiable; logits are computed again in the backward pass instead of being kept.

    Args:
        decoder: whose head is applied.
        hidden: what `Decoder.hidden_states` returns: behind the final norm.
        targets: the token that follows each position.
    """
    bias = None if decoder.lm_head_bias is None else decoder.lm_head_bias[...]
    return _token_nll(decoder.head, bias, hidden, targets)


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


@jax.jit
def _token_nll(head: Array, bias: Array | None, hidden: Array, targets: Array) -> Array:
    @jax.checkpoint
    def chunk_nll(chunk: tuple[Array, Array]) -> Array:
        states, ids = chunk
        logits = _chunk_logits(head, bias, states)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, 1) - chosen

    return jax.lax.map(chunk_nll, _chunks(hidden, targets)).reshape(-1)[: targets.size].reshape(targets.shape)


@jax.jit
def _token_scores(head: Array, bias: Array | None, hidden: Array, targets: Array) -> tuple[Array, Array]:
    def chunk_scores(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        states, ids = chunk
        logits = _chunk_logits(head, bias, states)
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, 1), jnp.argmax(logits, 1).astype(jnp.int32) == ids

    log_probs, greedy = jax.lax.map(chunk_scores, _chunks(hidden, targets))
    return log_probs.reshape(-1)[: targets.size], greedy.reshape(-1)[: targets.size]


def _chunk_logits(head: Array, bias: Array | None, states: Array) -> Array:
    logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)[None]


def _chunks(hidden: Array, targets: Array) -> tuple[Array, Array]:
    """States [chunks, CHUNK, hidden] and targets [chunks, CHUNK], the last ones padded."""
    tokens = targets.size
    size = min(CHUNK, tokens)
    chunks = -(-tokens // size)
    pad = chunks * size - tokens
    states = jnp.pad(hidden.reshape(tokens, -1), ((0, pad), (0, 0))).reshape(chunks, size, -1)
    return states, jnp.pad(targets.reshape(tokens), (0, pad)).reshape(chunks, size)
