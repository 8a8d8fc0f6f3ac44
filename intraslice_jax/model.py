"""A model with all that travels with it, in memory or still in its files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from intraslice_jax.config import ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import Decoder, abstract_arrays, decoder_from_arrays, decoder_to_arrays
from intraslice_jax.models.streamed import StreamedDecoder
from intraslice_jax.parallel.mesh import is_shared
from intraslice_jax.parallel.placement import LocalParts, mesh_of, put_parts, put_weights
from intraslice_jax.parallel.rules import weight_shardings


@dataclass(frozen=True)
class LanguageModel:
    """A decoder, its description, its tokenizer, and where it came from.

    Attributes:
        name: what the user named to get it (a folder, a hub id, a file).
        generation_config: the original's generation settings (stop tokens, sampling), for exports.
        report: what the pruning run recorded, empty for an unpruned model.
    """

    config: ModelConfig
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    generation_config: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return _described(self, str(self.decoder.embed_tokens[...].dtype))

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or an InputError that says how to add one."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer; put the model's tokenizer.json and tokenizer_config.json beside it"
            )
        return self.tokenizer


@dataclass(frozen=True)
class StoredModel:
    """A model whose arrays are read when they are asked for: what is converted file to file need not fit memory.

    Attributes:
        arrays: NumPy arrays by dotted path; every access reads the array anew.
        dtype: the name of the weights' dtype.
        mesh: where several processes put the arrays that they write together.
        config, tokenizer, name, generation_config, report: as in `LanguageModel`.
    """

    config: ModelConfig
    arrays: Mapping[str, Any]
    dtype: str
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    generation_config: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        return _described(self, self.dtype)

    def in_memory(self, mesh: Mesh | None = None) -> LanguageModel:
        """Reads all arrays onto the default device, or onto a mesh."""
        if mesh is None:
            arrays = {path: jnp.asarray(self.arrays[path]) for path in self.arrays}
        else:
            shapes = self._shapes()
            shardings = weight_shardings(shapes, mesh)
            arrays = {
                path: put_parts(self.arrays, path, shapes[path], sharding) for path, sharding in shardings.items()
            }
        return self._with(decoder_from_arrays(self.config, arrays))

    def streamed(self, mesh: Mesh | None = None, host: bool = False) -> LanguageModel:
        """A model whose layers come to the default device, or a mesh, when they are used.

        Args:
            mesh: where to; None for one device.
            host: read all arrays into host memory once, instead of each from its file whenever it is used. Of
                several processes each has the parts of its own devices there.
        """
        arrays = self.arrays
        if host and is_shared(mesh):
            shapes = self._shapes()
            arrays = LocalParts.read(arrays, shapes, weight_shardings(shapes, mesh, quiet=True))
        elif host:
            arrays = {path: arrays[path] for path in arrays}
        return self._with(StreamedDecoder(self.config, arrays, mesh))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Paths and arrays, one after the other; on the mesh where that is of several processes."""
        if not is_shared(self.mesh):
            yield from ((path, self.arrays[path]) for path in self.arrays)
            return
        shapes = self._shapes()
        for path, sharding in weight_shardings(shapes, self.mesh, quiet=True).items():
            yield path, put_parts(self.arrays, path, shapes[path], sharding)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(array.shape) for path, array in abstract_arrays(self.config).items()}

    def _with(self, decoder: Decoder) -> LanguageModel:
        return LanguageModel(self.config, decoder, self.tokenizer, self.name, self.generation_config, self.report)


def _described(model: LanguageModel | StoredModel, dtype: str) -> str:
    """A model in two lines, three if it was pruned."""
    config, removed = model.config, model.report.get("removed_block_fraction")
    lines = [
        f"{type(model).__name__} {model.name!r}",
        f"{config.model_type}: {config.total_parameters():,} parameters, {config.num_layers} layers, {dtype}",
    ]
    if removed is not None:
        lines.append(f"pruned: {removed:.1%} of the attention and MLP parameters are gone")
    return "\n  ".join(lines)


def as_stored(model: LanguageModel | StoredModel) -> LanguageModel | StoredModel:
    """A streamed model as what it is streamed from, so that it is written array by array; others as they are."""
    if isinstance(model, StoredModel) or not isinstance(model.decoder, StreamedDecoder):
        return model
    dtype = str(model.decoder.embed_tokens[...].dtype)
    facts = (model.tokenizer, model.name, model.generation_config, model.report, model.decoder.mesh)
    return StoredModel(model.config, model.decoder.arrays, dtype, *facts)


def on_mesh(model: LanguageModel, mesh: Mesh | None) -> LanguageModel:
    """The model with its weights spread over a mesh; without one, and if it lies there already, as it is."""
    if mesh is None or all(mesh_of(leaf) == mesh for leaf in jax.tree.leaves(model.decoder)):
        return model
    if isinstance(model.decoder, StreamedDecoder):
        return dataclasses.replace(model, decoder=StreamedDecoder(model.config, model.decoder.arrays, mesh))
    arrays = put_weights(decoder_to_arrays(model.decoder), mesh)
    return dataclasses.replace(model, decoder=decoder_from_arrays(model.config, arrays))
