"""Magnitude: the smallest weights leave, whatever they are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float

from intraslice_jax.config import LayerShape
from intraslice_jax.prune.baselines.channels import best_channels, keep_channels
from intraslice_jax.prune.baselines.heads import best_heads, keep_heads
from intraslice_jax.prune.baselines.moments import attention_moments
from intraslice_jax.prune.calibration import AttentionCalibration, MLPCalibration
from intraslice_jax.prune.method import PrunedAttention, PrunedMLP


@dataclass(frozen=True)
class Magnitude:
    """Structured magnitude pruning (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017).

    The score of a unit is the L2 norm of all weights that leave with it, as LLM-Pruner (Ma et al., NeurIPS 2023)
    couples them: a query head's share of its KV head counts with it. No calibration, no compensation.
    """

    def prune_attention(self, layer: AttentionCalibration, ratio: float) -> PrunedAttention:
        """Drops the heads with the smallest weights; the text only serves to report the error."""
        heads = best_heads(layer.shape, head_norms(layer.arrays, layer.shape), ratio)
        return keep_heads(layer, attention_moments(layer), heads)

    def prune_mlp(self, layer: MLPCalibration, keep: int) -> PrunedMLP:
        """Drops the channels with the smallest weights."""
        return keep_channels(layer, best_channels(channel_norms(layer.arrays), keep))


def head_norms(arrays: Mapping[str, Array], shape: LayerShape) -> Float[np.ndarray, " heads"]:
    """L2 norm of every query head's weights with an equal share of its KV head's."""
    squares = {name: np.square(np.asarray(arrays[name], np.float64)) for name in ("q_proj", "k_proj", "v_proj")}
    key_value = (squares["k_proj"].sum((0, 2)) + squares["v_proj"].sum((0, 2))) / np.asarray(shape.group_sizes)
    output = np.square(np.asarray(arrays["o_proj"], np.float64)).sum((1, 2))
    return np.sqrt(squares["q_proj"].sum((0, 2)) + output + key_value[list(shape.query_to_kv)])


def channel_norms(arrays: Mapping[str, Array]) -> Float[np.ndarray, " inner"]:
    """L2 norm of every channel's columns before and row behind the nonlinearity."""
    total = np.square(np.asarray(arrays["down_proj"], np.float64)).sum(1)
    for name in ("gate_proj", "up_proj"):
        if name in arrays:
            total = total + np.square(np.asarray(arrays[name], np.float64)).sum(0)
    return np.sqrt(total)
