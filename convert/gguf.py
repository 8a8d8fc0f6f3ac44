"""GGUF models: their metadata as the configuration that transformers would have, their tensors under its names."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Required

import gguf
import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from intraslice_jax.config import ModelConfig, uniform_query_to_kv
from intraslice_jax.convert.assemble import CheckpointArrays
from intraslice_jax.convert.families import FAMILIES, Family
from intraslice_jax.convert.gguf_file import GgufFile
from intraslice_jax.convert.mapping import Entry
from intraslice_jax.convert.rotation import fraction
from intraslice_jax.convert.sources import TensorSource
from intraslice_jax.convert.tokenizer import tokenizer_from_gguf
from intraslice_jax.errors import InputError
from intraslice_jax.model import StoredModel
from intraslice_jax.reading import Count, Index, Positive, check


class _Architecture(NamedTuple):
    """One of llama.cpp's architectures.

    Attributes:
        family: the class of the same model in transformers.
        names: llama.cpp's names of its tensors.
        interleaved: whether llama.cpp rotates neighbouring channels, so that the rows of query and key projections
            are stored in another order.
        config: further keys of the configuration.
    """

    family: str
    names: gguf.MODEL_ARCH
    interleaved: bool
    config: Mapping[str, Any]


ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", gguf.MODEL_ARCH.LLAMA, True, {}),
    # A Llama whose layers have their own numbers of heads and MLP widths: what pruned models are written as.
    "deci": _Architecture("LlamaForCausalLM", gguf.MODEL_ARCH.DECI, True, {}),
    "qwen2": _Architecture("Qwen2ForCausalLM", gguf.MODEL_ARCH.QWEN2, False, {}),
    "phi3": _Architecture("Phi3ForCausalLM", gguf.MODEL_ARCH.PHI3, False, {}),
    "phi2": _Architecture("PhiForCausalLM", gguf.MODEL_ARCH.PHI2, False, {"hidden_act": "gelu_new"}),
}
# Metadata keys behind the architecture's prefix, and what transformers calls them.
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Those that are one number, or in `deci` files a list of one for each layer.
_WIDTHS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
}
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What a file says about its model, without the architecture's prefix. Other keys are not looked at.
Metadata = TypedDict(
    "Metadata",
    {
        "general.architecture": Required[str],
        "split.count": Index,
        "expert_count": Index,
        "block_count": Required[Count],
        "embedding_length": Required[Count],
        "context_length": Count,
        "feed_forward_length": list[Index],
        "attention.head_count": Required[list[Index]],
        "attention.head_count_kv": list[Index],
        "attention.key_length": Count,
        "attention.value_length": Count,
        "attention.sliding_window": Index,
        "attention.layer_norm_rms_epsilon": Positive,
        "attention.layer_norm_epsilon": Positive,
        "rope.dimension_count": Count,
        "rope.freq_base": Positive,
        "rope.scale_linear": _NotNegative,
        "rope.scaling.type": str,
        "rope.scaling.factor": _NotNegative,
        "rope.scaling.attn_factor": Positive,
        "rope.scaling.original_context_length": Count,
        "rope.scaling.yarn_beta_fast": Positive,
        "rope.scaling.yarn_beta_slow": Positive,
        "tokenizer.ggml.bos_token_id": Index,
        "tokenizer.ggml.eos_token_id": Index,
        "tokenizer.ggml.eot_token_id": Index,
        "tokenizer.ggml.padding_token_id": Index,
    },
    total=False,
)


def open_gguf(path: Path, name: str, dtype: str | None) -> StoredModel:
    """A model from a `.gguf` file; quantised tensors become float32 before they take `dtype`.

    Raises:
        InputError: the file is damaged, contradictory or its architecture not supported.
    """
    file = GgufFile(path)
    try:
        metadata = read_metadata(file)
        raw = hf_config(file, metadata)
        family = _family(file, raw)
        config = _with_own_widths(family.read_config(raw, json.dumps(raw, indent=2)), metadata)
        tokenizer = tokenizer_from_gguf(file.metadata, config.max_position_embeddings)
        source = GgufSource(file, family, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    arrays = CheckpointArrays(family, config, source, dtype)
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}
    return StoredModel(config, arrays, arrays.dtype.name, tokenizer, name, generation)


class GgufSource(TensorSource):
    """The tensors of a GGUF file under the names of a family's table."""

    layers_lack_biases = True

    def __init__(self, file: GgufFile, family: Family, config: ModelConfig):
        self.where = str(file.path)
        self._file = file
        architecture = ARCHITECTURES[file.metadata["general.architecture"]]
        names = gguf.get_tensor_name_map(architecture.names, config.num_layers)
        self._names: dict[str, str] = {}
        self._heads: dict[str, int] = {}
        for tensor in family.tensors(config):
            name = names.get_name(tensor.name, (".weight", ".bias"))
            if name is not None and name in file.tensors:
                self._names[tensor.name] = name
            path, shape = next(iter(tensor.shapes.items()))
            if architecture.interleaved and path.endswith(("q_proj", "k_proj", "q_bias", "k_bias")):
                self._heads[tensor.name] = shape[-2]
        # What no row of the table claims keeps its name and is reported as left over.
        left = set(file.tensors).difference(self._names.values(), _ROPE_TENSORS)
        self._names.update({name: name for name in left})
        self.dtypes = {name: file.tensors[stored].dtype for name, stored in self._names.items()}
        self.shapes = {name: file.tensors[stored].shape for name, stored in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor as transformers has it."""
        stored = self._file.read(self._names[name])
        return unpermute(stored, self._heads[name]) if name in self._heads else stored


def permute(stored: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the members of a RoPE pair are neighbours.

    Axis 0 is heads x channels. llama.cpp does so for its architecture `llama`.
    """
    return stored.reshape(heads, 2, -1, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)


def unpermute(stored: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`."""
    return stored.reshape(heads, -1, 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)


def read_metadata(file: GgufFile) -> Metadata:
    """What the file says about its model, checked before anything of that size is built.

    Raises:
        InputError: unsupported architecture, or a key is missing, of another type, or more than the tensors allow.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(
            f"GGUF architecture {str(name)[:40]!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    found: dict[str, Any] = {}
    for key in Metadata.__annotations__:
        stored = key if key.startswith(("general.", "split.", "tokenizer.")) else f"{name}.{key}"
        if stored in file.metadata:
            value = file.metadata[stored]
            found[key] = [value] if key in _WIDTHS and not isinstance(value, list) else value
    metadata = check(found, Metadata, f"the metadata of architecture {name}")
    if metadata["block_count"] > len(file.tensors):
        raise InputError(f"{name}.block_count is {metadata['block_count']}, the file has {len(file.tensors)} tensors")
    widest = max(max(place.shape) for place in file.tensors.values())
    for key in ("embedding_length", "attention.key_length", *_WIDTHS):
        values = metadata.get(key, [])
        most = max(values, default=0) if isinstance(values, list) else values
        if most > widest:
            raise InputError(f"{name}.{key} is {most}, the file's widest tensor has {widest}")
    return metadata


def hf_config(file: GgufFile, metadata: Metadata) -> dict[str, Any]:
    """The `config.json` of the same model in transformers.

    Raises:
        InputError: what the file holds is not supported, or contradictory.
    """
    name = metadata["general.architecture"]
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise InputError(f"the model is split into {parts} files; join them with llama-gguf-split --merge")
    if metadata.get("expert_count"):
        raise InputError(f"GGUF architecture {name!r} with experts (MoE) is not supported; use a dense model")
    if "token_embd.weight" not in file.tensors:
        raise InputError("tensor token_embd.weight is missing")
    architecture = ARCHITECTURES[name]
    raw: dict[str, Any] = {
        "architectures": [architecture.family],
        "model_type": FAMILIES[architecture.family].model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": _has_bias(file, "attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": _has_bias(file, "ffn_gate", "ffn_up", "ffn_down"),
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        **architecture.config,
        **_tokens(metadata),
    }
    for key, hf_key in _KEYS.items():
        if (value := metadata.get(key)) is not None:
            raw[hf_key] = _shortest(value)
    for key, hf_key in _WIDTHS.items():
        values = metadata.get(key, [])
        if len(values) > 1 and name != "deci":
            raise InputError(f"{name}.{key} must be one positive number for all layers, found {len(values)} numbers")
        raw[hf_key] = values[0] if values else None
    heads = raw.get("num_attention_heads")
    if not heads:
        raise InputError(f"{name}.attention.head_count must be a positive number, found {heads}")
    raw["num_key_value_heads"] = raw["num_key_value_heads"] or heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    value_dim = metadata.get("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise InputError(f"{name}.attention.value_length is {value_dim}, expected the key_length {head_dim}")
    raw["partial_rotary_factor"] = fraction(metadata.get("rope.dimension_count", head_dim), head_dim)
    if architecture.family == "Phi3ForCausalLM":
        raw["sliding_window"] = metadata.get("attention.sliding_window") or None
    raw.update(_rope_scaling(file, metadata, raw))
    return raw


def _has_bias(file: GgufFile, *projections: str) -> bool:
    """Whether some layer has a bias on one of these projections; llama.cpp takes all of them as optional."""
    ends = tuple(f".{projection}.bias" for projection in projections)
    return any(name.startswith("blk.") and name.endswith(ends) for name in file.tensors)


def _with_own_widths(config: ModelConfig, metadata: Metadata) -> ModelConfig:
    """The model with the numbers of heads and MLP widths that a `deci` file lists for each layer.

    Raises:
        InputError: a list has another length than the model, or a layer lacks a module.
    """
    if metadata["general.architecture"] != "deci":
        return config
    lists = []
    for key in _WIDTHS:
        values = metadata.get(key, [])
        values = values * config.num_layers if len(values) == 1 else values
        if len(values) != config.num_layers:
            raise InputError(
                f"deci.{key} has {len(values)} entries, expected one for each of {config.num_layers} layers"
            )
        if 0 in values:
            raise InputError(
                f"deci.{key}: layer {values.index(0)} has 0; layers without attention or MLP are not supported"
            )
        lists.append(values)
    layers = tuple(
        dataclasses.replace(shape, query_to_kv=uniform_query_to_kv(heads, kv_heads), intermediate_size=inner)
        for shape, heads, kv_heads, inner in zip(config.layers, *lists, strict=True)
    )
    # The configuration made from the first layer says nothing about the others.
    return config if layers == config.layers else dataclasses.replace(config, layers=layers, source="")


def _family(file: GgufFile, raw: Mapping[str, Any]) -> Family:
    """The family; older phi2 files hold queries, keys and values in one tensor."""
    family = FAMILIES[raw["architectures"][0]]
    if family.model_type != "phi" or "blk.0.attn_qkv.weight" not in file.tensors:
        return family
    layer, attention = "model.layers.{i}.self_attn.", "layers.{i}.attention."
    separate = tuple(f"{layer}{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias"))
    fused = (
        Entry(f"{layer}qkv_proj.weight", tuple(f"{attention}{p}_proj" for p in "qkv"), "outputs"),
        Entry(f"{layer}qkv_proj.bias", tuple(f"{attention}{p}_bias" for p in "qkv"), "flat"),
    )
    kept = tuple(entry for entry in family.entries if entry.name not in separate)
    return dataclasses.replace(family, entries=kept + fused)


def _tokens(metadata: Metadata) -> dict[str, Any]:
    """Special token ids; text ends at the end of a turn as well as at the end of the text."""
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "padding")}
    ends = [ids[key] for key in ("eos", "eot") if ids[key] is not None]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }


def _rope_scaling(file: GgufFile, metadata: Metadata, raw: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` from llama.cpp's keys, or from its tables of factors."""
    get = {key: _shortest(metadata.get(f"rope.scaling.{key}")) for key in _SCALING_KEYS}
    tables = [_table(file, tensor) for tensor in _ROPE_TENSORS]
    context, original = raw.get("max_position_embeddings"), get["original_context_length"]
    if tables[1] is not None and tables[2] is not None:
        scaling = {"rope_type": "longrope", "long_factor": tables[1], "short_factor": tables[2]}
        if get["attn_factor"] is not None:
            scaling["attention_factor"] = get["attn_factor"]
        top = {} if original is None else {"original_max_position_embeddings": original}
        return {"rope_scaling": scaling, **top}
    if tables[0] is not None:
        return {"rope_scaling": _llama3(tables[0], raw)}
    kind = get["type"]
    factor = get["factor"] or _shortest(metadata.get("rope.scale_linear"))
    if kind in (None, "none") and (not factor or factor == 1 or kind == "none"):
        return {}
    if kind in (None, "linear"):
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or context}
        scaling |= {hf: get[key] for key, hf in _YARN_KEYS.items() if get[key] is not None}
        if get["attn_factor"] is not None and factor:
            scaling["attention_factor"] = get["attn_factor"] * (1 + 0.1 * math.log(factor))
        return {"rope_scaling": scaling}
    name = metadata["general.architecture"]
    raise InputError(f"{name}.rope.scaling.type {kind[:40]!r} is not supported; supported: none, linear, yarn")


_SCALING_KEYS = (
    "type",
    "factor",
    "attn_factor",
    "original_context_length",
    "yarn_beta_fast",
    "yarn_beta_slow",
)
_YARN_KEYS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def _llama3(factors: list[float], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's published parameters where the table is theirs, else the table itself.

    llama.cpp divides frequency i by entry i, which `longrope` with equal short and long factors and no factor on
    the attention does too.
    """
    low, high, original, factor = 1.0, 4.0, 8192, max(factors)
    plain = raw["rope_theta"] ** (-np.arange(len(factors)) / len(factors))
    smooth = np.clip((original * plain / (2 * np.pi) - low) / (high - low), 0, 1)
    if factor > 1 and np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-5):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": raw.get("max_position_embeddings"),
    }


def _table(file: GgufFile, tensor: str) -> list[float] | None:
    """Divisors of the frequencies; what is not a vector of positive numbers is refused."""
    if tensor not in file.tensors:
        return None
    table = file.read(tensor)
    if table.ndim != 1 or not (np.isfinite(table) & (table > 0)).all():
        raise InputError(f"tensor {tensor} must be a vector of positive numbers; the file is damaged")
    return [_shortest(float(x)) for x in table]


def _shortest(value: Any) -> Any:
    """A float32 as the decimal number it was written from."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
