"""Hugging Face `config.json` to ModelConfig, with the defaults of each family's own configuration class."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from transformers import AutoConfig
from typing_extensions import TypedDict

from intraslice_jax.config import LayerShape, ModelConfig, RopeConfig, uniform_query_to_kv
from intraslice_jax.convert.pruned_config import pruned_layers
from intraslice_jax.convert.rotation import STILL, fraction
from intraslice_jax.errors import InputError
from intraslice_jax.models.mlp import check_activation
from intraslice_jax.models.rope import ROPE_TYPES
from intraslice_jax.reading import Count, Index, Positive, check

_Layers = Annotated[int, Field(ge=1, le=10_000)]
_Heads = Annotated[int, Field(ge=1, le=10_000)]
_Theta = Annotated[float, Field(gt=1, le=1e15)]
_Scale = Annotated[float, Field(ge=1e-6, le=STILL)]
_Epsilon = Annotated[float, Field(gt=0, le=1)]

TokenId = Annotated[int, Field(ge=-1, le=2**31 - 1)]
"""Some files say -1 where there is none."""


class _Rope(TypedDict, total=False):
    """`rope_parameters`, or the old `rope_scaling`."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    rope_type: str | None
    type: str | None
    rope_theta: _Theta | None
    partial_rotary_factor: Positive | None
    original_max_position_embeddings: Count | None
    factor: _Scale | None
    low_freq_factor: _Scale | None
    high_freq_factor: _Scale | None
    attention_factor: _Scale | None
    beta_fast: _Scale | None
    beta_slow: _Scale | None
    mscale: _Scale | None
    mscale_all_dim: _Scale | None
    truncate: bool
    short_factor: list[_Scale] | None
    long_factor: list[_Scale] | None


class _Fields(TypedDict, total=False):
    """The fields of all families that say what a model computes; others may stand beside them."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    architectures: list[str] | None
    model_type: str | None
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: _Layers
    num_attention_heads: _Heads
    num_key_value_heads: _Heads | None
    head_dim: Count | None
    hidden_act: str
    max_position_embeddings: Count
    original_max_position_embeddings: Count | None
    rms_norm_eps: _Epsilon
    layer_norm_eps: _Epsilon
    tie_word_embeddings: bool | None
    attention_bias: bool | None
    mlp_bias: bool | None
    bos_token_id: TokenId | None
    eos_token_id: TokenId | list[TokenId] | None
    pad_token_id: TokenId | None
    rope_theta: _Theta | None
    rope_parameters: _Rope | None
    rope_scaling: _Rope | None
    partial_rotary_factor: Positive | None
    sliding_window: Count | None
    use_sliding_window: bool | None
    max_window_layers: Index
    layer_types: list[str] | None
    no_rope_layers: list[int] | None
    no_rope_layer_interval: Count
    qk_layernorm: bool | None
    quantization_config: dict[str, Any] | None


_REFUSED = {
    "is_encoder_decoder": "true",
    "per_layer_config": "other widths or windows in single layers",
    "attention_chunk_size": "attention within chunks",
    "kv_sharing_modes": "layers that share keys and values",
    "attribute_map": "fields that stand for others",
    "text_config": "a configuration inside this one",
    "text_encoder": "a configuration inside this one",
    "decoder": "a configuration inside this one",
    "generator": "a configuration inside this one",
}
"""Fields that transformers honours whatever the family, and what they would mean; null, false and nothing are fine."""

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


def llama(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """LlamaConfig."""
    raw = _completed(raw, "llama")
    _windows(raw, None, [False] * raw["num_hidden_layers"])
    _refuse_windows(raw)
    return _model(raw, source, attention_output_bias=bool(raw["attention_bias"]))


def mistral(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """MistralConfig: every layer has the same sliding window, 4096 where the key is missing."""
    raw = _completed(raw, "mistral")
    return _model(raw | _NO_BIASES, source, windows=_same_window(raw))


def qwen2(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """Qwen2Config: biases on queries, keys and values; layers from `max_window_layers` on may have a window."""
    raw = _completed(raw, "qwen2")
    window, start = raw["sliding_window"] if raw["use_sliding_window"] else None, raw["max_window_layers"]
    sliding = [i >= start for i in range(raw["num_hidden_layers"])]
    return _model(raw | _NO_BIASES | {"attention_bias": True}, source, windows=_windows(raw, window, sliding))


def smollm3(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """SmolLM3Config: layers that `no_rope_layers` marks with 0 do not rotate."""
    raw = _completed(raw, "smollm3")
    layers, interval, rotated = raw["num_hidden_layers"], raw["no_rope_layer_interval"], raw["no_rope_layers"]
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(layers)]
    if len(rotated) < layers:
        raise InputError(f"no_rope_layers must hold {layers} numbers, one per layer, found {len(rotated)}")
    window = raw["sliding_window"] if raw["use_sliding_window"] else None
    return _model(
        raw,
        source,
        theta=2000000.0,
        attention_output_bias=bool(raw["attention_bias"]),
        windows=_windows(raw, window, [not on for on in rotated[:layers]]),
        rotated=[bool(on) for on in rotated[:layers]],
    )


def phi3(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """Phi3Config: Phi-3, 3.5-mini, 4 and 4-mini. `su` and `yarn` are old names of its `longrope`."""
    raw = _completed(raw, "phi3")
    return _model(
        raw | _NO_BIASES,
        source,
        windows=_same_window(raw),
        partial_rotary=1.0,
        rope_types={"su": "longrope", "yarn": "longrope"},
    )


def phi(raw: Mapping[str, Any], source: str = "") -> ModelConfig:
    """PhiConfig: Phi-1, 1.5 and 2."""
    raw = _completed(raw, "phi")
    if raw["qk_layernorm"]:
        raise InputError("qk_layernorm (a norm on queries and keys) is not supported; supported: qk_layernorm false")
    _windows(raw, None, [False] * raw["num_hidden_layers"])
    _refuse_windows(raw)
    return _model(
        raw | {"rms_norm_eps": raw["layer_norm_eps"], "attention_bias": True, "mlp_bias": True},
        source,
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
    layers, own = pruned_layers(raw)
    # Read as an unpruned model's that has these features, with heads that rotate as the original's did.
    shared = {key: value for key, value in raw.items() if key != "per_layer_config"}
    shared = _completed({**_NO_TOKENS, **shared}, "llama")
    for key in ("rope_parameters", "rope_scaling"):  # the modelling file does not look at this one
        shared[key] = {k: v for k, v in (shared[key] or {}).items() if k != "partial_rotary_factor"}
    shared |= {
        "model_type": own["model_type"],
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": own["head_dim"],
        "partial_rotary_factor": fraction(own["rotary_dim"], own["head_dim"]),
        "rms_norm_eps": own["norm_eps"],
        "attention_bias": own["attention_bias"],
        "mlp_bias": own["mlp_bias"],
    }
    features = ("norm", "parallel_block", "gated_mlp", "attention_output_bias", "lm_head_bias")
    model = _model(shared, own["source"], partial_rotary=1.0, **{name: own[name] for name in features})
    return model.with_layers(layers)


_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""Defaults of our own configuration class."""

_NO_BIASES = {"attention_bias": False, "mlp_bias": False}
"""Of families without bias options, which ignore them, as transformers does."""


def _completed(raw: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The checked file with the defaults of the family's configuration class where a key is missing.

    Raises:
        InputError: a field has another type or is out of bounds, or changes the mathematics in a way that has no
            counterpart here.
    """
    checked: Mapping[str, Any] = check({**_defaults(model_type), **raw, "model_type": model_type}, _Fields, "")
    _refuse(checked)
    return dict(checked)


def _refuse(raw: Mapping[str, Any]) -> None:
    """Raises InputError for what changes the mathematics and has no counterpart here."""
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method")
        raise InputError(
            f"quantised weights ({method}) are not supported; use the original float checkpoint or a GGUF file"
        )
    if not raw.get("is_causal", True):  # to transformers null and 0 are false as well
        raise InputError("is_causal false (attention to later tokens) is not supported; supported: is_causal true")
    for name, meaning in _REFUSED.items():
        if raw.get(name):
            raise InputError(f"{name} ({meaning}) is not supported; remove it if the model does without")


@functools.cache
def _defaults(model_type: str) -> dict[str, Any]:
    """What the configuration class of transformers says where config.json is silent."""
    default = AutoConfig.for_model(model_type)
    # Some classes derive these from other fields; a key that is missing must stay so until the file is known.
    derived = {"head_dim", "layer_types", "no_rope_layers"}
    derived |= {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
    fields = {name: None if name in derived else getattr(default, name, None) for name in _Fields.__annotations__}
    declared = type(default).__dataclass_fields__
    for name in ("num_key_value_heads", "sliding_window"):  # null, or only with use_sliding_window
        if name in declared:
            fields[name] = declared[name].default
    # Not fields of every class, and no default of their own.
    required = {"architectures", "layer_norm_eps", "rms_norm_eps", "max_window_layers", "no_rope_layer_interval"}
    return {name: value for name, value in fields.items() if value is not None or name not in required}


def _refuse_windows(raw: Mapping[str, Any]) -> None:
    """In these families transformers masks no window, but its caches forget what is outside of one."""
    window = raw["sliding_window"]
    if window is not None and window < raw["max_position_embeddings"]:
        raise InputError(f"sliding_window {window} is not supported in this family; supported: null")


def _same_window(raw: Mapping[str, Any]) -> list[int | None]:
    """The window of each layer in families that give all the same."""
    window = raw["sliding_window"]
    return _windows(raw, window, [window is not None] * raw["num_hidden_layers"], by_layer=False)


def _windows(
    raw: Mapping[str, Any], window: int | None, sliding: Sequence[bool], by_layer: bool = True
) -> list[int | None]:
    """The window of each layer.

    Args:
        raw: the checked file; its `layer_types` go before what the family derives.
        window: of the layers that have one.
        sliding: which layers the family derives to have one.
        by_layer: whether layers of the family may differ in that.
    """
    if raw["layer_types"] is not None:
        types = ["full_attention" if kind == "attention" else kind for kind in raw["layer_types"]]  # an old name
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != len(sliding):
            found = ", ".join(sorted(unknown)) or f"{len(types)} entries"
            raise InputError(
                f"layer_types must hold {len(sliding)} times full_attention or sliding_attention, found {found:.100}"
            )
        derived, sliding = sliding, [kind == "sliding_attention" for kind in types]
        if window is None and any(sliding):
            raise InputError("layer_types names sliding_attention, but the model has no sliding_window in use")
        if not by_layer and sliding != derived:
            raise InputError("layer_types contradicts sliding_window, which is of all layers in this family")
    return [window if on else None for on in sliding]


def _model(
    raw: Mapping[str, Any],
    source: str,
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
        raw: the checked file, completed by the family's defaults.
        source: its text.
        windows: sliding window of each layer.
        rotated: whether each layer rotates queries and keys.
        theta: the family's default RoPE base.
        partial_rotary: default of `partial_rotary_factor`, None where the family always rotates whole heads.
        rope_types: the family's other names of scaling types.
        features: further fields of ModelConfig.
    """
    layers, hidden, heads = raw["num_hidden_layers"], raw["hidden_size"], raw["num_attention_heads"]
    query_to_kv = uniform_query_to_kv(heads, raw["num_key_value_heads"] or heads)
    if raw["head_dim"] is None and hidden % heads:
        raise InputError(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    head_dim = raw["head_dim"] or hidden // heads
    rope, rotary_dim = _rope(raw, head_dim, theta, partial_rotary, rope_types or {})
    check_activation(raw["hidden_act"])

    @functools.cache  # layers that are alike are one object
    def shape(rotary_dim: int, window: int | None) -> LayerShape:
        return LayerShape(query_to_kv, head_dim, rotary_dim, head_dim, raw["intermediate_size"], window)

    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=hidden,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        layers=tuple(
            shape(rotary_dim if rotated is None or rotated[i] else 0, None if windows is None else windows[i])
            for i in range(layers)
        ),
        rope=rope,
        max_position_embeddings=raw["max_position_embeddings"],
        hidden_act=raw["hidden_act"],
        norm_eps=raw["rms_norm_eps"],
        tie_word_embeddings=bool(raw["tie_word_embeddings"]),
        attention_bias=bool(raw["attention_bias"]),
        mlp_bias=bool(raw["mlp_bias"]),
        bos_token_id=next(iter(_tokens(raw["bos_token_id"])), None),
        eos_token_id=_tokens(raw["eos_token_id"]),
        pad_token_id=next(iter(_tokens(raw["pad_token_id"])), None),
        source=source,
        **features,
    )


def _rope(
    raw: Mapping[str, Any],
    head_dim: int,
    theta: float,
    partial_rotary: float | None,
    rope_types: Mapping[str, str],
) -> tuple[RopeConfig, int]:
    """The scaling and the rotated channels of a head, from new `rope_parameters` or old `rope_scaling`."""
    given: Mapping[str, Any] = raw["rope_scaling"] or raw["rope_parameters"] or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        raise InputError("rope_parameters that differ between kinds of layers are not supported")
    rope_type = given.get("rope_type") or given.get("type") or "default"
    rope_type = rope_types.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise InputError(f"rope_type {rope_type[:60]!r} is not supported; supported: {', '.join(ROPE_TYPES)}")

    both = {**raw, **{name: value for name, value in given.items() if value is not None}}
    fraction = both.get("partial_rotary_factor") or partial_rotary or 1.0
    if partial_rotary is None and fraction != 1:
        raise InputError(f"partial_rotary_factor {fraction} is not supported in this family, expected 1")
    if fraction > 1 or int(head_dim * fraction) % 2 or int(head_dim * fraction) < 2:
        raise InputError(
            f"partial_rotary_factor {fraction} of head_dim {head_dim} rotates {head_dim * fraction:g} channels, "
            f"expected an even number from 2 to {head_dim}"
        )
    rotary_dim = int(head_dim * fraction)
    if rope_type == "dynamic" and rotary_dim < 4:
        raise InputError(f"rope_type 'dynamic' needs at least 4 rotated channels, found {rotary_dim}")

    parameters: dict[str, Any] = {}
    for name in (*_REQUIRED[rope_type], *_OPTIONAL.get(rope_type, ())):
        value = given.get(name)
        if value is not None:
            parameters[name] = _factors(name, value, rotary_dim // 2) if isinstance(value, list) else value
        elif name in _REQUIRED[rope_type]:
            raise InputError(f"rope_type {rope_type!r}: {name} is missing")
    if rope_type in ("llama3", "yarn", "longrope"):
        name = "original_max_position_embeddings"
        parameters[name] = raw.get(name) or given.get(name) or raw["max_position_embeddings"]
    if rope_type == "longrope" and parameters["original_max_position_embeddings"] < 2:
        raise InputError("rope_type 'longrope': original_max_position_embeddings must be at least 2, found 1")
    if rope_type == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise InputError("rope_type 'llama3': high_freq_factor must be above low_freq_factor")
    return RopeConfig(both.get("rope_theta") or theta, rope_type, tuple(sorted(parameters.items()))), rotary_dim


def _factors(name: str, factors: Sequence[float], count: int) -> tuple[float, ...]:
    if len(factors) != count:
        raise InputError(
            f"rope {name} must hold {count} positive numbers, one per frequency, found {len(factors)} entries"
        )
    return tuple(factors)


def _tokens(given: int | list[int] | None) -> tuple[int, ...]:
    tokens = given if isinstance(given, list) else [-1 if given is None else given]
    return tuple(token for token in tokens if token >= 0)
