"""The supported families: one table each, read forwards to load a checkpoint and backwards to write one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert import hf_config
from intraslice_jax.convert.mapping import Entry, Tensor, resolve
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.reading import check

_LAYER = "model.layers.{i}."
_ATTENTION, _MLP = "layers.{i}.attention.", "layers.{i}.mlp."


def _norm(name: str, path: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{name}.weight", (f"{path}.weight",), "flat"),
        Entry(f"{name}.bias", (f"{path}.bias",), "flat"),
    )


def _attention(name: str, projection: str) -> tuple[Entry, Entry]:
    """A query, key or value projection with its bias."""
    return (
        Entry(f"{_LAYER}self_attn.{name}.weight", (f"{_ATTENTION}{projection}_proj",), "outputs"),
        Entry(f"{_LAYER}self_attn.{name}.bias", (f"{_ATTENTION}{projection}_bias",), "flat"),
    )


def _attention_output(name: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{_LAYER}self_attn.{name}.weight", (f"{_ATTENTION}o_proj",), "inputs"),
        Entry(f"{_LAYER}self_attn.{name}.bias", (f"{_ATTENTION}o_bias",), "flat"),
    )


def _mlp(name: str, projection: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{_LAYER}mlp.{name}.weight", (f"{_MLP}{projection}_proj",), "outputs"),
        Entry(f"{_LAYER}mlp.{name}.bias", (f"{_MLP}{projection}_bias",), "flat"),
    )


_EMBEDDING = Entry("model.embed_tokens.weight", ("embed_tokens",), "same")
_HEAD = (
    Entry("lm_head.weight", ("lm_head",), "same"),
    Entry("lm_head.bias", ("lm_head_bias",), "flat"),
)
_INPUT_NORM = _norm(f"{_LAYER}input_layernorm", "layers.{i}.input_norm")
_POST_NORM = _norm(f"{_LAYER}post_attention_layernorm", "layers.{i}.post_norm")
_FINAL_NORM = _norm("model.norm", "norm")

_LLAMA = (
    _EMBEDDING,
    *_INPUT_NORM,
    *_attention("q_proj", "q"),
    *_attention("k_proj", "k"),
    *_attention("v_proj", "v"),
    *_attention_output("o_proj"),
    *_POST_NORM,
    *_mlp("gate_proj", "gate"),
    *_mlp("up_proj", "up"),
    *_mlp("down_proj", "down"),
    *_FINAL_NORM,
    *_HEAD,
)

_PHI3 = (
    _EMBEDDING,
    *_INPUT_NORM,
    Entry(
        f"{_LAYER}self_attn.qkv_proj.weight",
        (f"{_ATTENTION}q_proj", f"{_ATTENTION}k_proj", f"{_ATTENTION}v_proj"),
        "outputs",
    ),
    *_attention_output("o_proj"),
    *_POST_NORM,
    Entry(f"{_LAYER}mlp.gate_up_proj.weight", (f"{_MLP}gate_proj", f"{_MLP}up_proj"), "outputs"),
    *_mlp("down_proj", "down"),
    *_FINAL_NORM,
    *_HEAD,
)

_PHI = (
    _EMBEDDING,
    *_INPUT_NORM,
    *_attention("q_proj", "q"),
    *_attention("k_proj", "k"),
    *_attention("v_proj", "v"),
    *_attention_output("dense"),
    *_mlp("fc1", "up"),
    *_mlp("fc2", "down"),
    *_norm("model.final_layernorm", "norm"),
    *_HEAD,
)

_ROPE_PAIRS = Entry(f"{_LAYER}self_attn.rope_pairs", (f"{_ATTENTION}rope_pairs",), "same")


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        architecture: the class that the checkpoint's `architectures` names.
        model_type: its `model_type`.
        entries: the table.
        read_config: `config.json`, parsed, and its text to a ModelConfig.
    """

    architecture: str
    model_type: str
    entries: tuple[Entry, ...]
    read_config: Callable[[Mapping[str, Any], str], ModelConfig]

    def tensors(self, config: ModelConfig) -> list[Tensor]:
        """All tensors of a checkpoint of this family, with their shapes.

        Raises:
            InputError: the model has arrays that this family's checkpoints cannot hold.
        """
        shapes = {path: array.shape for path, array in abstract_arrays(config).items()}
        tensors = resolve(self.entries, shapes, config.num_layers)
        left = set(shapes).difference(*(tensor.shapes for tensor in tensors))
        left -= {path for path in left if path.endswith("rope_pairs")}
        if left:
            raise InputError(f"{self.architecture} has no place for {', '.join(sorted(left)[:4])}")
        return tensors


_Name = Annotated[str, Field(max_length=200)]


class Named(TypedDict, total=False):
    """What a `config.json` says of its family."""

    architectures: list[_Name] | None
    model_type: _Name | None


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", _LLAMA, hf_config.llama),
        Family("MistralForCausalLM", "mistral", _LLAMA, hf_config.mistral),
        Family("Qwen2ForCausalLM", "qwen2", _LLAMA, hf_config.qwen2),
        Family("SmolLM3ForCausalLM", "smollm3", _LLAMA, hf_config.smollm3),
        Family("Phi3ForCausalLM", "phi3", _PHI3, hf_config.phi3),
        Family("PhiForCausalLM", "phi", _PHI, hf_config.phi),
        # What this program exports for pruned models: Llama's names, any widths, the kept RoPE pairs beside them.
        Family("IntraSliceForCausalLM", "intraslice", (*_LLAMA, _ROPE_PAIRS), hf_config.intraslice),
    )
}
_OLD_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}
"""Spellings of the first conversions."""


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        InputError: the architecture is not supported; the message names it and those that are.
    """
    supported = f"supported: {', '.join(FAMILIES)}"
    named: Mapping[str, Any] = check(
        {key: config[key] for key in ("architectures", "model_type") if key in config}, Named, ""
    )
    architectures, model_type = named.get("architectures"), named.get("model_type")
    if isinstance(architectures, list) and architectures:
        name = str(architectures[0])
        family = FAMILIES.get(_OLD_NAMES.get(name, name))
        if family is None:
            raise InputError(f"architecture {name[:60]} is not supported; {supported}")
        if model_type not in (None, family.model_type):
            raise InputError(
                f"{family.architecture} with model_type {model_type!r} (expected {family.model_type!r}) "
                f"is not supported; {supported}"
            )
        return family
    for family in FAMILIES.values():
        if model_type == family.model_type:
            return family
    raise InputError(f"model_type {model_type!r} is not supported; {supported}")


def family_of(config: ModelConfig) -> Family:
    """The stock family whose checkpoints an unpruned model came from.

    Raises:
        InputError: there is none.
    """
    for family in FAMILIES.values():
        if config.model_type == family.model_type:
            return family
    raise InputError(f"model_type {config.model_type!r} has no checkpoint format; known: {', '.join(FAMILIES)}")


def default_rope_pairs(config: ModelConfig) -> dict[str, np.ndarray]:
    """`rope_pairs` int32 [KV heads, rotary_dim / 2] of every layer of a model that kept all of them."""
    return {
        f"layers.{i}.attention.rope_pairs": np.tile(
            np.arange(shape.rotary_dim // 2, dtype=np.int32), (shape.num_key_value_heads, 1)
        )
        for i, shape in enumerate(config.layers)
    }


def to_checkpoint(
    family: str | Family, config: ModelConfig, arrays: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a checkpoint, one at a time, in the dtype of `arrays`: loading read backwards, bit for bit.

    Args:
        family: a `Family` or its architecture's name.
        config: the model's description.
        arrays: our arrays by dotted path, NumPy's or JAX's.

    Raises:
        InputError: the family's checkpoints cannot hold this model, for example a pruned one.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    tensors = family.tensors(config)
    if _ROPE_PAIRS not in family.entries:
        for path, want in default_rope_pairs(config).items():
            if not np.array_equal(np.asarray(arrays[path]), want):
                raise InputError(f"{family.architecture} has no place for {path}: the model lost RoPE pairs")
    for tensor in tensors:
        yield tensor.name, tensor.pack(arrays)
