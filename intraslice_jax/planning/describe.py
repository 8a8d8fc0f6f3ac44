"""A model's description without its weights."""

from __future__ import annotations

from pathlib import Path

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert import open_stored
from intraslice_jax.convert.families import find_family
from intraslice_jax.convert.hf import fetch_config, is_hub_id, read_config
from intraslice_jax.errors import InputError
from intraslice_jax.planning.models import READY


def describe(model: str) -> ModelConfig:
    """The description of a ready name, of a folder that needs only `config.json`, of a .gguf file or of a hub model.

    Raises:
        InputError: it is none of these, or its configuration is not supported.
    """
    path = Path(model)
    if path.is_dir():
        return read_config(path)[1]
    if path.is_file():
        return open_stored(path).config
    if model in READY:
        return find_family(READY[model]).read_config(READY[model], "")
    if "/" in model and is_hub_id(model):
        return read_config(fetch_config(model))[1]
    raise InputError(
        f"{model} is not a folder with config.json, a .gguf file, OWNER/NAME of the hub or a ready name; ready names "
        f"are {', '.join(READY)}"
    )
