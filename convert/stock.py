"""Models in the shape of their family's stock class in transformers, which loads them without foreign code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.families import FAMILIES, Family, default_rope_pairs, find_family
from intraslice_jax.convert.pruned_config import rope_parameters, special_tokens
from intraslice_jax.convert.rotation import chosen_frequencies, fraction, query_scales
from intraslice_jax.convert.widen import Frame, WidenedArrays, whole_head_frame
from intraslice_jax.errors import InputError

_ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


class StockForm(NamedTuple):
    """A model as a stock class has it.

    Attributes:
        family: whose class.
        raw: the `config.json`.
        config: what that file describes.
        arrays: by path.
    """

    family: Family
    raw: dict[str, Any]
    config: ModelConfig
    arrays: Mapping[str, Any]


def stock_form(config: ModelConfig, arrays: Mapping[str, Any]) -> StockForm | None:
    """The model without a zero added: an unpruned one, or one whose layers all have the same heads, pairs and widths.

    None where no stock class holds it: then the export brings its own modelling file.

    Args:
        config: the model.
        arrays: its arrays by path.

    Returns:
        None for any other model.
    """
    if not config.source:
        return None
    family, raw, dense = _original(config)
    if _changed_features(config, dense):
        return None
    if dense.layers == config.layers and not _more_biases(config, dense):
        expected = default_rope_pairs(config)
        if all(np.array_equal(np.asarray(arrays[path]), pairs) for path, pairs in expected.items()):
            return StockForm(family, raw, config, arrays)
    pairs = common_pairs(config, arrays)
    if pairs is None or not _alike(config, dense):
        return None
    try:
        return _uniform(family, raw, dense, config, arrays, pairs)
    except InputError:  # the class has no such numbers: heads of which only a part rotates, for example
        return None


def padded_form(config: ModelConfig, arrays: Mapping[str, Any]) -> StockForm:
    """The model with zeros where heads and channels were, and each kept RoPE pair at its place in the original head.

    Heads have their original number and width, for the stock frequencies to be right; MLPs have the width of the
    widest one left.

    Raises:
        InputError: the model does not know its original configuration, was changed beyond it, or has biases that no
            stock class has.
    """
    if not config.source:
        raise InputError("the model does not know its original configuration; export it with --format hf")
    family, raw, dense = _original(config)
    if changed := _changed_features(config, dense):
        raise InputError(
            f"the model differs from its original configuration in {', '.join(changed)}; export it with --format hf"
        )
    raw = raw | {"intermediate_size": max(shape.intermediate_size for shape in config.layers)}
    target = family.read_config(raw, json.dumps(raw))
    if _more_biases(config, dense):
        plain = _plain_class(target, config)
        if plain is None or any(shape.rotary_dim != shape.qk_head_dim for shape in target.layers):
            raise InputError(
                f"no stock class has {config.model_type}'s features and output biases; "
                "export it with --format hf, or prune it without --output-biases"
            )
        family, raw = plain
        target = family.read_config(raw, json.dumps(raw))
    frames = []
    for narrow, wide in zip(config.layers, target.layers, strict=True):
        half, rest = wide.rotary_dim // 2, narrow.qk_head_dim - narrow.rotary_dim
        places = tuple(range(wide.rotary_dim, wide.rotary_dim + rest))
        frames.append(Frame({pair: pair for pair in range(half)}, half, places))
    return StockForm(family, raw, target, WidenedArrays(config, arrays, target, frames))


def common_pairs(config: ModelConfig, arrays: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The RoPE pairs, in ascending order, that every KV head of every rotated layer kept; None where they differ."""
    rows = np.concatenate(
        [
            np.sort(np.asarray(arrays[f"layers.{i}.attention.rope_pairs"]), axis=1)
            for i, shape in enumerate(config.layers)
            if shape.rotary_dim == max(s.rotary_dim for s in config.layers)
        ]
    )
    return tuple(int(pair) for pair in rows[0]) if (rows == rows[0]).all() else None


def _original(config: ModelConfig) -> tuple[Family, dict[str, Any], ModelConfig]:
    """Family, `config.json` without what no longer holds, and description of the model before pruning."""
    raw = json.loads(config.source)
    family = find_family(raw)
    dense = family.read_config(raw, config.source)
    gone = ("auto_map", "_name_or_path", "torch_dtype")  # code that is not in the folder, and the old dtype
    tokens = {key: ids for key, ids in special_tokens(config).items() if getattr(dense, key) != getattr(config, key)}
    return family, _portable({key: value for key, value in raw.items() if key not in gone} | tokens), dense


def _portable(raw: dict[str, Any]) -> dict[str, Any]:
    """RoPE under the old keys, which every release of transformers reads; only 5.0 and newer read `rope_parameters`."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters")
    if not isinstance(given, Mapping):
        return raw
    raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling")}
    scaling = {key: value for key, value in given.items() if value is not None}
    raw |= {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", kind)
    if kind in (None, "default"):
        return raw
    if kind == "longrope" and "original_max_position_embeddings" in scaling:
        raw["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    # Phi-3's class of 4.x wants the name `type` and nothing beside the factors.
    name = "type" if raw.get("model_type") == "phi3" else "rope_type"
    return raw | {"rope_scaling": {name: kind, **scaling}}


def _changed_features(config: ModelConfig, dense: ModelConfig) -> list[str]:
    """Names of what changed beside the layers and their biases: somebody edited an export's `config.json`."""
    values = [
        {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        | {"rope": rope_parameters(model)}
        for model in (config, dense)
    ]
    pruned = ("layers", "attention_output_bias", "mlp_bias")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return [name for name, value in values[0].items() if value != values[1][name] and name not in (*pruned, *tokens)]


def _alike(config: ModelConfig, dense: ModelConfig) -> bool:
    """Whether one set of widths describes all layers, and layers rotate or not as they did."""
    first = config.layers[0]
    same = {(s.query_to_kv, s.qk_head_dim, s.v_head_dim, s.intermediate_size) for s in config.layers}
    rotated = {shape.rotary_dim for shape in config.layers if shape.rotary_dim}
    still = [bool(shape.rotary_dim) for shape in config.layers] == [bool(shape.rotary_dim) for shape in dense.layers]
    even = first.num_key_value_groups is not None and first.qk_head_dim == first.v_head_dim
    # transformers refuses numbers of heads that do not divide the hidden size.
    return len(same) == 1 and len(rotated) == 1 and still and even and not config.hidden_size % len(first.query_to_kv)


def _uniform(
    family: Family,
    raw: dict[str, Any],
    dense: ModelConfig,
    config: ModelConfig,
    arrays: Mapping[str, Any],
    pairs: tuple[int, ...],
) -> StockForm | None:
    """A smaller stock model: its own family's, or a Llama or Mistral where that one's class cannot express it."""
    shape = next(shape for shape in config.layers if shape.rotary_dim)
    width, rotary = shape.qk_head_dim, shape.rotary_dim
    # Phi-3's class checks the number of frequencies against hidden_size / heads, whatever the width of a head.
    if family.model_type == "phi3" or _more_biases(config, dense):
        plain = _plain_class(config, config)
        if plain is None or any(not layer.rotary_dim for layer in config.layers) or width % 2:
            return None
        (family, raw), rotary = plain, width
    if family.model_type == config.model_type and width == config.head_dim and 2 * len(pairs) == config.rotary_dim:
        scales, rope = (1.0, 1.0), {key: raw[key] for key in _ROPE_KEYS if key in raw}
    elif config.rope.rope_type == "dynamic":
        return None  # no list of factors grows with the length
    else:
        scales = query_scales(config, width)
        chosen = dataclasses.replace(config, rope=chosen_frequencies(config, pairs, rotary // 2))
        partial = {} if rotary == width else {"partial_rotary_factor": fraction(rotary, width)}
        rope = {"rope_parameters": rope_parameters(chosen) | partial}
    raw = _portable({key: value for key, value in raw.items() if key not in _ROPE_KEYS} | rope) | {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": width,
        "intermediate_size": shape.intermediate_size,
    }
    target = family.read_config(raw, json.dumps(raw))
    frames = []
    for layer in config.layers:
        rest = layer.qk_head_dim - layer.rotary_dim
        if rotary == width and layer.rotary_dim:
            frames.append(whole_head_frame(pairs, width, rest, *scales))
        else:
            slots, places = {pair: slot for slot, pair in enumerate(pairs)}, range(layer.rotary_dim, width)
            frames.append(Frame(slots, layer.rotary_dim // 2, tuple(places), *scales))
    return StockForm(family, raw, target, WidenedArrays(config, arrays, target, frames))


def _more_biases(config: ModelConfig, dense: ModelConfig) -> bool:
    return (config.attention_output_bias, config.mlp_bias) != (dense.attention_output_bias, dense.mlp_bias)


def _plain_class(shapes: ModelConfig, features: ModelConfig) -> tuple[Family, dict[str, Any]] | None:
    """Llama's or Mistral's configuration for a model whose layers are alike; None if it has what neither has.

    Args:
        shapes: what the layers look like.
        features: what else the model has; its biases are those that the class must have.
    """
    shape, windows = shapes.layers[0], {layer.sliding_window for layer in shapes.layers}
    biases = {
        "attention_bias": features.attention_bias or features.attention_output_bias,
        "mlp_bias": features.mlp_bias,
    }
    window = windows.pop()
    if windows or features.parallel_block or not features.gated_mlp or (window is not None and any(biases.values())):
        return None
    family = FAMILIES["LlamaForCausalLM" if window is None else "MistralForCausalLM"]
    return family, _portable(
        {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "vocab_size": features.vocab_size,
            "hidden_size": features.hidden_size,
            "num_hidden_layers": features.num_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.qk_head_dim,
            "intermediate_size": shape.intermediate_size,
            "hidden_act": features.hidden_act,
            "max_position_embeddings": features.max_position_embeddings,
            "rms_norm_eps": features.norm_eps,
            "rope_parameters": rope_parameters(features),
            "tie_word_embeddings": features.tie_word_embeddings,
            **special_tokens(features),
            **(biases if window is None else {"sliding_window": window}),
        }
    )
