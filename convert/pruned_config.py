"""The `config.json` of a pruned export: what `modeling_intraslice.py` and transformers read."""

from __future__ import annotations

from typing import Any

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError

MODELING_FILE = "modeling_intraslice"


def pruned_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The JSON object.

    The key `intraslice` is the whole description; the usual keys beside it let transformers' own machinery
    (`generate`, caches, masks) and other programs understand the model. Top-level widths are the largest of the
    layers and the original head width, `per_layer_config` holds what differs from them in a layer.

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
    eos = config.eos_token_id
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
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "dtype": dtype,
        "intraslice": config.to_json(),
    }


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """RoPE as transformers spells it, with the values that it does not default itself."""
    rope = config.rope
    values: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in rope.parameters
    }
    if rope.rope_type in ("yarn", "longrope", "llama3"):
        original = values.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        if rope.rope_type != "llama3":
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
