"""The way in: whatever the user names becomes a LanguageModel."""

from __future__ import annotations

from pathlib import Path

from intraslice_jax.convert.assemble import DTYPES
from intraslice_jax.convert.gguf import open_gguf
from intraslice_jax.convert.gguf_file import MAGIC
from intraslice_jax.convert.hf import fetch, is_hub_id, open_model_folder
from intraslice_jax.errors import InputError
from intraslice_jax.model import LanguageModel, StoredModel


def load(source: str | Path, dtype: str | None = None) -> LanguageModel:
    """Loads a Llama- or Phi-family model.

    Args:
        source: a Hugging Face folder (an export of this program included), a GGUF file, or a hub id.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the checkpoint's (float32 for quantised GGUF).

    Raises:
        InputError: the source is missing, damaged, contradictory or not supported; the message names what.
    """
    return open_stored(source, dtype).in_memory()


def open_stored(source: str | Path, dtype: str | None = None) -> StoredModel:
    """`load` without reading the weights: they come one at a time, as they are asked for.

    Args:
        source: as for `load`.
        dtype: as for `load`.

    Raises:
        InputError: as `load`, except that damaged numbers are found when they are read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; expected {', '.join(DTYPES)}")
    path, name = Path(source), str(source)
    try:
        path.exists()
    except OSError as error:  # a name that is too long, no permission
        raise InputError(f"{name[:200]} cannot be read: {error.strerror}") from error
    if path.is_dir():
        return open_model_folder(path, name, dtype)
    if path.is_file():
        if path.suffix.lower() != ".gguf" and not _is_gguf(path):
            raise InputError(f"{path} is not a model; expected a folder with config.json, a .gguf file or a hub id")
        return open_gguf(path, name, dtype)
    if not is_hub_id(name):
        raise InputError(f"{path} does not exist; expected a folder with config.json, a .gguf file or a hub id")
    return open_model_folder(fetch(name), name, dtype)


def _is_gguf(path: Path) -> bool:
    """Whether a file of any name is a GGUF file by its first bytes; stores of other programs name them by digests."""
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC
