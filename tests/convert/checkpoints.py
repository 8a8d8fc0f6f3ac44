"""Tiny checkpoints of every family and option, made by transformers' own PyTorch classes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 6.0],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.75,
}
PHI3_LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}

# Name of the case: family and what differs from SIZES and the family's defaults.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu"}),
    "llama-relu": ("Llama", {"hidden_act": "relu"}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama-dynamic": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
            "max_position_embeddings": 16,
        },
    ),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "Llama",
        {
            "rope_parameters": YARN
            | {"mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
        },
    ),
    "llama-yarn-attention": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.7}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral-window": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "smollm3-interval": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {}),
    "phi3-window-tied": ("Phi3", {"sliding_window": 5, "tie_word_embeddings": True}),
    "phi3-partial": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "phi3-longrope": ("Phi3", PHI3_LONG),
    "phi3-longrope-factors": (
        "Phi3",
        PHI3_LONG | {"rope_parameters": LONGROPE | {"attention_factor": 1.25, "factor": 2.0}},
    ),
    "phi": ("Phi", {"num_key_value_heads": None}),
    "phi-partial-gqa": (
        "Phi",
        {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}},
    ),
    "phi-tied": ("Phi", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
}


def build(case: str, **overrides: Any) -> transformers.PreTrainedModel:
    """A model with random weights, biases and norms included."""
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**SIZES | options | overrides)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, case)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else 0.25 * noise)
    return model


def save(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def tokens(length: int, rows: int = 2) -> np.ndarray:
    """Token ids [rows, length]."""
    return np.random.default_rng(length).integers(0, SIZES["vocab_size"], (rows, length), np.int32)


@torch.no_grad()
def torch_logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()
