"""Wanda-sp: weights times the norm of what they are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.prune.baselines.channels import best_channels, keep_channels
from intraslice_jax.prune.baselines.heads import best_heads, keep_heads
from intraslice_jax.prune.baselines.moments import attention_moments
from intraslice_jax.prune.calibration import AttentionCalibration, MLPCalibration
from intraslice_jax.prune.method import PrunedAttention, PrunedMLP


@dataclass(frozen=True)
class WandaSP:
    """Structured Wanda, the baseline of FLAP (An et al., AAAI 2024) after Wanda (Sun et al., ICLR 2024).

    The score of a channel c is sum_j |W_cj| ||x_c||_2 over the outputs j of the o- or down-projection, the score
    of a head the sum over its channels. No compensation.
    """

    def prune_attention(self, layer: AttentionCalibration, ratio: float) -> PrunedAttention:
        """Drops the heads with the lowest scores."""
        moments, o_proj = attention_moments(layer), layer.arrays["o_proj"]
        scores = weighted_norms(moments, o_proj.reshape(-1, o_proj.shape[-1]))
        heads = best_heads(layer.shape, scores.reshape(o_proj.shape[:2]).sum(1), ratio)
        return keep_heads(layer, moments, heads)

    def prune_mlp(self, layer: MLPCalibration, keep: int) -> PrunedMLP:
        """Drops the channels with the lowest scores."""
        scores = weighted_norms(layer.moments, layer.arrays["down_proj"])
        return keep_channels(layer, best_channels(scores, keep))


def weighted_norms(moments: GramMoments, weights: Float[Array, "channels hidden"]) -> Float[np.ndarray, " channels"]:
    """||x_c||_2 sum_j |W_cj|."""
    norms = np.sqrt(np.diagonal(np.asarray(moments.gram, np.float64)))
    return norms * np.abs(np.asarray(weights, np.float64)).sum(1)
