"""Tiny models of every family that lost heads, RoPE pairs and channels, with random weights."""

import dataclasses
import json
from typing import Any

import numpy as np

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.convert.families import FAMILIES
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from tests.convert.exported import VOCAB, with_random_weights
from tests.tiny import tiny_config

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 6.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.75,
}
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3}),
    "llama yarn": ("LlamaForCausalLM", {"rope_parameters": _YARN}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0, "sliding_window": 9}),
    "phi3 longrope": (
        "Phi3ForCausalLM",
        {"pad_token_id": 0, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 16},
    ),
    "phi": (
        "PhiForCausalLM",
        {
            "hidden_act": "gelu_new",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
}


def dense_config(case: str) -> ModelConfig:
    """The unpruned model: two layers of four query and two KV heads of eight channels."""
    architecture, options = FAMILY_CASES[case]
    family = FAMILIES[architecture]
    fixed = {"architectures": [architecture], "model_type": family.model_type, "vocab_size": VOCAB}
    raw = tiny_config(**fixed, max_position_embeddings=64, **options)
    if "rope_parameters" in raw:
        raw.pop("rope_theta")
    return family.read_config(raw, json.dumps(raw))


def ragged(case: str, **changes: Any) -> LanguageModel:
    """Layers of their own widths, uneven groups, values narrower and wider than queries and keys."""
    dense = dense_config(case)
    first, second = dense.layers
    layers = (
        _narrow(first, (0, 0, 1), rotary=4, rest=1, v_head_dim=6, intermediate_size=40),
        _narrow(second, (0, 1), rotary=2, rest=2, v_head_dim=8, intermediate_size=24),
    )
    return with_random_weights(dataclasses.replace(dense.with_layers(layers), **changes))


def uniform(case: str) -> LanguageModel:
    """Two KV heads of one query head each, the same RoPE pairs everywhere, six channels, MLPs of 40."""
    dense = dense_config(case)
    layers = tuple(
        _narrow(shape, (0, 1), rotary=4, rest=2, v_head_dim=6, intermediate_size=40) for shape in dense.layers
    )
    # Heads all of whose channels rotate keep three pairs.
    layers = tuple(
        dataclasses.replace(s, qk_head_dim=6, rotary_dim=6) if wide.rotary_dim == wide.qk_head_dim else s
        for s, wide in zip(layers, dense.layers, strict=True)
    )
    model = with_random_weights(dense.with_layers(layers))
    arrays = decoder_to_arrays(model.decoder)
    for i, shape in enumerate(layers):
        kept = np.asarray([0, 2, 3][: shape.rotary_dim // 2] if dense.rotary_dim == 8 else [0, 1], np.int32)
        arrays[f"layers.{i}.attention.rope_pairs"] = np.tile(kept[: shape.rotary_dim // 2], (2, 1))
    return dataclasses.replace(model, decoder=decoder_from_arrays(model.config, arrays))


def _narrow(shape: LayerShape, query_to_kv: tuple[int, ...], rotary: int, rest: int, **widths: int) -> LayerShape:
    """The layer with fewer channels; where all or none of a head's rotated, that stays so."""
    if shape.rotary_dim in (0, shape.qk_head_dim):
        rest, rotary = (rotary + rest, 0) if shape.rotary_dim == 0 else (0, rotary)
    return dataclasses.replace(shape, query_to_kv=query_to_kv, qk_head_dim=rotary + rest, rotary_dim=rotary, **widths)
