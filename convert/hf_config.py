"""Hugging Face `config.json` to ModelConfig, with the defaults of each family's own configuration class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from intraslice_jax.config import LayerShape, ModelConfig, RopeConfig, uniform_query_to_kv
from intraslice_jax.convert.pruned_config import pruned_layers
from intraslice_jax.convert.rotation import fraction
from intraslice_jax.errors import InputError
from intraslice_jax.models.mlp import check_activation
from intraslice_jax.models.rope import ROPE_TYPES

# What each scaling type needs, and what it may have beside it.
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}

_OWN_FEATURES = ("norm", "parallel_block", "gated_mlp", "attention_output_bias", "lm_head_bias")

_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def llama(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """LlamaConfig."""
    raw = {**_LLAMA_TOKENS, **raw}
    return _model(raw, source, "llama", attention_output_bias=_flag(raw, "attention_bias"))


def mistral(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """MistralConfig: every layer has the same sliding window, 4096 where the key is missing."""
    window = _window(raw, 4096)
    return _model({**_LLAMA_TOKENS, **_without_biases(raw)}, source, "mistral", windows=[window] * _layers(raw))


def qwen2(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """Qwen2Config: biases on queries, keys and values; layers from `max_window_layers` on may have a window."""
    layers = _layers(raw)
    window = _window(raw, 4096) if _flag(raw, "use_sliding_window") else None
    start = raw.get("max_window_layers", 28)
    types = _layer_types(raw, ["sliding_attention" if i >= start else "full_attention" for i in range(layers)])
    windows = [window if kind == "sliding_attention" else None for kind in types]
    return _model({**_without_biases(raw), "attention_bias": True}, source, "qwen2", windows=windows)


def smollm3(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """SmolLM3Config: layers that `no_rope_layers` marks with 0 do not rotate."""
    layers = _layers(raw)
    interval = _positive(raw, "no_rope_layer_interval", 4)
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(layers)]
    if len(rotated) < layers:
        raise InputError(f"no_rope_layers must hold {layers} numbers, one per layer, found {len(rotated)}")
    window = _window(raw, None) if _flag(raw, "use_sliding_window") else None
    types = _layer_types(raw, ["full_attention" if on else "sliding_attention" for on in rotated[:layers]])
    return _model(
        {"num_key_value_heads": 4, "tie_word_embeddings": True, **raw},
        source,
        "smollm3",
        theta=2000000.0,
        attention_output_bias=_flag(raw, "attention_bias"),
        windows=[window if kind == "sliding_attention" else None for kind in types],
        rotated=[bool(on) for on in rotated[:layers]],
    )


def phi3(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """Phi3Config: Phi-3, 3.5-mini, 4 and 4-mini. `su` and `yarn` are old names of its `longrope`."""
    raw = {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096, **_without_biases(raw)}
    window = _window(raw, None)
    return _model(
        {"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000, **raw},
        source,
        "phi3",
        windows=[window] * _layers(raw),
        partial_rotary=1.0,
        rope_types={"su": "longrope", "yarn": "longrope"},
    )


def phi(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """PhiConfig: Phi-1, 1.5 and 2."""
    if raw.get("qk_layernorm"):
        raise InputError("qk_layernorm (a norm on queries and keys) is not supported; supported: qk_layernorm false")
    return _model(
        {
            "hidden_act": "gelu_new",
            **_LLAMA_TOKENS,
            **raw,
            "rms_norm_eps": raw.get("layer_norm_eps", 1e-5),
            "attention_bias": True,
            "mlp_bias": True,
        },
        source,
        "phi",
        partial_rotary=0.5,
        attention_output_bias=True,
        norm="layer",
        parallel_block=True,
        gated_mlp=False,
        lm_head_bias=True,
    )


def intraslice(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """This program's own exports; `source` is the original model's configuration, inside this one."""
    del source
    if not isinstance(raw.get("intraslice"), Mapping):
        raise InputError("the key intraslice, which describes what has no other place, is missing")
    layers, own = pruned_layers(raw)
    # The modelling file does not look at this one.
    ropes = {
        key: {name: value for name, value in raw[key].items() if name != "partial_rotary_factor"}
        for key in ("rope_parameters", "rope_scaling")
        if isinstance(raw.get(key), Mapping)
    }
    model = _model(
        # As an unpruned model that has these features; its heads rotate as the original's did.
        {
            **{key: value for key, value in raw.items() if key not in ("per_layer_config", *ropes)},
            **ropes,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": own["head_dim"],
            "rms_norm_eps": own["norm_eps"],
            "attention_bias": own["attention_bias"],
            "mlp_bias": own["mlp_bias"],
            "partial_rotary_factor": fraction(own["rotary_dim"], own["head_dim"]),
        },
        own["source"],
        own["model_type"],
        partial_rotary=1.0,
        **{name: own[name] for name in _OWN_FEATURES},
    )
    return model.with_layers(layers)


def _model(
    raw: Mapping[str, Any],
    source: str,
    model_type: str,
    *,
    windows: Sequence[int | None] | None = None,
    rotated: Sequence[bool] | None = None,
    theta: float = 10000.0,
    partial_rotary: float | None = None,
    rope_types: Mapping[str, str] | None = None,
    **features: Any,
) -> ModelConfig:
    """What all families share.

    Args:
        raw: the parsed file, completed by what the family's defaults add.
        source: its text.
        model_type: the family.
        windows: sliding window of each layer.
        rotated: whether each layer rotates queries and keys.
        theta: the family's default RoPE base.
        partial_rotary: default of `partial_rotary_factor`, None where the family always rotates whole heads.
        rope_types: the family's other names of scaling types.
        features: further fields of ModelConfig.
    """
    _refuse(raw)
    layers, hidden = _layers(raw), _positive(raw, "hidden_size")
    heads = _positive(raw, "num_attention_heads")
    kv_heads = _positive(raw, "num_key_value_heads", heads)
    query_to_kv = uniform_query_to_kv(heads, kv_heads)
    if raw.get("head_dim") is None and hidden % heads:
        raise InputError(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    head_dim = _positive(raw, "head_dim", hidden // heads)
    max_positions = _positive(raw, "max_position_embeddings", 2048)
    rope, rotary_dim = _rope(raw, head_dim, max_positions, theta, partial_rotary, rope_types or {})
    hidden_act = raw.get("hidden_act", "silu")
    check_activation(hidden_act)
    shapes = [
        LayerShape(
            query_to_kv=query_to_kv,
            qk_head_dim=head_dim,
            rotary_dim=rotary_dim if rotated is None or rotated[i] else 0,
            v_head_dim=head_dim,
            intermediate_size=_positive(raw, "intermediate_size"),
            sliding_window=None if windows is None else windows[i],
        )
        for i in range(layers)
    ]
    return ModelConfig(
        model_type=model_type,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        layers=tuple(shapes),
        rope=rope,
        max_position_embeddings=max_positions,
        hidden_act=hidden_act,
        norm_eps=_number("", raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
        attention_bias=_flag(raw, "attention_bias"),
        mlp_bias=_flag(raw, "mlp_bias"),
        bos_token_id=_token(raw, "bos_token_id"),
        eos_token_id=_tokens(raw, "eos_token_id"),
        pad_token_id=_token(raw, "pad_token_id"),
        source=source,
        **features,
    )


def _rope(
    raw: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    theta: float,
    partial_rotary: float | None,
    rope_types: Mapping[str, str],
) -> tuple[RopeConfig, int]:
    """The scaling and the rotated channels of a head, from new `rope_parameters` or old `rope_scaling`."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"rope_parameters must be a mapping, found {given!r}")
    if any(isinstance(value, Mapping) for value in given.values()):
        raise InputError("rope_parameters that differ between kinds of layers are not supported")
    rope_type = given.get("rope_type") or given.get("type") or "default"
    rope_type = rope_types.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise InputError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")

    both = {**raw, **given}
    fraction = _number("", both, "partial_rotary_factor", 1.0 if partial_rotary is None else partial_rotary)
    if partial_rotary is None and fraction != 1:
        raise InputError(f"partial_rotary_factor {fraction} is not supported in this family, expected 1")
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise InputError(
            f"partial_rotary_factor {fraction} of head_dim {head_dim} rotates {rotary_dim} channels, "
            f"expected an even number from 2 to {head_dim}"
        )
    if rope_type == "dynamic" and rotary_dim < 4:
        raise InputError(f"rope_type 'dynamic' needs at least 4 rotated channels, found {rotary_dim}")

    parameters: dict[str, Any] = {}
    for name in (*_REQUIRED[rope_type], *_OPTIONAL.get(rope_type, ())):
        value = given.get(name)
        if value is None and name not in _REQUIRED[rope_type]:
            continue
        if name in ("short_factor", "long_factor"):
            parameters[name] = _factors(name, value, rotary_dim // 2)
        elif name == "truncate":
            parameters[name] = bool(value)
        else:
            parameters[name] = _number(f"rope_type {rope_type!r}: ", given, name)
    if rope_type in ("llama3", "yarn", "longrope"):
        name = "original_max_position_embeddings"
        parameters[name] = _positive(raw, name, given.get(name) or max_positions)
    if rope_type == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise InputError("rope_type 'llama3': high_freq_factor must be above low_freq_factor")
    base = _number("", both, "rope_theta", theta)
    return RopeConfig(base, rope_type, tuple(sorted(parameters.items()))), rotary_dim


def _factors(name: str, value: Any, count: int) -> tuple[float, ...]:
    good = isinstance(value, list | tuple) and all(isinstance(x, int | float) and x > 0 for x in value)
    if not good or len(value) != count:
        found = f"{len(value)} entries" if isinstance(value, list | tuple) else repr(value)
        raise InputError(f"rope {name} must hold {count} positive numbers, one per frequency, found {found}")
    return tuple(float(x) for x in value)


def _refuse(raw: Mapping[str, Any]) -> None:
    """Options that change the mathematics and have no counterpart here."""
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown method")
        raise InputError(
            f"quantised weights ({method}) are not supported; use the original float checkpoint or a GGUF file"
        )
    if raw.get("per_layer_config"):
        raise InputError("per_layer_config is not supported in this family")


def _without_biases(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Families without bias options ignore them, as transformers does."""
    return {key: value for key, value in raw.items() if key not in ("attention_bias", "mlp_bias")}


def _layer_types(raw: Mapping[str, Any], default: list[str]) -> list[str]:
    types = raw.get("layer_types")
    if types is None:
        return default
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != len(default):
        found = ", ".join(sorted(unknown)) or f"{len(types)} entries"
        raise InputError(
            f"layer_types must hold {len(default)} times full_attention or sliding_attention, found {found}"
        )
    return list(types)


def _layers(raw: Mapping[str, Any]) -> int:
    return _positive(raw, "num_hidden_layers")


def _window(raw: Mapping[str, Any], default: int | None) -> int | None:
    """Positions that a query sees; null or a missing key with no default mean all."""
    if raw.get("sliding_window", default) is None:
        return None
    return _positive(raw, "sliding_window", default)


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = "nothing" if value is None else repr(value)
        raise InputError(f"{key} must be a positive whole number, found {found}")
    return value


def _number(prefix: str, raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if value is None or not good:
        raise InputError(f"{prefix}{key} must be a positive number, found {'nothing' if value is None else value!r}")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False):
        raise InputError(f"{key} must be true or false, found {value!r}")
    return bool(value)


def _token(raw: Mapping[str, Any], key: str) -> int | None:
    tokens = _tokens(raw, key)
    return tokens[0] if tokens else None


def _tokens(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in tokens):
        raise InputError(f"{key} must be a token id or a list of them, found {value!r}")
    return tuple(tokens)
