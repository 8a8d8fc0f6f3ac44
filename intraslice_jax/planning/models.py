"""Configurations that plans know by name, as the published `config.json` files have them."""

from __future__ import annotations

from typing import Any


def _llama(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, context: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
    }


READY = {
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": _llama(32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3.1-405b": _llama(128256, 16384, 53248, 126, 128, 8, 131072),
    "phi-4": _llama(100352, 5120, 17920, 40, 40, 10, 16384)
    | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
}
"""By name."""
