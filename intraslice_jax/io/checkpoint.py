"""Checkpoints: Orbax for the arrays, JSON for everything a person wants to read.

A checkpoint is a folder:

    config.json        format and version, the ModelConfig, the model's name and generation settings
    report.json        what the pruning run recorded, {} for an unpruned model
    state/             Orbax: a flat dictionary from dotted path to array
    SHA256SUMS         digests of the files in state/
    tokenizer*         as transformers saves them
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp
from pydantic import ConfigDict
from typing_extensions import TypedDict

from intraslice_jax.config import ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.io.digests import check_digests, write_digests
from intraslice_jax.io.streaming import StreamedArrays, not_empty, settled, stored_shapes, write_failure, write_streamed
from intraslice_jax.model import LanguageModel, StoredModel, as_stored
from intraslice_jax.models.decoder import abstract_arrays, decoder_to_arrays
from intraslice_jax.parallel.distributed import is_first, shared_folder
from intraslice_jax.reading import read_json
from intraslice_jax.report.schema import StoredReport

FORMAT = "intraslice-checkpoint"
VERSION = 1
ADVICE = "write or copy the checkpoint again"


class Marked(TypedDict):
    """What every version has in its config.json."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    format: Literal["intraslice-checkpoint"]
    format_version: int


class Description(Marked):
    """The config.json of this version; `model` is what `ModelConfig.from_json` reads."""

    name: str
    dtype: Literal["float32", "bfloat16", "float16"]
    model: dict[str, Any]
    generation_config: dict[str, Any]


class Origin(TypedDict):
    """What Orbax keeps with the arrays: the config.json that was written with them."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    description: dict[str, Any]


class Written(TypedDict):
    """The part of Orbax's own description that matters here."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    custom_metadata: Origin


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder was written by `save`."""
    try:
        return read_json(Path(path) / "config.json", dict[str, Any]).get("format") == FORMAT
    except InputError:
        return False


def save(model: LanguageModel | StoredModel, path: str | Path, overwrite: bool = False) -> Path:
    """Writes a checkpoint; the folder appears under its name only when complete.

    Args:
        model: in memory; or stored elsewhere, then its arrays are read and written one after the other.
        path: the folder.
        overwrite: replace a folder that exists.

    Raises:
        InputError: `path` exists and `overwrite` is False, or a stored model is damaged.
        RunError: it cannot be written.
    """
    model = as_stored(model)
    stored = isinstance(model, StoredModel)
    description = {
        "format": FORMAT,
        "format_version": VERSION,
        "name": model.name,
        "dtype": model.dtype if stored else str(model.decoder.embed_tokens[...].dtype),
        "model": model.config.to_json(),
        "generation_config": model.generation_config,
        "versions": versions(),
    }
    with shared_folder(path, overwrite) as folder:
        metadata = {"description": description, "report": json.loads(json.dumps(model.report))}
        state = folder.absolute() / "state"
        try:
            if stored:
                write_streamed(state, model.items(), abstract_arrays(model.config, model.dtype), metadata)
            else:
                with settled():
                    ocp.save(str(state), not_empty(decoder_to_arrays(model.decoder)), custom_metadata=metadata)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, InputError) else write_failure(Path(path), error) from error
        if is_first():
            write_json(folder / "config.json", description)
            write_json(folder / "report.json", model.report)
            write_digests(folder, "state")
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
    return Path(path)


def restore(path: str | Path, mesh: Mesh | None = None) -> LanguageModel:
    """Reads what `save` wrote, on whatever devices, onto one device or a mesh.

    Raises:
        InputError: the folder is no checkpoint of this program, or is damaged.
    """
    return open_checkpoint(path).in_memory(mesh)


def open_checkpoint(path: str | Path, dtype: str | None = None) -> StoredModel:
    """`restore` without reading the arrays: they come one at a time, as they are asked for.

    Args:
        path: the folder.
        dtype: of the arrays when they come, None for their own.

    Raises:
        InputError: the folder is no checkpoint of this program, or is damaged.
    """
    path = Path(path)
    if not is_checkpoint(path):
        raise InputError(f"{path} is not a checkpoint of this program (no config.json with format {FORMAT!r})")
    marked = read_json(path / "config.json", Marked, ADVICE)
    if marked["format_version"] != VERSION:
        raise InputError(
            f"{path} has checkpoint version {marked['format_version']}, this program reads {VERSION}; "
            "use the version of the program that wrote it"
        )
    description = read_json(path / "config.json", Description, ADVICE)
    report = dict[str, Any](read_json(path / "report.json", StoredReport, ADVICE))
    if is_first():  # the others read no more than their parts of the weights
        check_digests(path, "state")
    try:
        config = ModelConfig.from_json(description["model"])
        stored = stored_shapes(_state(path))
        _check_layers(config.num_layers, stored)
        own_dtype = abstract_arrays(config, description["dtype"])
        _check_shapes({name: tuple(array.shape) for name, array in not_empty(own_dtype).items()}, stored)
        written = read_json(Path(_state(path)) / "_CHECKPOINT_METADATA", Written, ADVICE)["custom_metadata"]
        _check_origin(description, written["description"])
    except Exception as error:
        raise _damaged(path, error) from error
    arrays = StreamedArrays(_state(path), abstract_arrays(config, dtype) if dtype else own_dtype)
    facts = (description["name"], description["generation_config"], report)
    return StoredModel(config, arrays, dtype or description["dtype"], _tokenizer(path), *facts)


def _state(path: str | Path) -> str:
    return str((Path(path) / "state").absolute())


def _damaged(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged: {_first_line(error)}; {ADVICE}")


def versions() -> dict[str, str]:
    """Versions of this program and of the libraries that numbers depend on."""
    names = ("intraslice-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2) + "\n")


def _check_layers(count: int, stored: Mapping[str, Any]) -> None:
    """Raises InputError before a decoder of more layers than there are is described: that takes a while for each."""
    found = len({name.split(".")[1] for name in stored if name.startswith("layers.")})
    if count != found:
        raise InputError(f"config.json describes {count} layers, state/ holds {found}")


def _check_origin(description: Description, other: Mapping[str, Any]) -> None:
    """Raises InputError where the arrays are those of another model of the same shape."""
    for name in ("dtype", "model"):
        if other.get(name) != description[name]:
            raise InputError(f"config.json and state/ were written for different models: their {name} differs")


def _check_shapes(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError for the first array that differs: Orbax would say so in a hundred lines."""
    for name in sorted(expected.keys() | stored.keys()):
        want, found = expected.get(name), stored.get(name)
        if want != found:
            raise InputError(f"config.json describes {name} with shape {want}, state/ holds {found}")


def _tokenizer(path: Path):
    from intraslice_jax.convert.tokenizer import tokenizer_from_folder  # whose package imports this one

    return tokenizer_from_folder(path)


def _first_line(error: BaseException) -> str:
    prefix = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return (prefix + str(error).strip()).splitlines()[0][:200]
