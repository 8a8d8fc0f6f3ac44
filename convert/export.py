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

from intraslice_jax.convert.assemble import DTYPES
from intraslice_jax.convert.families import FAMILIES, to_checkpoint
from intraslice_jax.convert.gguf_export import GGUF_DTYPES, export_gguf
from intraslice_jax.convert.modelcard import Form, model_card
from intraslice_jax.convert.pruned_config import MODELING_FILE, pruned_config, special_tokens
from intraslice_jax.convert.shards import Planned, parse_size, write_tensors
from intraslice_jax.convert.stock import StockForm, padded_form, stock_form
from intraslice_jax.convert.tokenizer_writing import save_tokenizer
from intraslice_jax.errors import InputError
from intraslice_jax.io.atomic import atomic_folder
from intraslice_jax.model import LanguageModel, StoredModel
from intraslice_jax.models.decoder import decoder_to_arrays

FORMATS = ("hf", "padded", "gguf")


def export(
    model: LanguageModel | StoredModel,
    path: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    max_shard_size: int | str = 5 * 2**30,
    overwrite: bool = False,
) -> Path:
    """Writes a model for other programs.

    `hf` is a folder of config, safetensors, tokenizer, generation settings and model card. A model that a stock class
    of transformers can hold as it is (an unpruned one, or one pruned with the layout `uniform`) is written for that
    class; any other carries a modelling file and loads with
    `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`. `padded` is such a folder, for the stock class
    in any case: what was pruned is stored as zeros. `gguf` is one file for llama.cpp. Weights are written tensor by
    tensor, bit for bit where neither dtype nor form changes them.

    Args:
        model: dense or pruned; a stored one is read as it is written.
        path: the folder or file; it appears under its name only when complete.
        format: `hf`, `padded` or `gguf`.
        dtype: `float32`, `bfloat16` or `float16` for the written weights, for `gguf` also `q8_0`; None for the
            model's own.
        max_shard_size: bytes, or text such as `5GB`, above which the weights of a folder are split over several files.
        overwrite: replace what exists.

    Raises:
        InputError: the output exists, an option is unknown, the form cannot express the model, or a weight is too
            large for the dtype.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r} is not supported; expected {', '.join(FORMATS)}")
    check_export_dtype(format, dtype)
    path, limit = Path(path), parse_size(max_shard_size)
    arrays: Mapping[str, Any]
    if isinstance(model, StoredModel):
        arrays, own = model.arrays, model.dtype
    else:
        arrays, own = _HostArrays(decoder_to_arrays(model.decoder)), model.decoder.embed_tokens[...].dtype.name
    if format == "gguf":
        export_gguf(model, arrays, path, dtype or own, overwrite)
    else:
        stock = padded_form(model.config, arrays) if format == "padded" else stock_form(model.config, arrays)
        _export_folder(model, arrays, stock, path, DTYPES[dtype or own], limit, overwrite)
    return path


def check_export_dtype(format: str, dtype: str | None) -> None:
    """Raises InputError for a dtype that the format does not have."""
    known = GGUF_DTYPES if format == "gguf" else tuple(DTYPES)
    if dtype is not None and dtype not in known:
        raise InputError(f"dtype {dtype!r} is not supported by format {format}; expected {', '.join(known)}")


def _export_folder(
    model: LanguageModel | StoredModel,
    arrays: Mapping[str, Any],
    stock: StockForm | None,
    path: Path,
    dtype: np.dtype,
    max_shard_size: int,
    overwrite: bool,
) -> None:
    """The Hugging Face folder: of a stock class, or with the modelling file."""
    if stock is None:
        family, config, shapes = (
            FAMILIES["IntraSliceForCausalLM"],
            pruned_config(model.config, dtype.name),
            model.config,
        )
    else:
        family, config, shapes, arrays = (
            stock.family,
            stock.raw | {"dtype": dtype.name, "torch_dtype": dtype.name},
            stock.config,
            stock.arrays,
        )
    with atomic_folder(path, overwrite) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _generation_config(model))
        plan = [
            Planned(t.name, np.dtype(np.int32) if t.name.endswith("rope_pairs") else dtype, t.shape)
            for t in family.tensors(shapes)
        ]
        write_tensors(folder, plan, to_checkpoint(family, shapes, arrays), max_shard_size)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, folder)
        if stock is None:
            shutil.copyfile(Path(__file__).with_name(f"{MODELING_FILE}.py"), folder / f"{MODELING_FILE}.py")
        (folder / "README.md").write_text(model_card(model, _form(model, stock)), encoding="utf-8")


def _form(model: LanguageModel | StoredModel, stock: StockForm | None) -> Form:
    if stock is None:
        return "pruned"
    if stock.config.total_parameters() > model.config.total_parameters():
        return "padded"
    return "dense" if stock.config == model.config else "uniform"


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


def _generation_config(model: LanguageModel | StoredModel) -> dict[str, Any]:
    if model.generation_config:
        return model.generation_config
    return {key: value for key, value in special_tokens(model.config).items() if value is not None}


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
