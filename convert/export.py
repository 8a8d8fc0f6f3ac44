"""The way out: a Hugging Face folder that PyTorch loads. torch itself is not needed to write it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.assemble import DTYPES
from intraslice_jax.convert.families import FAMILIES, Family, default_rope_pairs, find_family, to_checkpoint
from intraslice_jax.convert.modelcard import model_card
from intraslice_jax.convert.pruned_config import MODELING_FILE, pruned_config
from intraslice_jax.convert.shards import Planned, parse_size, write_tensors
from intraslice_jax.errors import InputError
from intraslice_jax.io.atomic import atomic_folder
from intraslice_jax.model import LanguageModel, StoredModel
from intraslice_jax.models.decoder import decoder_to_arrays

FORMATS = ("hf",)


def export(
    model: LanguageModel | StoredModel,
    path: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    max_shard_size: int | str = 5 * 2**30,
    overwrite: bool = False,
) -> Path:
    """Writes a model as a folder of config, safetensors, tokenizer, generation settings and model card.

    An unpruned model is written in its family's own layout, for the stock class. A pruned one carries a modelling
    file and loads with `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`. Weights are written
    tensor by tensor, bit for bit where the dtype stays.

    Args:
        model: dense or pruned; a stored one is read as it is written.
        path: the folder; it appears under its name only when complete.
        format: `hf`.
        dtype: `float32`, `bfloat16` or `float16` for the written weights, None for the model's own.
        max_shard_size: bytes, or text such as `5GB`, above which the weights are split over several files.
        overwrite: replace a folder that exists.

    Raises:
        InputError: the folder exists, an option is unknown, or a weight is too large for the dtype.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r} is not supported; expected {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; expected {', '.join(DTYPES)}")
    limit = parse_size(max_shard_size)
    arrays: Mapping[str, Any]
    if isinstance(model, StoredModel):
        arrays, own = model.arrays, model.dtype
    else:
        arrays, own = _HostArrays(decoder_to_arrays(model.decoder)), model.decoder.embed_tokens[...].dtype.name
    written = DTYPES[dtype or own]
    family = stock_family(model.config, arrays)
    if family is None:
        layout, config = FAMILIES["IntraSliceForCausalLM"], pruned_config(model.config, written.name)
    else:
        layout, config = family, _stock_config(model.config, written.name)

    with atomic_folder(path, overwrite) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _generation_config(model))
        plan = [
            Planned(t.name, np.dtype(np.int32) if t.name.endswith("rope_pairs") else written, t.shape)
            for t in layout.tensors(model.config)
        ]
        write_tensors(folder, plan, to_checkpoint(layout, model.config, arrays), limit)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
        if family is None:
            shutil.copyfile(Path(__file__).with_name(f"{MODELING_FILE}.py"), folder / f"{MODELING_FILE}.py")
        (folder / "README.md").write_text(model_card(model, pruned=family is None), encoding="utf-8")
    return Path(path)


def stock_family(config: ModelConfig, arrays: Mapping[str, Any]) -> Family | None:
    """The family whose stock class can hold the model; None if a layer lost heads, channels or RoPE pairs.

    Args:
        config: the model.
        arrays: its arrays by path.
    """
    if not config.source:
        return None
    raw = json.loads(config.source)
    family = find_family(raw)
    if family.read_config(raw, config.source) != config:
        return None
    pairs = default_rope_pairs(config)
    return family if all(np.array_equal(np.asarray(arrays[path]), want) for path, want in pairs.items()) else None


class _HostArrays(Mapping[str, np.ndarray]):
    """Arrays fetched when asked for, of which nothing stays in host memory afterwards."""

    def __init__(self, arrays: Mapping[str, jax.Array]):
        self._arrays = arrays

    def __getitem__(self, path: str) -> np.ndarray:
        array = self._arrays[path]
        if any(device.platform != "cpu" for device in array.devices()):
            # A jax array keeps what was once fetched from an accelerator; a copy takes it along when it goes.
            array = jnp.copy(array)
        return np.asarray(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _stock_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The original configuration without what no longer holds: its dtype, and code files that are not in the folder."""
    raw = json.loads(config.source)
    kept = {k: v for k, v in raw.items() if k not in ("auto_map", "_name_or_path", "torch_dtype")}
    return kept | {"dtype": dtype}


def _generation_config(model: LanguageModel | StoredModel) -> dict[str, Any]:
    if model.generation_config:
        return model.generation_config
    eos = model.config.eos_token_id
    tokens = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": model.config.pad_token_id,
    }
    return {key: value for key, value in tokens.items() if value is not None}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
