"""Hugging Face checkpoints: a folder, or a model of the hub brought to one."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.assemble import CheckpointArrays
from intraslice_jax.convert.families import Family, find_family
from intraslice_jax.convert.hf_config import TokenId
from intraslice_jax.convert.sources import open_folder
from intraslice_jax.convert.tokenizer import tokenizer_from_folder
from intraslice_jax.errors import InputError
from intraslice_jax.model import StoredModel
from intraslice_jax.reading import read_json

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


class GenerationSettings(TypedDict, total=False):
    """A generation_config.json; what is not read here goes into exports as it is."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    bos_token_id: TokenId | None
    eos_token_id: TokenId | list[TokenId] | None
    pad_token_id: TokenId | None


def is_hub_id(text: str) -> bool:
    """Whether a text can be the id of a model on the hub: NAME or OWNER/NAME."""
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and not text.lower().endswith((".gguf", ".json"))


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Family and description of the model in a folder; nothing else of it is read.

    Raises:
        InputError: there is no `config.json`, it contradicts itself, the family is not supported, or there is an
            adapter beside it, which transformers would apply.
    """
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.exists():
        raise InputError(
            f"{adapter}: the folder holds a PEFT adapter, which is not applied here; merge it first, in Python: "
            "model.merge_and_unload().save_pretrained(OTHER_FOLDER) of the peft model, and name OTHER_FOLDER; "
            "if its weights are merged already, remove adapter_config.json"
        )
    if not path.exists():
        others = sorted(file for file in folder.glob("*") if file.suffix.lower() == ".gguf")
        hint = f"; to load the GGUF file in it, name {others[0]}" if others else "; is it a model's folder?"
        raise InputError(f"{folder} holds no config.json{hint}")
    raw: dict[str, Any] = read_json(path, dict)
    try:
        family = find_family(raw)
        return family, family.read_config(raw, json.dumps(raw, indent=2, ensure_ascii=False))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def open_model_folder(folder: Path, name: str, dtype: str | None) -> StoredModel:
    """A model from a folder with `config.json`.

    Raises:
        InputError: something in the folder is missing, damaged or not supported; the message names it.
    """
    family, config = read_config(folder)
    source = open_folder(folder)
    tokenizer = tokenizer_from_folder(folder)
    generation = folder / "generation_config.json"
    settings = dict(read_json(generation, GenerationSettings)) if generation.exists() else {}
    arrays = CheckpointArrays(family, config, source, dtype)
    return StoredModel(config, arrays, arrays.dtype.name, tokenizer, name, settings)


def fetch(hub_id: str) -> Path:
    """The folder of a hub model in the local cache, downloaded where needed; its configuration is checked first.

    Raises:
        InputError: no such model, no access, or no connection and not in the cache; or not supported.
    """
    from huggingface_hub import snapshot_download

    log.info("asking the Hugging Face hub for model %s", hub_id)
    with _hub_errors(hub_id):
        folder = Path(snapshot_download(hub_id, allow_patterns=_SMALL_FILES))
    read_config(folder)
    with _hub_errors(hub_id):
        folder = Path(snapshot_download(hub_id, allow_patterns=[*_SMALL_FILES, "model*.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=[*_SMALL_FILES, "pytorch_model*.bin"]))
    return folder


def fetch_config(hub_id: str) -> Path:
    """A folder of the local cache that holds the `config.json` of a hub model, and perhaps nothing else.

    Raises:
        InputError: as `fetch`.
    """
    from huggingface_hub import hf_hub_download

    log.info("asking the Hugging Face hub for model %s", hub_id)
    with _hub_errors(hub_id):
        return Path(hf_hub_download(hub_id, "config.json")).parent


@contextlib.contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{hub_id} is neither a file or folder nor in the Hugging Face cache, and the hub cannot be reached; "
            "check the name and the connection, or download the model and name its folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{hub_id} cannot be downloaded ({reason}); check the name, and log in (hf auth login) "
            "where the model asks for it"
        ) from error
