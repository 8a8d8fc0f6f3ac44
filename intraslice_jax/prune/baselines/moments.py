"""What the methods ask about an attention's output: the moments of all heads together."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from intraslice_jax.calibrate.statistics import GramMoments, zeros_like_moments
from intraslice_jax.models.decoder import Block
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.moments import MomentSum
from intraslice_jax.prune.calibration import AttentionCalibration, check_finite
from intraslice_jax.prune.drift import SplitSum


def attention_moments(layer: AttentionCalibration) -> GramMoments:
    """Second moment and sum of the o-projection's input y: [heads * v, heads * v] and [heads * v], float32.

    Raises:
        RunError: an entry is not finite.
    """
    channels = layer.shape.num_attention_heads * layer.shape.v_head_dim
    empty = functools.partial(zeros_like_moments, GramMoments, gram=(channels, channels), total=(channels,))
    stream = layer.stream
    total = SplitSum(empty, stream.mesh, len(stream.batches))

    def add(i: int) -> MomentSum[GramMoments]:
        total.of(i).add(_add, stream.real[i], 1, layer.block, stream.batches[i], stream.rope)
        return total.of(i)

    stream.each_batch(add)
    return check_finite(layer.index, "attention", total.totals()[0])


@functools.partial(jax.jit, donate_argnums=0)
def _add(moments: GramMoments, block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable) -> GramMoments:
    y = block.attention.mix(block.input_norm(x), rope).astype(jnp.float32)
    y = y.reshape(y.shape[0] * y.shape[1], -1)
    gram = jnp.einsum("ni,nj->ij", y, y, precision=jax.lax.Precision.HIGHEST)
    return GramMoments(moments.gram + gram, moments.total + y.sum(0))
