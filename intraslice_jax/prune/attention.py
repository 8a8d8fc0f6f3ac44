"""Attention: which heads stay, how wide, on which RoPE pairs and in which value basis (docs/method.md section 2)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from intraslice_jax.calibrate.statistics import AttentionMoments, DriftMoments, MapMoments
from intraslice_jax.config import LayerShape
from intraslice_jax.programs import by_shape
from intraslice_jax.prune.compensation import Sums, missed_squares, ridge
from intraslice_jax.prune.dense_targets import Regression, correction, strength_note
from intraslice_jax.prune.drift import Drift
from intraslice_jax.prune.linalg import (
    Number,
    centred,
    each,
    eigh_descending,
    inverse_gram,
    on_solver,
    solver_name,
    to_solver,
    widened,
)
from intraslice_jax.prune.method import PrunedAttention
from intraslice_jax.prune.pairs import contribution_gram, eliminate_pairs

ValueBasis = Literal["activations", "outputs"]
PairSelection = Literal["products", "logits"]


@dataclass(frozen=True)
class AttentionPlan:
    """Kept query heads (ascending) of one layer and their common widths."""

    heads: tuple[int, ...]
    query_to_kv: tuple[int, ...]
    """The KV head of each kept query head, numbered as before pruning."""
    rotary_width: int
    """Rotated query/key channels, two per RoPE pair."""
    rest_width: int
    """Query/key channels that are not rotated."""
    v_width: int
    pairs: tuple[int, ...] | None = None
    """RoPE pairs that all KV heads keep; None for each KV head's own best."""

    @property
    def qk_width(self) -> int:
        """Channels of a query or key head."""
        return self.rotary_width + self.rest_width

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads that some kept query head reads (ascending)."""
        return tuple(sorted(set(self.query_to_kv)))

    def keeps_all(self, shape: LayerShape) -> bool:
        """Whether nothing is removed from a layer of this shape."""
        widths = self.qk_width == shape.qk_head_dim and self.v_width == shape.v_head_dim
        return widths and len(self.heads) == shape.num_attention_heads

    @property
    def local_query_to_kv(self) -> tuple[int, ...]:
        """`query_to_kv` numbered among the kept KV heads."""
        return tuple(self.kv_heads.index(j) for j in self.query_to_kv)

    def shape_of(self, shape: LayerShape) -> LayerShape:
        """The layer with its attention cut to this plan."""
        return dataclasses.replace(
            shape,
            query_to_kv=self.local_query_to_kv,
            qk_head_dim=self.qk_width,
            rotary_dim=self.rotary_width,
            v_head_dim=self.v_width,
        )


class HeadEnergies:
    """How much of the output each head carries in its k strongest components (docs/method.md 2.1).

    Attributes:
        channel_scores: ||W_o[c]||^2 H_cc, [heads, v].
        total: their sums over each head, [heads].
        cumulative: share of the head's spectrum in its first k components, [heads, v + 1].
    """

    def __init__(self, o_proj: Float[Array, "heads v hidden"], head_gram: Float[Array, "heads v v"]) -> None:
        scores, spectra = _scores_and_spectra(to_solver(o_proj), to_solver(head_gram))
        self.channel_scores, spectra = np.asarray(scores), np.asarray(spectra)
        self.total = self.channel_scores.sum(1)
        # A head that is never attended to has no spectrum and no energy.
        shares = spectra / np.maximum(spectra.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        self.cumulative = np.concatenate([np.zeros((len(shares), 1)), np.cumsum(shares, 1)], 1)

    def of(self, heads: np.ndarray, width: int) -> np.ndarray:
        """E_h(width) of the given heads."""
        return self.total[heads] * self.cumulative[heads, width]


@jax.jit
def _scores_and_spectra(o_proj: Array, head_gram: Array) -> tuple[Array, Array]:
    norms = jnp.square(o_proj).sum(-1)
    return norms * jnp.diagonal(head_gram, axis1=1, axis2=2), eigh_descending(head_gram)[0]


def plan_heads(energies: HeadEnergies, kept_channels: int) -> tuple[np.ndarray, int]:
    """Which query heads to keep and their common even width, for a budget of o-projection input channels.

    Returns:
        Ascending head indices and the width k.
    """
    scores = energies.channel_scores
    num_heads, full = scores.shape
    kept_channels = max(2, min(kept_channels, scores.size))
    best = np.argsort(-scores, axis=None, kind="stable")[:kept_channels]
    among_best = np.bincount(best // full, minlength=num_heads)
    kept = np.flatnonzero(among_best >= kept_channels / num_heads / 4)
    # From here on heads leave in the order of their energy, the least first.
    order = list(kept[np.argsort(energies.of(kept, full), kind="stable")])

    def width(heads: list) -> int:
        return min(kept_channels // len(heads), full)

    def energy(heads: list) -> float:
        return float(energies.of(np.asarray(heads), width(heads)).sum())

    while len(order) > 1 and energy(order[1:]) > energy(order):
        order.pop(0)
    while len(order) > 1 and width(order) < 0.75 * full:
        order.pop(0)
    return np.sort(np.asarray(order)), even_width(kept_channels, len(order), full)


def even_width(kept_channels: int, heads: int, full: int, align: int = 2) -> int:
    """The multiple of `align` nearest to an equal share of the channels, of two equally near ones the wider."""
    return max(min(align, full), min(align * math.floor(kept_channels / heads / align + 0.5), full))


def aligned_widths(full: int, align: int) -> list[int]:
    """The widths that a head may get: multiples of `align` below the full width, and that, ascending."""
    return [*range(align, full, align), full]


def plan_widths(width: int, shape: LayerShape) -> tuple[int, int]:
    """Rotated and other query/key channels of a head of a common width, in the proportion they had."""
    width = min(width, shape.qk_head_dim)
    rest = shape.qk_head_dim - shape.rotary_dim
    pairs = math.floor(width * shape.rotary_dim / shape.qk_head_dim / 2 + 0.5)
    rotary = min(max(2 * pairs, width - rest), shape.rotary_dim, width - width % 2)
    return rotary, width - rotary


class QueryKeyMaps(NamedTuple):
    """What queries and keys are multiplied with, after RoPE (docs/method.md 2.2)."""

    query: Float[Array, "heads qk width"]
    """Of each kept query head."""
    key: Float[Array, "kv qk width"]
    """Of each kept KV head."""
    pairs: Int[np.ndarray, "kv pairs"]
    """Kept RoPE pairs, ascending, numbered as in the layer before pruning."""


def query_key_maps(
    moments: AttentionMoments,
    plan: AttentionPlan,
    shape: LayerShape,
    tokens: int,
    damping: float,
    pair_selection: PairSelection = "products",
) -> QueryKeyMaps:
    """Selects the best RoPE pairs of each group, and projects what is not rotated (docs/method.md 2.2, 6.4).

    Args:
        moments: of the layer's queries and keys.
        plan: kept heads and widths.
        shape: the layer before pruning.
        tokens: how many tokens the moments sum over.
        damping: relative ridge damping.
        pair_selection: `products` scores each pair alone, `logits` all together, and lets kept pairs make up for
            dropped ones.
    """
    half, rest, kept = shape.rotary_dim // 2, shape.qk_head_dim - shape.rotary_dim, plan.rotary_width // 2
    to_kv, kv_heads, heads = (np.asarray(a) for a in (plan.local_query_to_kv, plan.kv_heads, plan.heads))
    scale, turn = np.ones((len(heads), kept)), np.zeros((len(heads), kept))
    if pair_selection == "products":
        pairs = select_pairs(np.asarray(moments.pair_scores), plan, shape.rotary_dim)
    else:
        total = to_solver(moments.rotary_key_sum)
        key_gram = to_solver(moments.rotary_key_gram) - total[:, :, None] * total[:, None, :] / tokens
        grams = contribution_gram(to_solver(moments.rotary_query_gram)[heads], key_gram[kv_heads[to_kv]])
        found = eliminate_pairs(grams, jnp.asarray(to_kv), len(kv_heads), kept, damping)
        pairs, scale, turn = (np.asarray(a) for a in found)
    key = np.zeros((len(kv_heads), shape.qk_head_dim, plan.qk_width))
    query = np.zeros((len(heads), shape.qk_head_dim, plan.qk_width))
    columns = np.arange(kept)
    for j, chosen in enumerate(pairs):
        key[j, chosen, columns] = key[j, chosen + half, columns + kept] = 1.0
    for h, chosen in enumerate(pairs[to_kv]):
        query[h, chosen, columns] = query[h, chosen + half, columns + kept] = scale[h]
        query[h, chosen, columns + kept] = turn[h]
        query[h, chosen + half, columns] = -turn[h]
    if plan.rest_width:
        left = right = np.eye(rest)[None]
        if plan.rest_width < rest:
            query_gram = to_solver(np.asarray(moments.rest_query_gram)[heads])
            keys = to_solver(np.asarray(moments.rest_key_gram)[kv_heads])
            left, right = product_bases(sum_groups(query_gram, to_kv, len(kv_heads)), keys, plan.rest_width)
            left = left[to_kv]
        query[:, shape.rotary_dim :, plan.rotary_width :] = left
        key[:, shape.rotary_dim :, plan.rotary_width :] = right
    return QueryKeyMaps(jax.device_put(query), jax.device_put(key), pairs)


def select_pairs(
    pair_scores: Float[np.ndarray, "heads qk"], plan: AttentionPlan, rotary_dim: int
) -> Int[np.ndarray, "kv pairs"]:
    """The best RoPE pairs of each kept KV head's group, ascending (docs/method.md 2.2), or the plan's own."""
    if plan.pairs is not None:
        return np.tile(np.asarray(plan.pairs, np.int32), (len(plan.kv_heads), 1))
    half = rotary_dim // 2
    scores = np.asarray(pair_scores, np.float64)[list(plan.heads)]
    scores = scores[:, :half] + scores[:, half:rotary_dim]
    groups = [scores[np.asarray(plan.query_to_kv) == kv].sum(0) for kv in plan.kv_heads]
    best = [np.sort(np.argsort(-group, kind="stable")[: plan.rotary_width // 2]) for group in groups]
    return np.asarray(best, np.int32)


@by_shape
@functools.partial(jax.jit, static_argnames="width")
def product_bases(
    query_gram: Float[Array, "kv rest rest"], key_gram: Float[Array, "kv rest rest"], width: int
) -> tuple[Float[Array, "kv rest width"], Float[Array, "kv rest width"]]:
    """Maps A, B for which Q A (K B)^T is the best approximation of Q K^T of rank `width`.

    With Q = U_q C_q^1/2 and K = U_k C_k^1/2 the truncated SVD of C_q^1/2 C_k^1/2 is that of Q K^T.
    """
    (root_q, inverse_q), (root_k, inverse_k) = _roots(query_gram), _roots(key_gram)
    left, values, right = each(jnp.linalg.svd, root_q @ root_k)
    scale = jnp.sqrt(values[:, None, :width])
    return inverse_q @ left[:, :, :width] * scale, inverse_k @ right.swapaxes(1, 2)[:, :, :width] * scale


def _roots(grams: Float[Array, "kv n n"]) -> tuple[Array, Array]:
    """Symmetric square roots and their pseudo-inverses."""
    values, vectors = eigh_descending(grams)
    safe = values > values[:, :1] * values.shape[1] * jnp.finfo(values.dtype).eps
    root = jnp.sqrt(jnp.where(safe, values, 0.0))
    inverse = jnp.where(safe, 1 / jnp.where(safe, root, 1.0), 0.0)
    transposed = vectors.swapaxes(1, 2)
    return vectors * root[:, None] @ transposed, vectors * inverse[:, None] @ transposed


def sum_groups(
    blocks: Float[Array, "heads n n"], to_kv: Int[Array, " heads"] | Int[np.ndarray, " heads"], kv_heads: int
) -> Float[Array, "kv n n"]:
    """Sums over the query heads of each KV head."""
    return jax.ops.segment_sum(blocks, jnp.asarray(to_kv), kv_heads)


def head_blocks(gram: Float[Array, "inputs inputs"], heads: int) -> Float[Array, "heads v v"]:
    """Diagonal blocks of a Gram matrix of heads side by side."""
    v = len(gram) // heads
    return gram.reshape(heads, v, heads, v)[jnp.arange(heads), :, jnp.arange(heads)]


def value_bases(group_gram: Float[Array, "kv v v"], width: int) -> Float[Array, "kv v width"]:
    """Principal directions of each group's y' (docs/method.md 2.3)."""
    return eigh_descending(group_gram)[1][:, :, :width]


def unexplained_blocks(gram: Float[Array, "inputs inputs"], heads: int, damping: Number) -> Float[Array, "heads v v"]:
    """Second moment of what the other heads do not predict of each head: what its directions are worth in company.

    By block inversion it is ((G^-1)_hh)^-1 for the damped Gram matrix G.
    """
    return each(jnp.linalg.inv, head_blocks(inverse_gram(gram, damping), heads))


def effective_bases(
    blocks: Float[Array, "heads v v"],
    o_proj: Float[Array, "heads v hidden"],
    to_kv: Int[Array, " heads"],
    kv_heads: int,
    width: int,
) -> Float[Array, "kv v width"]:
    """Orthonormal directions from which the heads' shares of the output are regressed best (docs/method.md 6.2).

    For a group of one head with second moment C and output map W it is the optimum, the leading left singular vectors
    of C^1/2 W; in larger groups the heads' moments are pooled.

    Args:
        blocks: second moment of each head.
        o_proj: its map to the output.
        to_kv: the group of each.
        kv_heads: number of groups.
        width: directions per group.
    """
    pooled = sum_groups(blocks, to_kv, kv_heads)
    _, inverse = _roots(pooled)
    effects = blocks @ o_proj
    effect = sum_groups(effects @ effects.swapaxes(1, 2), to_kv, kv_heads)
    directions = inverse @ eigh_descending(inverse @ effect @ inverse)[1][:, :, :width]
    return each(lambda one: jnp.linalg.qr(one)[0], directions)


def fuse_attention(
    arrays: Mapping[str, Array],
    shape: LayerShape,
    plan: AttentionPlan,
    maps: QueryKeyMaps,
    moments: MapMoments,
    tokens: int,
    damping: float,
    value_basis: ValueBasis = "activations",
    drift: Drift | None = None,
    dense_targets: float = 0.0,
) -> tuple[PrunedAttention, Float[Array, "kept v hidden"]]:
    """Small attention weights: query/key maps, value basis and ridge map fused (docs/method.md 2.2, 2.3).

    Also returns the map from y' to the module's output that the new value and output projections make together.

    Args:
        arrays: the module's weights by name (`q_proj` [hidden, heads, qk], ...).
        shape: the layer before pruning.
        plan: kept heads and widths.
        maps: of the queries and keys.
        moments: of the kept heads' y' against the full y.
        tokens: how many tokens the moments sum over.
        damping: relative ridge damping.
        value_basis: directions of the greatest variance, or of the greatest effect on the output.
        drift: of y' against the module's drift from the dense model, where it is to be corrected.
        dense_targets: the largest strength of that correction.
    """
    rows = {"q": np.asarray(plan.heads), "k": np.asarray(plan.kv_heads), "v": np.asarray(plan.kv_heads)}
    weights = {name: np.asarray(array) for name, array in arrays.items() if name != "rope_pairs"}
    projections = {name: array[..., rows[name[0]], :] for name, array in weights.items() if name[0] in rows}
    new, from_kept, error, indefinite, strength = _fuse(
        {name: on_solver(array) for name, array in projections.items()},
        {name: on_solver(array) for name, array in weights.items() if name[0] == "o"},
        MapMoments(*map(on_solver, moments)),
        on_solver(maps.query),
        on_solver(maps.key),
        np.asarray(plan.local_query_to_kv),
        float(tokens),
        damping,
        plan.v_width,
        value_basis,
        jax.tree.map(to_solver, drift),
        dense_targets,
    )
    new["rope_pairs"] = jax.device_put(np.take_along_axis(np.asarray(arrays["rope_pairs"])[rows["k"]], maps.pairs, 1))
    notes = {"solver": solver_name(indefinite), **strength_note(strength)}
    return PrunedAttention(new, plan.shape_of(shape), plan.heads, float(error), notes), from_kept


@by_shape
@functools.partial(jax.jit, static_argnames=("v_width", "value_basis"))
def _fuse(
    projections: dict[str, Array],
    output: dict[str, Array],
    moments: MapMoments,
    query_maps: Float[Array, "heads qk width"],
    key_maps: Float[Array, "kv qk width"],
    to_kv: Int[Array, " heads"],
    tokens: Float[Array, ""],
    damping: Float[Array, ""],
    v_width: int,
    value_basis: ValueBasis,
    drift: Drift | None = None,
    dense_targets: Float[Array, ""] | float = 0.0,
) -> tuple[
    dict[str, Array], Float[Array, "heads v hidden"], Float[Array, ""], Bool[Array, ""], Float[Array, ""] | None
]:
    """The small weights, the map of y' to the output, its relative error, and whether the Gram matrix was indefinite.

    The last is the strength of the correction towards the dense model; the error is the one without it.

    Args:
        projections: weights and biases of the kept query, key and value heads.
        output: the o-projection of all heads, and its bias.
        moments: of the kept heads' y' against the full y.
        query_maps: of each kept query head.
        key_maps: of each kept KV head.
        to_kv: which of them each kept query head reads.
        tokens: how many the moments sum over.
        damping: relative ridge damping.
        v_width: channels of a value head.
        value_basis: what decides on its directions.
        drift: of y' against the module's drift from the dense model.
        dense_targets: the largest strength.
    """
    projections, output, moments, query_maps, key_maps = widened((projections, output, moments, query_maps, key_maps))
    heads, kv_heads = len(to_kv), len(key_maps)
    o_proj = output["o_proj"].reshape(-1, output["o_proj"].shape[-1])
    cross, sums = moments.cross @ o_proj, None  # of y' and the output: the map is fitted onto that, not onto y
    if "o_bias" in output:
        sums = Sums(moments.input_sum, moments.target_sum @ o_proj, tokens)
    if value_basis == "activations":
        bases = value_bases(sum_groups(head_blocks(moments.gram, heads), to_kv, kv_heads), v_width)
    else:
        full = ridge(moments.gram, cross, damping, sums)
        bases = effective_bases(
            unexplained_blocks(
                moments.gram if sums is None else centred(moments.gram, sums.inputs, sums.inputs, sums.tokens),
                heads,
                damping,
            ),
            full.weights.reshape(heads, -1, o_proj.shape[-1]),
            to_kv,
            kv_heads,
            v_width,
        )
    rotated = functools.partial(_rotated, bases[to_kv])
    gram, cross = rotated(rotated(moments.gram).T), rotated(cross)
    if sums is not None:
        sums = sums._replace(inputs=rotated(sums.inputs))
    fit = ridge(gram, cross, damping, sums)
    energy = jnp.sum(o_proj * (moments.target_gram @ o_proj))
    error = missed_squares(fit, gram, cross, energy, damping, sums) / jnp.maximum(energy, 1e-30)

    output_map, added = fit.weights, None
    if drift is not None:
        held = cast(MapMoments, drift.held_plain)
        pairs = ((moments, drift.whole), (held, drift.held))
        whole, apart = (_regression(plain, extra, rotated, o_proj) for plain, extra in pairs)
        added = correction(whole, apart, damping, dense_targets, sums is not None)
        output_map = output_map + added.weights
    new = {"o_proj": output_map.reshape(heads, v_width, -1)}
    for name, head_maps in (("q", query_maps), ("k", key_maps), ("v", bases)):
        new[f"{name}_proj"] = jnp.einsum("dhk,hkw->dhw", projections[f"{name}_proj"], head_maps)
        if f"{name}_bias" in projections:
            new[f"{name}_bias"] = jnp.einsum("hk,hkw->hw", projections[f"{name}_bias"], head_maps)
    if fit.offset is not None:
        new["o_bias"] = output["o_bias"] + fit.offset
        if added is not None and added.offset is not None:
            new["o_bias"] = new["o_bias"] + added.offset
    from_kept = jnp.einsum("hvw,hwd->hvd", bases[to_kv], new["o_proj"])
    return new, from_kept, error, fit.indefinite, None if added is None else added.strength


def _regression(
    plain: MapMoments,
    drift: DriftMoments,
    rotated: Callable[[Array], Array],
    o_proj: Float[Array, "targets hidden"],
) -> Regression:
    """Of the rotated y' on the output."""
    return Regression(
        rotated(rotated(plain.gram).T),
        rotated(plain.cross @ o_proj),
        rotated(drift.cross),
        rotated(plain.input_sum),
        plain.target_sum @ o_proj,
        drift.drift_sum,
        drift.tokens[0],
    )


def _rotated(bases: Float[Array, "heads v width"], rows: Float[Array, "inputs ..."]) -> Float[Array, "outputs ..."]:
    """Rows that belong to the channels of heads side by side, in each head's basis."""
    heads, v, _ = bases.shape
    parts = jnp.einsum("hvw,hv...->hw...", bases, rows.reshape(heads, v, *rows.shape[1:]))
    return parts.reshape(-1, *rows.shape[1:])
