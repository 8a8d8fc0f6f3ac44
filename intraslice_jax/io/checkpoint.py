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
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from intraslice_jax.config import ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.io.digests import check_digests, write_digests
from intraslice_jax.io.streaming import StreamedArrays, write_streamed
from intraslice_jax.model import LanguageModel, StoredModel, as_stored
from intraslice_jax.models.decoder import abstract_arrays, decoder_from_arrays, decoder_to_arrays
from intraslice_jax.parallel.distributed import is_first, shared_folder
from intraslice_jax.parallel.rules import weight_shardings

FORMAT = "intraslice-checkpoint"
VERSION = 1


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder was written by `save`."""
    try:
        return json.loads((Path(path) / "config.json").read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save(model: LanguageModel | StoredModel, path: str | Path, overwrite: bool = False) -> Path:
    """Writes a checkpoint; the folder appears under its name only when complete.

    Args:
        model: in memory; or stored elsewhere, then its arrays are read and written one after the other.
        path: the folder.
        overwrite: replace a folder that exists.

    Raises:
        InputError: `path` exists and `overwrite` is False, or a stored model is damaged.
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
        if stored:
            abstract = abstract_arrays(model.config, model.dtype)
            write_streamed(state, model.items(), abstract, metadata)
        else:
            ocp.save(str(state), decoder_to_arrays(model.decoder), custom_metadata=metadata)
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
    stored = open_checkpoint(path)
    try:
        arrays = ocp.load(_state(path), _placed(abstract_arrays(stored.config, stored.dtype), mesh))
    except Exception as error:  # Orbax raises many kinds for a damaged file.
        raise _damaged(path, error) from error
    return LanguageModel(
        config=stored.config,
        decoder=decoder_from_arrays(stored.config, arrays),
        tokenizer=stored.tokenizer,
        name=stored.name,
        generation_config=stored.generation_config,
        report=stored.report,
    )


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
    description = json.loads((path / "config.json").read_text())
    if description.get("format_version") != VERSION:
        raise InputError(
            f"{path} has checkpoint version {description.get('format_version')}, this program reads {VERSION}; "
            "use the version of the program that wrote it"
        )
    if is_first():  # the others read no more than their parts of the weights
        check_digests(path, "state")
    try:
        config = ModelConfig.from_json(description["model"])
        abstract = abstract_arrays(config, dtype or description["dtype"])
        _check_shapes(abstract, ocp.metadata(_state(path)).metadata)
        report = json.loads((path / "report.json").read_text())
        name, generation_config = description["name"], description["generation_config"]
        arrays = StreamedArrays(_state(path), abstract)
        stored_dtype = dtype or description["dtype"]
    except Exception as error:
        raise _damaged(path, error) from error
    return StoredModel(config, arrays, stored_dtype, _tokenizer(path), name, generation_config, report)


def _state(path: str | Path) -> str:
    return str((Path(path) / "state").absolute())


def _damaged(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged: {_first_line(error)}; write the checkpoint again")


def versions() -> dict[str, str]:
    """Versions of this program and of the libraries that numbers depend on."""
    names = ("intraslice-jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2) + "\n")


def _check_shapes(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raises InputError for the first array that differs: Orbax would say so in a hundred lines."""
    for name in sorted(expected.keys() | stored.keys()):
        want, found = (tuple(arrays[name].shape) if name in arrays else None for arrays in (expected, stored))
        if want != found:
            raise InputError(f"config.json describes {name} with shape {want}, state/ holds {found}")


def _placed(abstract: dict[str, jax.ShapeDtypeStruct], mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    if mesh is None:
        shardings = dict.fromkeys(abstract, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = weight_shardings({name: a.shape for name, a in abstract.items()}, mesh)
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[name]) for name, a in abstract.items()}


def _tokenizer(path: Path):
    from intraslice_jax.convert.tokenizer import tokenizer_from_folder  # whose package imports this one

    return tokenizer_from_folder(path)


def _first_line(error: BaseException) -> str:
    prefix = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return (prefix + str(error).strip()).splitlines()[0][:200]
