"""Sums over the calibration set: each device adds up its own sequences, and a module's sums meet once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from intraslice_jax.parallel.mesh import DATA, MODEL, ways
from intraslice_jax.parallel.rules import RULES, partition

Moments = TypeVar("Moments")

Split = int | tuple[int, ...]
"""One argument's index, or those of several."""


class MomentSum(Generic[Moments]):
    """A named tuple of float32 sums over all sequences.

    Without a mesh the steps run as they are. On a mesh the sums have a leading axis over `data`, one entry per
    device row, to which the step's result on that row's sequences is added without any communication over `data`;
    `total` adds the rows up in one collective.

    Args:
        empty: zeros.
        mesh: with the axis `data`, or None.
    """

    def __init__(self, empty: Moments, mesh: Mesh | None) -> None:
        self._mesh = mesh
        self._moments = empty if mesh is None else _zeros(empty, mesh)

    def add(self, step: Callable[..., Moments], real: int, split: Split, *args: Any, **statics: Hashable) -> None:
        """Adds a batch: `step(moments, *args, **statics)` returns the moments with it.

        Args:
            step: jitted, for example from `intraslice_jax.calibrate.statistics`.
            real: how many of the batch's sequences count, see `intraslice_jax.parallel.batches`.
            split: which of the arguments are of the batch, split over `data`; the others are the same on every row.
            args: arrays.
            statics: what the step is compiled for.
        """
        if self._mesh is None:
            self._moments = step(self._moments, *args, **statics)
        else:
            self._moments = self._on_mesh(step, real, split, args, statics, False)[0]

    def add_and_pass(
        self, step: Callable[..., tuple[Any, ...]], real: int, split: Split, *args: Any, **statics: Hashable
    ) -> tuple[Any, ...]:
        """`add` for a step that returns activations behind the moments; they are passed on, split like the batch."""
        if self._mesh is None:
            self._moments, *out = step(self._moments, *args, **statics)
        else:
            self._moments, *out = self._on_mesh(step, real, split, args, statics, True)
        return tuple(out)

    def block_until_ready(self) -> MomentSum[Moments]:
        """Waits for what was added so far."""
        jax.block_until_ready(self._moments)
        return self

    def _on_mesh(
        self,
        step: Callable[..., Any],
        real: int,
        split: Split,
        args: tuple[Any, ...],
        statics: Mapping[str, Hashable],
        passes: bool,
    ) -> tuple[Any, ...]:
        batch = jax.tree.leaves([args[i] for i in _indices(split)])[0]
        partial = None if real == len(batch) else jnp.asarray(real, jnp.int32)  # a full batch needs no mask
        return add_on_mesh(
            step, self._mesh, split, tuple(sorted(statics.items())), passes, self._moments, partial, args
        )

    def total(self, split: bool = False) -> Moments:
        """The sums, whole, on one device of every process; or with `split` row by row on the devices of the mesh."""
        if self._mesh is None:
            return self._moments
        total = reduce_over_data(self._moments, self._mesh, split)
        return total if split else jax.tree.map(lambda array: array.addressable_data(0), total)


def _indices(split: Split) -> tuple[int, ...]:
    return (split,) if isinstance(split, int) else split


def _zeros(empty: Moments, mesh: Mesh) -> Moments:
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((ways(mesh), *a.shape), a.dtype), empty)
    shardings = jax.tree.map(lambda a: moment_sharding(a.shape, mesh), stacked)
    return jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stacked), out_shardings=shardings)()


def moment_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Of a sum with the leading axis over `data`: its own rows over `model`, where they divide."""
    logical = ("batch", "rows", *(None for _ in shape[2:]))
    return NamedSharding(mesh, partition(logical, shape, mesh.shape, RULES)[0])


@functools.partial(jax.jit, static_argnames=("step", "mesh", "split", "statics", "passes"), donate_argnames="moments")
def add_on_mesh(
    step: Callable[..., Any],
    mesh: Mesh,
    split: Split,
    statics: tuple[tuple[str, Hashable], ...],
    passes: bool,
    moments: Any,
    real: Array | None,
    args: tuple[Any, ...],
) -> tuple[Any, ...]:
    """One batch: the stacked moments with it, then what the step passes on.

    Only `data` is handled by hand; the compiler splits the step over `model` as the weights are split.
    """

    def on_row(moments: Any, real: Array | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
        old = jax.tree.map(lambda a: a[0], moments)
        result = step(old, *args, **dict(statics))
        new, *out = result if passes else (result,)
        if real is not None:
            # A last batch has one sequence per device row, and the rows behind the real ones hold copies.
            counts = jax.lax.axis_index(DATA) < real
            new = jax.tree.map(lambda n, o: jnp.where(counts, n, o), new, old)
        return jax.tree.map(lambda a: a[None], new), *out

    rows, whole = PartitionSpec(DATA), PartitionSpec()
    specs = tuple(rows if i in _indices(split) else whole for i in range(len(args)))
    sharded = jax.shard_map(
        on_row, mesh=mesh, in_specs=(rows, whole, specs), out_specs=rows, axis_names={DATA}, check_vma=False
    )
    new, *out = sharded(moments, real, args)
    shardings = jax.tree.map(lambda a: moment_sharding(a.shape, mesh), new)
    return jax.lax.with_sharding_constraint(new, shardings), *out


@functools.partial(jax.jit, static_argnames=("mesh", "split"))
def reduce_over_data(moments: Moments, mesh: Mesh, split: bool = False) -> Moments:
    """Stacked moments added up, whole on every device, or with `split` their rows where they divide."""

    def add_up(array: Array) -> Array:
        rows = (DATA, MODEL) if split and array.shape[1] % mesh.size == 0 else None
        return jax.lax.with_sharding_constraint(array.sum(0), NamedSharding(mesh, PartitionSpec(rows)))

    return jax.tree.map(add_up, moments)
