"""One shape for all layers, which stock classes of other programs can hold (docs/method.md section 2.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.model import LanguageModel
from intraslice_jax.parallel.placement import gathered
from intraslice_jax.prune.attention import AttentionPlan, HeadEnergies, aligned_widths, even_width, plan_widths
from intraslice_jax.prune.budget import TOLERANCE, LayerRatios, narrowest
from intraslice_jax.prune.calibration import AttentionCalibration, ResidualStream
from intraslice_jax.prune.linalg import solver_precision

NARROWEST_HEAD = 0.5
"""No head is made narrower than this share of its width: its energy does not say what lost RoPE pairs cost."""


@dataclass(frozen=True)
class UniformLayout:
    """What every layer keeps.

    Attributes:
        kv_heads: number of KV heads.
        group_size: query heads of each.
        width: channels of a head, even.
        pairs: RoPE pairs of all heads, ascending.
        intermediate_size: channels of the MLP.
    """

    kv_heads: int
    group_size: int
    width: int
    pairs: tuple[int, ...]
    intermediate_size: int

    def attention_plan(self, energies: HeadEnergies, shape: LayerShape) -> AttentionPlan:
        """A layer's plan: its own best heads, in the common number, width and pairs."""
        heads = best_groups(energies, shape.query_to_kv, self.kv_heads, self.group_size)
        kept = tuple(int(head) for head in heads)
        to_kv = tuple(shape.query_to_kv[head] for head in kept)
        rotary, rest = plan_widths(self.width, shape)
        return AttentionPlan(kept, to_kv, rotary, rest, self.width, self.pairs if rotary else ())


def plan_uniform_layout(
    model: LanguageModel, stream: ResidualStream, ratios: LayerRatios, config: PruneConfig
) -> UniformLayout:
    """The common shape with the most energy summed over the layers, from one pass over the unpruned model.

    Args:
        model: to be pruned; its layers have the same widths.
        stream: its calibration set before the first layer; it is used up.
        ratios: how much attention and MLPs lose, the same in all layers.
        config: the run's settings.

    Raises:
        InputError: the settings contradict a common shape, or the request cannot be met with one.
        RunError: a second moment is not finite.
    """
    check_uniform_layout(model.config, ratios, config)
    energies: list[HeadEnergies] = []
    scores: list[np.ndarray] = []
    for i, block in enumerate(map(gathered, model.decoder.layers)):
        shape = model.config.layers[i]
        whole = (0, model.config.attention_parameters(shape))
        calibration = AttentionCalibration(i, block, shape, stream, config, model.config, whole)
        moments = calibration.head_moments
        with solver_precision():
            energies.append(HeadEnergies(calibration.arrays["o_proj"], moments.head_gram))
        scores.append(np.asarray(moments.pair_scores, np.float64))
        stream.run(block)

    shape = max(model.config.layers, key=lambda layer: layer.rotary_dim)
    channels = shape.num_attention_heads * shape.v_head_dim
    kept = channels - round(channels * ratios.attention[0])
    kv_heads, group_size, width = common_heads(energies, shape, kept, model.config.hidden_size, config.head_align)
    rotary, rest = plan_widths(width, shape)
    pairs = common_pairs(
        [
            layer_scores[best_groups(found, shape.query_to_kv, kv_heads, group_size)]
            for layer_scores, found, layer in zip(scores, energies, model.config.layers, strict=True)
            if layer.rotary_dim
        ],
        shape.rotary_dim,
        rotary // 2,
    )
    plan = AttentionPlan((), tuple(kv for kv in range(kv_heads) for _ in range(group_size)), rotary, rest, width)
    inner = common_mlp_width(model.config, ratios.sparsity(model.config), plan.shape_of(shape), config)
    return UniformLayout(kv_heads, group_size, width, pairs, inner)


def check_uniform_layout(model: ModelConfig, ratios: LayerRatios, config: PruneConfig) -> None:
    """Raises InputError for settings and models that a common shape contradicts."""
    if config.method != "intraslice":
        raise InputError(f"layout uniform is a plan of method intraslice, found method {config.method}")
    if len(set(ratios.attention)) > 1 or len(set(ratios.mlp)) > 1 or ratios.heads:
        raise unlike(config)
    widths = {dataclasses.replace(shape, rotary_dim=0, sliding_window=None) for shape in model.layers}
    rotated = {shape.rotary_dim for shape in model.layers if shape.rotary_dim}
    shape = model.layers[0]
    if len(widths) > 1 or rotated - {model.rotary_dim} or shape.qk_head_dim != shape.v_head_dim:
        raise InputError(
            "layout uniform needs a model whose layers all have the same widths; this one was pruned before"
        )


def unlike(config: PruneConfig) -> InputError:
    """What to say of ratios that differ between layers."""
    return InputError(f"layout uniform prunes all layers alike, found ratios {config.ratios!r}; use ratios uniform")


def common_heads(
    energies: Sequence[HeadEnergies], shape: LayerShape, kept_channels: int, hidden_size: int, align: int = 2
) -> tuple[int, int, int]:
    """Numbers of KV heads and of query heads in each, and the even width, of the greatest energy over all layers.

    Stock classes want a number of heads that divides the hidden size; the unpruned number is always allowed.
    """
    full, all_heads = shape.v_head_dim, shape.num_attention_heads
    best: tuple[float, tuple[int, int, int]] | None = None
    for kv_heads in range(1, shape.num_key_value_heads + 1):
        for group_size in range(1, max(shape.group_sizes) + 1):
            heads = kv_heads * group_size
            width, affordable = common_width(kept_channels, heads, full, align), kept_channels // heads
            if min(width, affordable) < NARROWEST_HEAD * full or width > affordable + 1:
                continue
            if hidden_size % heads and heads != all_heads:
                continue
            groups = [best_groups(found, shape.query_to_kv, kv_heads, group_size) for found in energies]
            energy = sum(
                found.of(kept, min(width, affordable)).sum() for found, kept in zip(energies, groups, strict=True)
            )
            if best is None or energy > best[0]:
                best = float(energy), (kv_heads, group_size, width)
    if best is None:  # not even one head: the ratio is beyond what heads of that width can be
        return 1, 1, common_width(kept_channels, 1, full, align)
    return best[1]


def common_width(kept_channels: int, heads: int, full: int, align: int) -> int:
    """The even width nearest to an equal share, or the widest multiple of a greater alignment within it.

    Where the share is below the alignment it is the narrowest width there is.
    """
    if align == 2:
        return even_width(kept_channels, heads, full)
    widths = aligned_widths(full, align)
    return max((width for width in widths if width * heads <= kept_channels), default=widths[0])


def best_groups(
    energies: HeadEnergies, query_to_kv: Sequence[int], kv_heads: int, group_size: int
) -> Int[np.ndarray, " kept"]:
    """The best query heads of each KV head, of those KV heads whose best ones have the most energy; ascending."""
    to_kv = np.asarray(query_to_kv)
    groups = [np.flatnonzero(to_kv == kv) for kv in np.unique(to_kv)]
    groups = [group[np.argsort(-energies.total[group], kind="stable")][:group_size] for group in groups]
    groups.sort(key=lambda group: -energies.total[group].sum())
    return np.sort(np.concatenate(groups[:kv_heads]))


def common_pairs(scores: Sequence[Float[np.ndarray, "_ qk"]], rotary_dim: int, count: int) -> tuple[int, ...]:
    """The RoPE pairs with the greatest share of the query-key products, summed over layers; ascending.

    Args:
        scores: for every layer those of the query heads it keeps.
        rotary_dim: rotated channels of a head.
        count: how many pairs to keep.
    """
    half = rotary_dim // 2
    total = np.zeros(half)
    for layer in scores:
        pairs = (layer[:, :half] + layer[:, half:rotary_dim]).sum(0)
        total += pairs / max(pairs.sum(), np.finfo(np.float64).tiny)
    return tuple(int(pair) for pair in np.sort(np.argsort(-total, kind="stable")[:count]))


def common_mlp_width(model: ModelConfig, sparsity: float, attention: LayerShape, config: PruneConfig) -> int:
    """The MLP width with which the removed parameters come nearest to the request.

    Raises:
        InputError: they do not come within 0.5 % of the block parameters, or half a step of the alignment.
    """
    full, total = attention.intermediate_size, model.block_parameters()
    widths = [full, *range(narrowest(full, config.align, config.max_ratio), full, config.align)]

    def missed(width: int) -> float:
        shape = dataclasses.replace(attention, intermediate_size=width)
        kept = model.num_layers * (model.attention_parameters(shape) + model.mlp_parameters(shape))
        return sparsity - (1 - kept / total)

    width = min(widths, key=lambda w: (abs(missed(w)), w))
    step = abs(missed(max(full - config.align, 1)) - missed(full))
    if abs(missed(width)) > max(TOLERANCE, 0.5 * step + 1e-9):
        how = "could not be removed; ask for less" if missed(width) > 0 else "too many were removed; ask for more"
        raise InputError(
            "the requested sparsity cannot be met with layout uniform: "
            f"{abs(missed(width)):.1%} of the block parameters {how}"
        )
    return width
