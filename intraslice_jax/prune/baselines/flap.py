"""FLAP: what hardly fluctuates leaves, and its mean becomes a bias."""

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
class FLAP:
    """Fluctuation-based adaptive structured pruning (An et al., AAAI 2024).

    The score of a channel c is Var(x_c) ||W_c||^2 (the paper's WIFV), the score of a head the sum over its
    channels; the mean output of what leaves is added to the projection's bias. Families without such biases get
    them with `output_biases`, otherwise nothing is compensated. The paper's ratios per layer are not part of
    this class: they come from the run's estimator, as for every method.
    """

    def prune_attention(self, layer: AttentionCalibration, ratio: float) -> PrunedAttention:
        """Drops the heads that fluctuate least."""
        moments, o_proj = attention_moments(layer), layer.arrays["o_proj"]
        scores = fluctuations(moments, layer.tokens, o_proj.reshape(-1, o_proj.shape[-1]))
        heads = best_heads(layer.shape, scores.reshape(o_proj.shape[:2]).sum(1), ratio)
        return keep_heads(layer, moments, heads, fill_bias=True)

    def prune_mlp(self, layer: MLPCalibration, keep: int) -> PrunedMLP:
        """Drops the channels that fluctuate least."""
        scores = fluctuations(layer.moments, layer.tokens, layer.arrays["down_proj"])
        return keep_channels(layer, best_channels(scores, keep), fill_bias=True)


def fluctuations(
    moments: GramMoments, tokens: int, weights: Float[Array, "channels hidden"]
) -> Float[np.ndarray, " channels"]:
    """Var(x_c) sum_j W_cj^2 over the calibration tokens."""
    mean = np.asarray(moments.total, np.float64) / tokens
    square = np.diagonal(np.asarray(moments.gram, np.float64)) / tokens
    variance = np.maximum(square - np.square(mean), 0)
    return variance * np.square(np.asarray(weights, np.float64)).sum(1)
