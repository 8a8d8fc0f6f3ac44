"""What each axis of each array means, and which mesh axis it is split over."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intraslice_jax.parallel.mesh import DATA, MODEL

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AxisRules:
    """The mesh axis that each logical axis is split over; None keeps it whole.

    Attributes:
        batch: sequences.
        hidden: the residual stream's width in weight matrices: FSDP.
        heads, kv_heads: query heads, key/value heads: tensor parallelism.
        inner: MLP channels, likewise.
        vocab: rows of the embedding and the head.
        rows: leading axis of second moments.
    """

    batch: str | None = DATA
    hidden: str | None = DATA
    heads: str | None = MODEL
    kv_heads: str | None = MODEL
    inner: str | None = MODEL
    vocab: str | None = MODEL
    rows: str | None = MODEL

    def in_use(self) -> AxisRules:
        """The rules for weights that are computed with: gathered over the axis that only stores them in parts."""
        return dataclasses.replace(self, hidden=None)


RULES = AxisRules()

_QUERY, _KEY_VALUE = ("hidden", "heads", None), ("hidden", "kv_heads", None)
LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": ("vocab", "hidden"),
    "lm_head": ("vocab", "hidden"),
    "lm_head_bias": ("vocab",),
    "q_proj": _QUERY,
    "k_proj": _KEY_VALUE,
    "v_proj": _KEY_VALUE,
    "o_proj": ("heads", None, "hidden"),
    "q_bias": ("heads", None),
    "k_bias": ("kv_heads", None),
    "v_bias": ("kv_heads", None),
    "rope_pairs": ("kv_heads", None),
    "gate_proj": ("hidden", "inner"),
    "up_proj": ("hidden", "inner"),
    "down_proj": ("inner", "hidden"),
    "gate_bias": ("inner",),
    "up_bias": ("inner",),
    # Vectors as wide as the residual stream: splitting them saves nothing worth a collective.
    "o_bias": (None,),
    "down_bias": (None,),
    "weight": (None,),
    "bias": (None,),
}
"""Logical axes by the last name of an array's path; `weight` and `bias` belong to norms."""


@dataclass(frozen=True)
class Dropped:
    """A logical axis that stays whole because the mesh axis does not divide it."""

    logical: str
    size: int
    mesh_axis: str
    ways: int


def partition(
    logical: tuple[str | None, ...], shape: tuple[int, ...], mesh_sizes: Mapping[str, int], rules: AxisRules = RULES
) -> tuple[PartitionSpec, tuple[Dropped, ...]]:
    """How an array is split, and what could not be because it does not divide.

    Args:
        logical: a name per axis of the array, or None.
        shape: of the array.
        mesh_sizes: by mesh axis.
        rules: which mesh axis is whose.
    """
    spec, dropped = [], []
    for name, size in zip(logical, shape, strict=True):
        axis = None if name is None else getattr(rules, name)
        if axis is not None and size % mesh_sizes[axis]:
            dropped.append(Dropped(str(name), size, axis, mesh_sizes[axis]))
            axis = None
        spec.append(axis)
    return PartitionSpec(*spec), tuple(dropped)


def weight_shardings(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, rules: AxisRules = RULES, quiet: bool = False
) -> dict[str, NamedSharding]:
    """Where each array of a model lies, by dotted path; one line in the log says what is kept whole.

    Args:
        shapes: by dotted path.
        mesh: with the axes `data` and `model`.
        rules: which mesh axis is whose.
        quiet: without that line.
    """
    shardings, dropped = {}, []
    for path, shape in shapes.items():
        spec, whole = partition(LOGICAL_AXES[path.rpartition(".")[2]], shape, mesh.shape, rules)
        shardings[path] = NamedSharding(mesh, spec)
        dropped += whole
    if dropped and not quiet:
        log.warning("kept whole on every device: %s", describe(dropped))
    return shardings


def describe(dropped: Iterable[Dropped]) -> str:
    """What is kept whole, in words: each case once, with its number of arrays."""
    counts: dict[Dropped, int] = {}
    for each in dropped:
        counts[each] = counts.get(each, 0) + 1
    return "; ".join(
        f"{d.logical} of {d.size} in {n} arrays, not a multiple of {d.mesh_axis}={d.ways}" for d, n in counts.items()
    )
