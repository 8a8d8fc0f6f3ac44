"""A tiny Llama on disk as Hugging Face lays it out, written without torch, and text for it."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<s>", "</s>")  # the first two ids; the 256 bytes follow


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """The config.json of a Llama with two layers, two query heads per KV head and a tied head."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    } | overrides


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under their Hugging Face names; linear layers are [out, in]."""
    rng = np.random.default_rng(seed)

    def linear(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)

    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    weights = {"model.embed_tokens.weight": linear(vocab, hidden, 2.0), "model.norm.weight": norm()}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = linear(vocab, hidden, 2.0)
    for i in range(config["num_hidden_layers"]):
        weights |= {
            f"model.layers.{i}.{name}.weight": value
            for name, value in {
                "input_layernorm": norm(),
                "self_attn.q_proj": linear(q_width, hidden),
                "self_attn.k_proj": linear(kv_width, hidden),
                "self_attn.v_proj": linear(kv_width, hidden),
                "self_attn.o_proj": linear(hidden, q_width),
                "post_attention_layernorm": norm(),
                "mlp.gate_proj": linear(inner, hidden),
                "mlp.up_proj": linear(inner, hidden),
                "mlp.down_proj": linear(hidden, inner),
            }.items()
        }
    return weights


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: one token per byte of UTF-8, ids 2 to 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
        },
    )


def write_tiny_llama(
    folder: Path,
    *,
    seed: int = 0,
    tokenizer: bool = True,
    weights: dict[str, np.ndarray] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a tiny Llama folder (config.json, model.safetensors, tokenizer) and returns it.

    `overrides` change config.json; `weights` replaces the random ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**overrides)
    write_json(folder / "config.json", config)
    tensors = tiny_weights(config, seed) if weights is None else weights
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(folder)
    return folder


def tiny_text(characters: int = 4000, seed: int = 0) -> str:
    """Deterministic words, one byte per character."""
    rng = random.Random(seed)
    sentence = "the a river model of heads and layers runs over small stones while it rains in spring"
    words = sentence.split(" ")
    text = ""
    while len(text) < characters:
        text += rng.choice(words) + rng.choice((" ", " ", " ", ". ", ",\n"))
    return text[:characters]


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Readable JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
