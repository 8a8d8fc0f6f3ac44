"""Losses of tokens, without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from intraslice_jax.models.decoder import Decoder
from intraslice_jax.parallel.mesh import DATA, ways
from intraslice_jax.parallel.placement import gathered, mesh_of

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


@jax.jit
def _token_nll(head: Array, bias: Array | None, hidden: Array, targets: Array) -> Array:
    @jax.checkpoint
    def chunk_nll(chunk: tuple[Array, Array]) -> Array:
        states, ids = chunk
        logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=jnp.float32)
        logits = logits if bias is None else logits + bias.astype(jnp.float32)[None]
        chosen = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, 1) - chosen

    tokens = targets.size
    size = min(CHUNK, tokens)
    chunks = -(-tokens // size)
    pad = chunks * size - tokens
    states = jnp.pad(hidden.reshape(tokens, -1), ((0, pad), (0, 0))).reshape(chunks, size, -1)
    ids = jnp.pad(targets.reshape(tokens), (0, pad)).reshape(chunks, size)
    return jax.lax.map(chunk_nll, (states, ids)).reshape(-1)[:tokens].reshape(targets.shape)
