"""A decoder whose layers are fetched when they are used, the next one while this one computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from intraslice_jax.config import ModelConfig
from intraslice_jax.models.decoder import Block, Decoder, abstract_arrays, block_from_arrays, decoder_from_arrays
from intraslice_jax.parallel.placement import put_parts, read_part
from intraslice_jax.parallel.rules import weight_shardings


class StreamedDecoder(Decoder):
    """A `Decoder` that holds its embedding, final norm and head, and at most two of its layers.

    To jax's functions on trees it has no layers: pass blocks, not the decoder, to compiled functions.

    Attributes:
        arrays: all arrays of the model by dotted path, each read when it is asked for.
        mesh: where the arrays that are in use lie; None for one device.
    """

    def __init__(self, config: ModelConfig, arrays: Mapping[str, Any], mesh: Mesh | None = None):
        bare = config.with_layers(())
        shell = decoder_from_arrays(bare, fetch(arrays, abstract_arrays(bare), mesh))
        self.config = config
        self.embed_tokens = shell.embed_tokens
        self.layers = StreamedLayers(config, arrays, mesh)
        self.norm = shell.norm
        self.lm_head = shell.lm_head
        self.lm_head_bias = shell.lm_head_bias

    @property
    def arrays(self) -> Mapping[str, Any]:
        return self.layers.arrays

    @property
    def mesh(self) -> Mesh | None:
        return self.layers.mesh


class StreamedLayers(Sequence[Block]):
    """The layers of a stored model. Asking for one starts to fetch the next in the direction of travel.

    With several processes each reads ahead for itself; what a thread does must not wait for the others, whose main
    programs may be in another collective.
    """

    def __init__(self, config: ModelConfig, arrays: Mapping[str, Any], mesh: Mesh | None = None):
        self.arrays, self.mesh = arrays, mesh
        self._config = config
        self._abstract: list[dict[str, jax.ShapeDtypeStruct]] = [{} for _ in config.layers]
        for path, abstract in abstract_arrays(config).items():
            if path.startswith("layers."):
                self._abstract[int(path.split(".")[1])][path] = abstract
        self._thread = ThreadPoolExecutor(1, "layers")
        self._next: tuple[int, Future[Block]] | None = None
        self._last = -1

    def __len__(self) -> int:
        return len(self._config.layers)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        if isinstance(index, slice):
            raise TypeError("a slice would hold several layers; ask for one at a time")
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        ahead, self._next = self._next, None
        # A prefetched layer that nobody asked for goes before another comes.
        block = ahead[1].result() if ahead is not None and ahead[0] == index else None
        del ahead
        block = self._fetch(index) if block is None else block
        following = index - 1 if index < self._last else index + 1
        self._last = index
        if 0 <= following < len(self):
            self._next = following, self._thread.submit(self._fetch, following)
        return block

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def __reversed__(self) -> Iterator[Block]:
        self._last = len(self)
        return (self[i] for i in reversed(range(len(self))))

    def _fetch(self, index: int) -> Block:
        prefix = f"layers.{index}."
        arrays = fetch(self.arrays, self._abstract[index], self.mesh)
        named = {path.removeprefix(prefix): array for path, array in arrays.items()}
        return block_from_arrays(self._config, self._config.layers[index], named)


class LayeredArrays(Mapping[str, Any]):
    """Arrays of a model whose layers are somewhere else than the rest.

    Args:
        rest: embedding, final norm and head are taken from it.
        layers: of each layer the arrays, by their names within it.
    """

    def __init__(self, rest: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]):
        self._rest, self._layers = rest, layers
        self._paths = [path for path in rest if not path.startswith("layers.")]
        self._paths += [f"layers.{i}.{name}" for i, layer in enumerate(layers) for name in layer]

    def __getitem__(self, path: str) -> Any:
        arrays, name = self._place(path)
        return arrays[name]

    def part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[path][index]`, for which only that part is read where it is stored so."""
        return read_part(*self._place(path), index)

    def _place(self, path: str) -> tuple[Mapping[str, Any], str]:
        """The arrays that have it, and its name there."""
        if not path.startswith("layers."):
            return self._rest, path
        _, index, name = path.split(".", 2)
        return self._layers[int(index)], name

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def fetch(arrays: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None) -> dict[str, Array]:
    """The stored arrays of the paths of `wanted`, on the default device or where the mesh wants them."""
    if mesh is None:
        return {path: jnp.asarray(arrays[path]) for path in wanted}
    shapes = {path: abstract.shape for path, abstract in wanted.items()}
    shardings = weight_shardings(shapes, mesh, quiet=True)
    return {path: put_parts(arrays, path, shapes[path], sharding) for path, sharding in shardings.items()}
