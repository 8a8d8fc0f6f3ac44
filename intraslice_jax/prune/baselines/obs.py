"""OBS: units leave one by one, and after each the weights that stay make up for it exactly."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from intraslice_jax.config import LayerShape
from intraslice_jax.prune.baselines.channels import keep_channels
from intraslice_jax.prune.baselines.heads import keep_heads, nearer
from intraslice_jax.prune.baselines.moments import attention_moments
from intraslice_jax.prune.calibration import AttentionCalibration, MLPCalibration
from intraslice_jax.prune.elimination import eliminate_channels, inverse_moment
from intraslice_jax.prune.linalg import each, solver_precision, to_solver
from intraslice_jax.prune.method import PrunedAttention, PrunedMLP


@dataclass(frozen=True)
class OBS:
    """Structured Optimal Brain Surgeon (Hassibi & Stork 1992) on groups of columns, as ZipLM has it.

    ZipLM: Kurtic et al., NeurIPS 2023; OSSCAR (Meng et al., ICML 2024) solves the same problem with local
    search. For the o- and down-projection W [inputs, outputs] with damped second moment H of the inputs: the
    group S that leaves next has the least error tr(W_S^T (H^-1)_SS^-1 W_S); then W -= (H^-1)_:S (H^-1)_SS^-1 W_S,
    and H^-1 likewise. Groups are single channels in MLPs and whole query heads in attention. Where the
    projection has a bias, moments are taken about the mean and the bias absorbs the mean.
    """

    def prune_attention(self, layer: AttentionCalibration, ratio: float) -> PrunedAttention:
        """Removes heads one by one."""
        moments, affine = attention_moments(layer), "o_bias" in layer.arrays
        with solver_precision():
            inverse = inverse_moment(moments, layer.tokens, layer.config.damping, affine)
            heads, o_proj = eliminate_heads(inverse, to_solver(layer.arrays["o_proj"]), layer.shape, ratio)
            return keep_heads(layer, moments, heads, o_proj=o_proj, fill_bias=affine)

    def prune_mlp(self, layer: MLPCalibration, keep: int) -> PrunedMLP:
        """Removes channels one by one."""
        down, affine = layer.arrays["down_proj"], "down_bias" in layer.arrays
        with solver_precision():
            inverse = inverse_moment(layer.moments, layer.tokens, layer.config.damping, affine)
            left = eliminate_channels(inverse, to_solver(down), jnp.asarray(len(down) - keep, jnp.int32))
            return keep_channels(layer, np.asarray(left.stays), down_proj=left.weights, fill_bias=affine)


def eliminate_heads(
    inverse: Float[Array, "inputs inputs"], weights: Float[Array, "heads v hidden"], shape: LayerShape, ratio: float
) -> tuple[tuple[int, ...], Float[Array, "heads v hidden"]]:
    """Removes query heads while that brings the removed share of the attention nearer to `ratio`.

    Returns:
        The heads that stay, ascending, and the o-projection with their updated weights.
    """
    heads, v, _ = weights.shape
    kept = list(range(heads))
    inverse = inverse.reshape(heads, v, heads, v)
    while len(kept) > 1:
        errors = np.asarray(_head_errors(inverse, weights, jnp.asarray(np.isin(np.arange(heads), kept))))
        worst = int(np.argmin(errors))
        fewer = [h for h in kept if h != worst]
        if not nearer(shape, fewer, kept, ratio):
            break
        inverse, weights = _remove_head(inverse, weights, jnp.asarray(worst, jnp.int32))
        kept = fewer
    return tuple(kept), weights


@jax.jit
def _head_errors(
    inverse: Float[Array, "heads v heads v"], weights: Float[Array, "heads v hidden"], stays: Bool[Array, " heads"]
) -> Float[Array, " heads"]:
    every = jnp.arange(len(weights))
    blocks = inverse[every, :, every]
    blocks = jnp.where(stays[:, None, None], blocks, jnp.eye(blocks.shape[-1], dtype=blocks.dtype)[None])

    def error(block: Array, weights: Array) -> Array:
        half = jax.lax.linalg.triangular_solve(jnp.linalg.cholesky(block), weights, left_side=True, lower=True)
        return jnp.square(half).sum()

    return jnp.where(stays, each(error, blocks, weights), jnp.inf)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _remove_head(
    inverse: Float[Array, "heads v heads v"], weights: Float[Array, "heads v hidden"], head: Int[Array, ""]
) -> tuple[Float[Array, "heads v heads v"], Float[Array, "heads v hidden"]]:
    heads, v, _ = weights.shape
    columns = inverse[:, :, head].reshape(heads * v, v)
    factor = jnp.linalg.cholesky(columns.reshape(heads, v, v)[head])
    columns = jax.lax.linalg.triangular_solve(factor, columns.T, left_side=True, lower=True)
    rows = jax.lax.linalg.triangular_solve(factor, weights[head], left_side=True, lower=True)
    return inverse - (columns.T @ columns).reshape(inverse.shape), weights - (columns.T @ rows).reshape(weights.shape)
