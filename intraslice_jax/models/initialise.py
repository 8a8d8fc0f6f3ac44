"""Initial values of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 0.02) -> nnx.Param:
    """A parameter drawn from a normal distribution with standard deviation `scale`."""
    return nnx.Param((scale * jax.random.normal(rngs.params(), shape)).astype(dtype))


def optional_zeros(present: bool, shape: tuple[int, ...], dtype: jnp.dtype) -> nnx.Param | None:
    """A parameter of zeros, or None for a map without a bias."""
    return nnx.Param(jnp.zeros(shape, dtype)) if present else None
