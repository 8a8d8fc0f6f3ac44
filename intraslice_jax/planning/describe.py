"""A model's description without its weights."""

from __future__ import annotations

import json
from pathlib import Path

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert import open_stored
from intraslice_jax.convert.families import find_family
from intraslice_jax.convert.hf import read_config
from intraslice_jax.errors import InputError


def describe(model: str) -> ModelConfig:
    """The description of a ready name, of a folder that needs only `config.json`, or of a .gguf file.

    Raises:
        InputError: it is none of these, or its configuration is not supported.
    """
    ready = json.loads(Path(__file__).with_name("models.json").read_text("utf-8"))
    path = Path(model)
    if path.is_dir():
        return read_config(path)[1]
    if path.is_file():
        return open_stored(path).config
    if model in ready:
        return find_family(ready[model]).read_config(ready[model], "")
    raise InputError(
        f"{model} is not a folder with config.json, a .gguf file or a ready name; ready names are {', '.join(ready)}"
    )
