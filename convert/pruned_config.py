"""The `config.json` of a pruned export: written for `modeling_intraslice.py` and transformers, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.reading import Count, Index, Positive, check

MODELING_FILE = "modeling_intraslice"


class _Layer(TypedDict):
    """What a layer has beside widths. Files of the first version repeat the widths here."""

    query_to_kv: list[Index]
    rotary_dim: Index
    qk_head_dim: NotRequired[Count]
    v_head_dim: NotRequired[Count]
    intermediate_size: NotRequired[Count]
    sliding_window: NotRequired[Count | None]


class _Own(TypedDict):
    """The key `intraslice`. Files of the first version repeat the rest of `config.json` in it."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    model_type: str
    head_dim: Count
    rotary_dim: Count
    norm: Literal["rms", "layer"]
    norm_eps: Positive
    parallel_block: bool
    gated_mlp: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    lm_head_bias: bool
    layers: list[_Layer]
    source: str


_OWN = tuple(name for name in _Own.__annotations__ if name != "layers")


class _Widths(TypedDict):
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    v_head_dim: Count
    intermediate_size: Count


class _Changed(TypedDict, total=False):
    """Widths in which a layer differs from the top level."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # pyright: ignore[reportGeneralTypeIssues]

    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    v_head_dim: Count
    intermediate_size: Count


class _File(_Widths):
    """What describes layers in the `config.json` of a pruned export."""

    num_hidden_layers: Count
    layer_types: list[Literal["full_attention", "sliding_attention"]]
    sliding_window: NotRequired[Count | None]
    per_layer_config: NotRequired[dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], _Changed] | None]
    intraslice: _Own


def pruned_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The JSON object.

    Nothing is said twice: the usual keys describe the model as far as they can. Widths at the top level are the
    original head width and the largest of the layers; `per_layer_config` has what differs from them in a layer. The key
    `intraslice` holds what has no other place: features of the family, the width that sets the softmax scale and its
    rotated channels, which query head reads which key/value head, and how many channels of a layer's heads rotate.

    Raises:
        InputError: layers have sliding windows of different sizes, for which transformers has no masks.
    """
    windows = {shape.sliding_window for shape in config.layers if shape.sliding_window is not None}
    if len(windows) > 1:
        raise InputError(f"sliding windows of different sizes {sorted(windows)} cannot be exported; expected one size")
    layers = [_widths(shape) for shape in config.layers]
    top = {name: max(widths[name] for widths in layers) for name in layers[0]} | {"head_dim": config.head_dim}
    different = {
        str(i): changed
        for i, widths in enumerate(layers)
        if (changed := {name: value for name, value in widths.items() if value != top[name]})
    }
    return {
        "architectures": ["IntraSliceForCausalLM"],
        "model_type": "intraslice",
        "auto_map": {
            "AutoConfig": f"{MODELING_FILE}.IntraSliceConfig",
            "AutoModel": f"{MODELING_FILE}.IntraSliceModel",
            **{
                f"AutoModelFor{task}": f"{MODELING_FILE}.IntraSliceFor{task}"
                for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
            },
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        **top,
        **({"per_layer_config": different} if different else {}),
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope_parameters(config),
        "sliding_window": windows.pop() if windows else None,
        "layer_types": [
            "full_attention" if shape.sliding_window is None else "sliding_attention" for shape in config.layers
        ],
        "tie_word_embeddings": config.tie_word_embeddings,
        **special_tokens(config),
        "use_cache": True,
        "dtype": dtype,
        "intraslice": {
            **{name: getattr(config, name) for name in _OWN},
            "layers": [
                {"query_to_kv": list(shape.query_to_kv), "rotary_dim": shape.rotary_dim} for shape in config.layers
            ],
        },
    }


def pruned_layers(raw: Mapping[str, Any]) -> tuple[tuple[LayerShape, ...], dict[str, Any]]:
    """The layers that a pruned export's `config.json` describes, and the rest of its key `intraslice`.

    Raises:
        InputError: a value is missing or malformed, or two of them contradict each other.
    """
    file = check(dict(raw), _File, "")
    own, changed = file["intraslice"], {int(i): widths for i, widths in (file.get("per_layer_config") or {}).items()}
    count = file["num_hidden_layers"]
    for name, length in (("intraslice.layers", len(own["layers"])), ("layer_types", len(file["layer_types"]))):
        if length != count:
            raise InputError(f"num_hidden_layers is {count}, but {name} has {length} entries")
    if not changed.keys() <= set(range(count)):
        raise InputError(f"per_layer_config names layer {max(changed)}, but num_hidden_layers is {count}")
    layers = []
    for i, layer in enumerate(own["layers"]):
        widths = {**{name: file[name] for name in _Widths.__annotations__}, **changed.get(i, {})}
        shape = LayerShape(
            query_to_kv=tuple(layer["query_to_kv"]),
            qk_head_dim=widths["head_dim"],
            rotary_dim=layer["rotary_dim"],
            v_head_dim=widths["v_head_dim"],
            intermediate_size=widths["intermediate_size"],
            sliding_window=file.get("sliding_window") if file["layer_types"][i] == "sliding_attention" else None,
        )
        _agree(i, shape, widths, layer)
        layers.append(shape)
    return tuple(layers), {name: own[name] for name in _OWN}


def _agree(i: int, shape: LayerShape, widths: Mapping[str, int], layer: Mapping[str, Any]) -> None:
    """Raises InputError where a layer's numbers of heads, or the copies in an older file, say something else."""
    for name, value in _widths(shape).items():
        if value != widths[name]:
            raise InputError(f"{name} of layer {i} is {widths[name]}, but its intraslice.query_to_kv makes it {value}")
    for name in ("qk_head_dim", "v_head_dim", "intermediate_size", "sliding_window"):
        if name in layer and layer[name] != getattr(shape, name):
            raise InputError(f"{name} of layer {i} is {getattr(shape, name)}, but intraslice.layers says {layer[name]}")


def special_tokens(config: ModelConfig) -> dict[str, int | list[int] | None]:
    """Ids as `config.json` has them: null where there is none, a list where there are several."""
    eos = config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
    }


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """RoPE as transformers spells it, with the values that it does not default itself."""
    rope = config.rope
    values: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in rope.parameters
    }
    if rope.rope_type in ("yarn", "longrope", "llama3"):
        original = values.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        if rope.rope_type == "yarn":
            values.setdefault("factor", config.max_position_embeddings / original)
    return {"rope_type": rope.rope_type, "rope_theta": rope.theta, **values}


def _widths(shape: LayerShape) -> dict[str, int]:
    return {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.qk_head_dim,
        "v_head_dim": shape.v_head_dim,
        "intermediate_size": shape.intermediate_size,
    }
