"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Norm(nnx.Module):
    """RMSNorm (`weight` only) or LayerNorm (`weight` and `bias`) over the last axis."""

    def __init__(self, kind: str, size: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y.astype(x.dtype) * self.weight[...][None, None]
        return y if self.bias is None else y + self.bias[...][None, None]
