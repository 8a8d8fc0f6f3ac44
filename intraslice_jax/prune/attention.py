"""Attention: which heads stay, how wide, on which RoPE pairs and in which value basis (docs/method.md section 2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.statistics import AttentionMoments, MapMoments
from intraslice_jax.config import LayerShape
from intraslice_jax.prune.compensation import Compensation, Sums, relative_error, ridge
from intraslice_jax.prune.linalg import eigh_descending, to_solver
from intraslice_jax.prune.method import PrunedAttention


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
        gram = to_solver(head_gram)
        norms = jnp.square(to_solver(o_proj)).sum(-1)
        self.channel_scores = np.asarray(norms * jnp.diagonal(gram, axis1=1, axis2=2))
        self.total = self.channel_scores.sum(1)
        spectra = np.asarray(eigh_descending(gram)[0])
        # A head that is never attended to has no spectrum and no energy.
        shares = spectra / np.maximum(spectra.sum(1, keepdims=True), np.finfo(np.float64).tiny)
        self.cumulative = np.concatenate([np.zeros((len(shares), 1)), np.cumsum(shares, 1)], 1)

    def of(self, heads: np.ndarray, width: int) -> np.ndarray:
        """E_h(width) of the given heads."""
        return self.total[heads] * self.cumulative[heads, width]


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


def even_width(kept_channels: int, heads: int, full: int) -> int:
    """The even width nearest to an equal share of the channels, of two equally near ones the wider."""
    return max(2, min(2 * math.floor(kept_channels / heads / 2 + 0.5), full))


def plan_widths(width: int, shape: LayerShape) -> tuple[int, int]:
    """Rotated and other query/key channels of a head of a common width, in the proportion they had."""
    width = min(width, shape.qk_head_dim)
    rest = shape.qk_head_dim - shape.rotary_dim
    pairs = math.floor(width * shape.rotary_dim / shape.qk_head_dim / 2 + 0.5)
    rotary = min(max(2 * pairs, width - rest), shape.rotary_dim, width - width % 2)
    return rotary, width - rotary


class QueryKeyMaps(NamedTuple):
    """What queries and keys of each kept KV head are multiplied with, after RoPE (docs/method.md 2.2)."""

    query: Float[Array, "kv qk width"]
    key: Float[Array, "kv qk width"]
    pairs: Int[np.ndarray, "kv pairs"]
    """Kept RoPE pairs, ascending, numbered as in the layer before pruning."""


def query_key_maps(moments: AttentionMoments, plan: AttentionPlan, shape: LayerShape) -> QueryKeyMaps:
    """Selects the best RoPE pairs of each group, and projects what is not rotated (docs/method.md 2.2)."""
    pairs = select_pairs(np.asarray(moments.pair_scores), plan, shape.rotary_dim)
    half, rest = shape.rotary_dim // 2, shape.qk_head_dim - shape.rotary_dim
    channels = np.concatenate([pairs, pairs + half], 1)
    selection = np.zeros((len(pairs), shape.qk_head_dim, plan.qk_width))
    np.put_along_axis(selection[..., : plan.rotary_width], channels[:, None], 1.0, 1)  # column j picks channels[:, j]
    query = key = jnp.asarray(selection)
    if plan.rest_width:
        to_kv = np.asarray(plan.query_to_kv)
        query_gram = to_solver(moments.rest_query_gram)[np.asarray(plan.heads)]
        groups = jnp.stack([query_gram[to_kv == kv].sum(0) for kv in plan.kv_heads])
        keys = to_solver(moments.rest_key_gram)[np.asarray(plan.kv_heads)]
        left, right = (
            (jnp.broadcast_to(jnp.eye(rest), groups.shape),) * 2
            if plan.rest_width == rest
            else product_bases(groups, keys, plan.rest_width)
        )
        query = query.at[:, shape.rotary_dim :, plan.rotary_width :].set(left)
        key = key.at[:, shape.rotary_dim :, plan.rotary_width :].set(right)
    return QueryKeyMaps(query, key, pairs)


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


def product_bases(
    query_gram: Float[Array, "kv rest rest"], key_gram: Float[Array, "kv rest rest"], width: int
) -> tuple[Float[Array, "kv rest width"], Float[Array, "kv rest width"]]:
    """Maps A, B for which Q A (K B)^T is the best approximation of Q K^T of rank `width`.

    With Q = U_q C_q^1/2 and K = U_k C_k^1/2 the truncated SVD of C_q^1/2 C_k^1/2 is that of Q K^T.
    """
    (root_q, inverse_q), (root_k, inverse_k) = _roots(query_gram), _roots(key_gram)
    left, values, right = jnp.linalg.svd(root_q @ root_k)
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


def value_bases(kept_gram: Float[Array, "inputs inputs"], plan: AttentionPlan) -> Float[Array, "kv v width"]:
    """Principal directions of each group's y' (docs/method.md 2.3).

    Args:
        kept_gram: second moment of the kept heads' y', [kept heads * v, kept heads * v].
        plan: which heads belong together.
    """
    heads = len(plan.heads)
    v = len(kept_gram) // heads
    blocks = kept_gram.reshape(heads, v, heads, v)[jnp.arange(heads), :, jnp.arange(heads)]
    groups = jnp.stack([blocks[np.asarray(plan.query_to_kv) == kv].sum(0) for kv in plan.kv_heads])
    return eigh_descending(groups)[1][:, :, : plan.v_width]


def fuse_attention(
    arrays: Mapping[str, Array],
    shape: LayerShape,
    plan: AttentionPlan,
    maps: QueryKeyMaps,
    moments: MapMoments,
    tokens: int,
    damping: float,
) -> PrunedAttention:
    """Small attention weights: query/key maps, value basis and ridge map fused (docs/method.md 2.2, 2.3).

    Args:
        arrays: the module's weights by name (`q_proj` [hidden, heads, qk], ...).
        shape: the layer before pruning.
        plan: kept heads and widths.
        maps: of the queries and keys of each kept KV head.
        moments: of the kept heads' y' against the full y.
        tokens: how many tokens the moments sum over.
        damping: relative ridge damping.
    """
    heads, kv_heads, local = list(plan.heads), list(plan.kv_heads), list(plan.local_query_to_kv)
    gram, cross = to_solver(moments.gram), to_solver(moments.cross)
    basis = value_bases(gram, plan)
    rotation = _block_diagonal(basis[jnp.asarray(local)])
    o_proj = to_solver(arrays["o_proj"]).reshape(-1, arrays["o_proj"].shape[-1])

    sums = None
    if "o_bias" in arrays:
        sums = Sums(to_solver(moments.input_sum) @ rotation, to_solver(moments.target_sum), tokens)
    gram, cross = rotation.T @ gram @ rotation, rotation.T @ cross
    fit: Compensation = ridge(gram, cross, damping, sums)
    error = relative_error(fit, gram, cross, to_solver(moments.target_gram), o_proj, sums)

    kept_q, kept_kv, to_kv = jnp.asarray(heads), jnp.asarray(kv_heads), jnp.asarray(local)
    new = {"o_proj": (fit.weights @ o_proj).reshape(len(heads), plan.v_width, -1)}
    for name, kept, head_maps in (("q", kept_q, maps.query[to_kv]), ("k", kept_kv, maps.key), ("v", kept_kv, basis)):
        new[f"{name}_proj"] = jnp.einsum("dhk,hkw->dhw", to_solver(arrays[f"{name}_proj"][:, kept]), head_maps)
        if f"{name}_bias" in arrays:
            new[f"{name}_bias"] = jnp.einsum("hk,hkw->hw", to_solver(arrays[f"{name}_bias"][kept]), head_maps)
    new["rope_pairs"] = jnp.take_along_axis(arrays["rope_pairs"][kept_kv], jnp.asarray(maps.pairs), 1)
    if fit.offset is not None:
        new["o_bias"] = to_solver(arrays["o_bias"]) + fit.offset @ o_proj
    return PrunedAttention(new, plan.shape_of(shape), plan.heads, error, {"solver": fit.method})


def _block_diagonal(blocks: Float[Array, "heads v width"]) -> Float[Array, "inputs outputs"]:
    heads, v, width = blocks.shape
    full = jnp.zeros((heads, v, heads, width), blocks.dtype)
    full = full.at[jnp.arange(heads), :, jnp.arange(heads)].set(blocks)
    return full.reshape(heads * v, heads * width)
