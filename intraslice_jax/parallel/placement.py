"""Putting arrays on the mesh, and getting them back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from intraslice_jax.errors import InputError
from intraslice_jax.parallel.mesh import DATA, ways
from intraslice_jax.parallel.rules import RULES, AxisRules, weight_shardings

Tree = TypeVar("Tree")


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a module lie on; None for one device, and while a program is traced."""
    leaf = jax.tree.leaves(tree)[0]
    # Tracers have no sharding of their own.
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def put(array: np.ndarray | Array, sharding: NamedSharding) -> Array:
    """The array on the mesh; every process gives the whole of it and copies only its parts to its devices."""
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@runtime_checkable
class ReadsParts(Protocol):
    """Stored arrays of which a part can be read without the rest."""

    def part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """`arrays[path][index]`."""
        ...


def read_part(arrays: Mapping[str, Any], path: str, index: tuple[slice, ...]) -> np.ndarray:
    """`arrays[path][index]`, for which only that part is read where the storage allows that."""
    return arrays.part(path, index) if isinstance(arrays, ReadsParts) else np.asarray(arrays[path])[index]


def put_parts(arrays: Mapping[str, Any], path: str, shape: tuple[int, ...], sharding: NamedSharding) -> Array:
    """A stored array on the mesh; every process reads its parts alone where the storage allows that.

    It does not wait for the other processes, so a thread may do it while they are elsewhere.
    """
    if not isinstance(arrays, ReadsParts):
        return put(arrays[path], sharding)
    parts = _own_parts(arrays, path, shape, sharding)
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[_bounds(index, shape)])


_Bounds = tuple[tuple[int, int], ...]
"""Where a part of an array begins and ends along each of its axes."""


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> _Bounds:
    whole = tuple(slice(None) for _ in shape)
    return tuple(part.indices(size)[:2] for part, size in zip(index or whole, shape, strict=True))


def _own_parts(
    arrays: Mapping[str, Any], path: str, shape: tuple[int, ...], sharding: NamedSharding
) -> dict[_Bounds, np.ndarray]:
    """What the devices of this process hold of an array. A part that several of them hold is read once."""
    indices = {_bounds(index, shape): index or () for index in sharding.addressable_devices_indices_map(shape).values()}
    return {bounds: read_part(arrays, path, index) for bounds, index in indices.items()}


class LocalParts(Mapping[str, np.ndarray]):
    """Arrays in host memory of which a process has only what its devices hold; see `read` and `of`.

    Asking for more raises InputError.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, dict[_Bounds, np.ndarray]]):
        self._shapes, self._parts = shapes, parts

    @classmethod
    def read(
        cls, arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shardings: Mapping[str, NamedSharding]
    ) -> LocalParts:
        """Of stored arrays by dotted path, given where they will be put."""

        def own(path: str) -> dict[_Bounds, np.ndarray]:
            found = _own_parts(arrays, path, shapes[path], shardings[path])
            return {bounds: np.array(part) for bounds, part in found.items()}  # no view of a file

        return cls(dict(shapes), {path: own(path) for path in shardings})

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> LocalParts:
        """Of arrays on the mesh by dotted path."""
        return cls(
            {path: array.shape for path, array in arrays.items()},
            {
                path: {_bounds(s.index, array.shape): np.asarray(s.data) for s in array.addressable_shards}
                for path, array in arrays.items()
            },
        )

    def part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[path][index]`."""
        bounds = _bounds(index, self._shapes[path])
        if bounds not in self._parts[path]:
            raise InputError(
                f"{path}: this process holds the parts of its own devices, not {list(bounds)}; use the mesh that the "
                "model was loaded for"
            )
        return self._parts[path][bounds]

    def __getitem__(self, path: str) -> np.ndarray:
        return self.part(path, ())

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def put_weights(
    arrays: Mapping[str, Any], mesh: Mesh, rules: AxisRules = RULES, quiet: bool = False
) -> dict[str, Array]:
    """Arrays by dotted path where the rules want them."""
    shardings = weight_shardings({path: tuple(array.shape) for path, array in arrays.items()}, mesh, rules, quiet)
    return {path: put(arrays[path], sharding) for path, sharding in shardings.items()}


def replicated(tree: Tree, mesh: Mesh | None) -> Tree:
    """Arrays that every process has, whole on every device; as they are without a mesh."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda array: put(array, sharding), tree)


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Sequences over the axis `data`, or whole on every device where they do not divide."""
    return NamedSharding(mesh, PartitionSpec(DATA if rows % ways(mesh) == 0 else None))


def put_batch(tokens: Shaped[np.ndarray, "batch seq"], mesh: Mesh | None) -> Shaped[Array, "batch seq"]:
    """Token windows, or a number per token, each window on the devices that compute with it."""
    return jnp.asarray(tokens) if mesh is None else put(tokens, batch_sharding(mesh, len(tokens)))


def embed_rows(
    table: Float[Array, "vocab hidden"], tokens: Int[Array, "batch seq"]
) -> Float[Array, "batch seq hidden"]:
    """Rows of an embedding; from a table on a mesh they come split like a batch of sequences."""
    mesh = mesh_of(table)
    if mesh is None:
        return table[tokens]
    return _embed_rows(table, tokens, batch_sharding(mesh, len(tokens)))


@functools.partial(jax.jit, static_argnames="sharding")
def _embed_rows(table: Array, tokens: Array, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(table[tokens], sharding)


def gathered(tree: Tree) -> Tree:
    """Weights ready for use: what only lies in parts along `data` is made whole, parts along `model` stay parts.

    A no-op, without copies, for weights on one device.
    """
    if mesh_of(tree) is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    wanted = tuple(NamedSharding(leaf.sharding.mesh, _without_data(leaf.sharding.spec)) for leaf in leaves)
    if all(leaf.sharding == sharding for leaf, sharding in zip(leaves, wanted, strict=True)):
        return tree
    return jax.tree.unflatten(treedef, _moved(wanted)(leaves))


def _without_data(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == DATA else axis for axis in spec))


@functools.lru_cache(maxsize=256)
def _moved(shardings: tuple[NamedSharding, ...]) -> Any:
    """One program that moves a list of arrays, so that their collectives can be joined."""
    return jax.jit(lambda leaves: leaves, out_shardings=list(shardings))


def to_host(array: Array) -> np.ndarray:
    """The whole array as NumPy; all processes must ask for it where it is spread over several."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def local(tree: Tree) -> Tree:
    """Arrays on a mesh as whole arrays on this process's own device; others as they are."""
    if mesh_of(tree) is None:
        return tree
    return jax.tree.map(lambda array: jnp.asarray(to_host(array)), tree)
