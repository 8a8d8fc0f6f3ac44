"""Finding where a model stops being finite."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from intraslice_jax.models.decoder import Decoder, run_block
from intraslice_jax.parallel.placement import gathered


def first_bad_layer(decoder: Decoder, tokens: Int[Array, "batch seq"]) -> str:
    """Which part of the model first yields a NaN or an infinity for these tokens, in words."""
    x, rope = decoder.embed(tokens), decoder.rope_for(tokens.shape[1])
    if not _finite(x):
        return "the embedding holds NaN or Inf"
    for i, block in enumerate(map(gathered, decoder.layers)):
        attended = block.attention(block.input_norm(x), rope)
        x = run_block(block, x, rope)
        if not _finite(x):
            module = "MLP" if _finite(attended) else "attention"
            return f"layer {i}, {module}, is the first with NaN or Inf; its weights or activations overflow"
    if not _finite(decoder.norm(x)):
        return "the final norm yields NaN or Inf"
    return "the head yields NaN or Inf"


def _finite(x: Array) -> bool:
    return bool(jnp.isfinite(x).all())
