"""The dense model's own residual stream beside the pruned one, and how far modules are from it (docs/method.md 6.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.calibrate.lanes import lanes
from intraslice_jax.calibrate.statistics import DriftMoments, GramMoments, MapMoments
from intraslice_jax.config import ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import Block
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.linalg import fits_one_device
from intraslice_jax.parallel.moments import Moments, MomentSum


def held_out_windows(samples: int, config: PruneConfig) -> int:
    """How many of so many calibration windows are held out; 0 without dense targets, which the baselines never have."""
    wanted = config.dense_targets > 0 and config.method == PruneConfig.method
    return held_out_count(samples) if wanted else 0


def check_dense_targets(model: ModelConfig, samples: int, config: PruneConfig, mesh: Mesh | None) -> None:
    """Raises InputError where dense targets are asked for that this run cannot have."""
    held_out = held_out_windows(samples, config)
    if not held_out:
        return
    if samples <= held_out:
        raise InputError("dense_targets holds windows out and needs at least 2; raise `samples`, or give 0")
    widest = max(shape.intermediate_size for shape in model.layers)
    if mesh is not None and not fits_one_device(widest):
        raise InputError(
            f"dense_targets needs the Gram matrix of {widest} channels on one device, where it does not fit; give 0"
        )


@dataclass
class DenseStream:
    """The calibration set in the dense model, behind the module that is pruned next.

    Attributes:
        batches: as those of the pruned stream: between two layers what enters the next one, [batch, seq, hidden] each.
    """

    batches: list[Array]
    _sources: list[Array | None] = field(default_factory=list)

    def attend(self, block: Block, rope: RopeTable) -> None:
        """Goes on behind the attention of a dense layer."""
        parallel = block.post_norm is None
        self._sources = list(self.batches) if parallel else [None] * len(self.batches)
        self.batches = [statistics.attend(block, x, rope) for x in self.batches]

    def finish(self, block: Block) -> None:
        """Goes on behind the MLP of the same layer."""
        pairs = zip(self.batches, self._sources, strict=True)
        self.batches = [statistics.finish_layer(block, after, source) for after, source in pairs]
        self._sources = []


class Drift(NamedTuple):
    """Moments of a module's inputs against its drift: the dense stream behind it, less what it gives unpruned.

    Attributes:
        whole: on all windows.
        held: on those that are held out.
        held_plain: the module's other moments on these.
    """

    whole: DriftMoments
    held: DriftMoments
    held_plain: MapMoments | GramMoments


class SplitSum(Generic[Moments]):
    """A `MomentSum` of all batches, which tells what the last ones of them give apart. Each lane adds to its own.

    Args:
        empty: makes zeros.
        mesh: as for `MomentSum`.
        batches: how many there are.
        held_out: how many of them, the last ones, are summed apart.
    """

    def __init__(self, empty: Callable[[], Moments], mesh: Mesh | None, batches: int, held_out: int = 0) -> None:
        def sums() -> list[MomentSum[Moments]]:
            return [MomentSum(empty(), mesh) for _ in range(min(lanes(mesh), batches))]

        self._first, self._held = sums(), sums() if held_out else None
        self._until = batches - held_out

    def of(self, batch: int) -> MomentSum[Moments]:
        """To which a batch is to be added."""
        sums = self._first if self._held is None or batch < self._until else self._held
        return sums[batch % len(sums)]

    def totals(self, split: bool = False) -> tuple[Moments, Moments | None]:
        """The sums over all batches, and over those held out if there are any; `split` as in `MomentSum.total`."""
        first = _added(self._first, split)
        if self._held is None:
            return first, None
        held = _added(self._held, split)
        return jax.tree.map(jnp.add, first, held), held


def _added(sums: list[MomentSum[Moments]], split: bool) -> Moments:
    first, *others = (one.total(split) for one in sums)
    # Only a CPU has several: NumPy adds them where they lie, and compiles nothing.
    return jax.tree.map(lambda *parts: jax.device_put(sum(map(np.asarray, parts))), first, *others) if others else first
