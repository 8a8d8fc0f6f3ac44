"""Tiny GGUF files written as llama.cpp's conversion script writes them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.fc1": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc2": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Channel p of a head goes to 2p, its rotation partner p + width / 2 to 2p + 1."""
    width = len(array) // heads
    order = [h * width + p + half * width // 2 for h in range(heads) for p in range(width // 2) for half in (0, 1)]
    return array[order]


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    architecture: str,
    *,
    quantise: gguf.GGMLQuantizationType | None = None,
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, Any] | None = None,
    fuse: bool = False,
    without: Collection[str] = (),
) -> Path:
    """Writes the model.

    `metadata` is added behind the architecture's prefix, `extra` holds further tensors, `without` names some to leave
    out.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotated = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(rotated)
    if head_dim != config.hidden_size // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if hasattr(config, "layer_norm_eps"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in (metadata or {}).items():
        kind = {str: "string", float: "float32", int: "uint32"}[type(value)]
        getattr(writer, f"add_{kind}")(f"{architecture}.{key}", value)

    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    stored = {}
    for name, array in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, heads if "q_proj" in name else kv_heads)
        stored[gguf_name(name)] = array
    if fuse:
        for name in [name for name in stored if "attn_q." in name]:
            parts = [stored.pop(name.replace("attn_q", f"attn_{p}")) for p in "qkv"]
            stored[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    for name, array in stored.items():
        if name in without:
            continue
        if quantise is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
