"""IntraSlice itself (arXiv 2602.01975) as a pruning method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from intraslice_jax.parallel.placement import mesh_of
from intraslice_jax.prune.attention import AttentionPlan, HeadEnergies, fuse_attention, plan_widths, query_key_maps
from intraslice_jax.prune.budget import HeadWidths
from intraslice_jax.prune.calibration import AttentionCalibration, MLPCalibration
from intraslice_jax.prune.heads import choose_heads, strongest_heads
from intraslice_jax.prune.iterative import IterativeSettings
from intraslice_jax.prune.linalg import solver_precision
from intraslice_jax.prune.method import PrunedAttention, PrunedMLP
from intraslice_jax.prune.mixtures import better_mlp
from intraslice_jax.prune.mlp import eliminate, fuse_mlp, select_channels
from intraslice_jax.prune.mlp_on_mesh import fuse_mlp_on_mesh
from intraslice_jax.prune.spectra import value_spectra
from intraslice_jax.prune.uniform import UniformLayout
from intraslice_jax.stages import stage

AUTO_SHARE = 0.4
"""Under this share of kept channels `iterative: auto` tries learned mixtures (docs/method.md 3.3)."""


@dataclass(frozen=True)
class IntraSlice:
    """PCA inside each module: docs/method.md sections 2 and 3.

    Attributes:
        layout: the shape that all layers get; None where each has its own.
        heads: what stays of the attention, by layer, where that is decided already.
    """

    layout: UniformLayout | None = None
    heads: Mapping[int, HeadWidths] = field(default_factory=dict)

    @stage("attention solves")
    def prune_attention(self, layer: AttentionCalibration, ratio: float) -> PrunedAttention:
        """Heads and widths, RoPE pairs, value basis, ridge compensation, in two passes over the text."""
        shape, arrays, moments = layer.shape, layer.arrays, layer.head_moments
        channels_in = shape.num_attention_heads * shape.v_head_dim
        with solver_precision():
            energies = HeadEnergies(arrays["o_proj"], moments.head_gram)

        def plan_for(heads: np.ndarray, width: int, v_width: int | None = None) -> AttentionPlan:
            kept = tuple(int(h) for h in heads)
            to_kv = tuple(shape.query_to_kv[h] for h in kept)
            return AttentionPlan(kept, to_kv, *plan_widths(width, shape), width if v_width is None else v_width)

        def cost(heads: np.ndarray, width: int) -> int:
            return layer.model.attention_parameters(plan_for(heads, width).shape_of(shape))

        budget = channels_in - round(channels_in * ratio)
        config, allowed, widths = layer.config, layer.parameter_range, self.heads.get(layer.index)
        if self.layout is not None:
            plan = self.layout.attention_plan(energies, shape)
        elif widths is not None:
            heads = strongest_heads(energies, widths.num_attention_heads, shape.query_to_kv, config.grouping)
            plan = plan_for(heads, widths.qk_head_dim, widths.v_head_dim)
        else:
            plan = plan_for(
                *choose_heads(energies, budget, shape.query_to_kv, config.grouping, cost, allowed, config.head_align)
            )
        if plan.keeps_all(shape):
            return PrunedAttention(arrays, shape, plan.heads, 0.0, {"solver": "none"})  # the ridge would still damp it
        with solver_precision():
            maps = query_key_maps(moments, plan, shape, layer.tokens, config.damping, config.pair_selection)
            query, key = (np.asarray(a, np.float32) for a in (maps.query, maps.key))
        key = key[list(plan.local_query_to_kv)]
        kept, drift = layer.kept_moments(plan.heads, *jax.device_put((query, key)))
        with solver_precision():
            fused, from_kept = fuse_attention(
                arrays,
                shape,
                plan,
                maps,
                kept,
                layer.tokens,
                config.damping,
                config.value_basis,
                drift,
                config.dense_targets,
            )
            output, bias = (
                None if array is None else np.asarray(array, np.float32)
                for array in (from_kept, fused.arrays.get("o_bias"))
            )
        behind = layer.after_attention(*jax.device_put((output, bias)))
        spectra = value_spectra(kept.gram, plan.query_to_kv)
        return dataclasses.replace(fused, notes={**fused.notes, "value_spectra": spectra}, behind=behind)

    @stage("MLP solves")
    def prune_mlp(self, layer: MLPCalibration, keep: int) -> PrunedMLP:
        """Channel selection and compensation, or learned mixtures where they are wanted and better."""
        arrays, moments, config = layer.arrays, layer.moments, layer.config
        damping = config.damping
        if mesh_of(moments) is not None:
            plain = fuse_mlp_on_mesh(arrays, moments, layer.tokens, keep, damping, config.selection)
        else:
            with solver_precision():
                if config.selection == "obs":
                    kept = eliminate(arrays, moments, layer.tokens, keep, damping, config.selection_noise)
                else:
                    kept = select_channels(moments.gram, arrays["down_proj"], keep)
                plain = fuse_mlp(arrays, moments, layer.tokens, kept, damping, layer.drift, config.dense_targets)
        if not self._wants_mixtures(layer, keep):
            return plain
        return better_mlp(layer, plain, keep, IterativeSettings())

    def _wants_mixtures(self, layer: MLPCalibration, keep: int) -> bool:
        full = layer.arrays["up_proj"].shape[-1]
        inside = 2 <= layer.index < layer.num_layers - 2
        wanted = {"never": False, "auto": keep < AUTO_SHARE * full, "always": keep < full}
        return inside and wanted[layer.config.iterative]
