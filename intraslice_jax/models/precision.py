"""How exactly matrices are multiplied."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp

from intraslice_jax.models.decoder import Decoder


def exact_float32(decoder: Decoder) -> AbstractContextManager:
    """A context in which a float32 model computes in float32: GPUs and TPUs would round the factors otherwise."""
    if decoder.embed_tokens[...].dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return nullcontext()
