"""The forward pass of any model of this program, written out in NumPy: nothing to compile."""

import math
from collections.abc import Mapping

import numpy as np

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.models.rope import inverse_frequencies

_ERF = np.vectorize(math.erf, otypes=[np.float64])
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + _ERF(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def numpy_logits(config: ModelConfig, arrays: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [batch, seq, vocab] in float64."""
    arrays = {path: np.asarray(arrays[path]) for path in arrays}
    arrays = {path: a if a.dtype.kind == "i" else a.astype(np.float64) for path, a in arrays.items()}
    frequencies, factor = inverse_frequencies(
        config.rope, config.rotary_dim, config.max_position_embeddings, tokens.shape[1]
    )
    angles = np.arange(tokens.shape[1])[:, None] * np.asarray(frequencies, np.float64)
    tables = np.cos(angles) * factor, np.sin(angles) * factor

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        if config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        return x * arrays[f"{name}.weight"] + arrays.get(f"{name}.bias", 0)

    x = arrays["embed_tokens"][tokens]
    for i, shape in enumerate(config.layers):
        layer = {
            path.removeprefix(f"layers.{i}."): array
            for path, array in arrays.items()
            if path.startswith(f"layers.{i}.")
        }
        normed = norm(x, f"layers.{i}.input_norm")
        attended = _attention(config, shape, layer, normed, tables)
        if config.parallel_block:
            x = x + attended + _mlp(config, layer, normed)
        else:
            x = x + attended
            x = x + _mlp(config, layer, norm(x, f"layers.{i}.post_norm"))
    head = arrays["embed_tokens" if config.tie_word_embeddings else "lm_head"]
    return norm(x, "norm") @ head.T + arrays.get("lm_head_bias", 0)


def _attention(
    config: ModelConfig,
    shape: LayerShape,
    layer: Mapping[str, np.ndarray],
    x: np.ndarray,
    tables: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    q, k, v = (
        np.einsum("bsh,hnd->bnsd", x, layer[f"attention.{name}_proj"])
        + np.expand_dims(layer.get(f"attention.{name}_bias", np.zeros((1, 1))), 1)
        for name in "qkv"
    )
    groups, half = list(shape.query_to_kv), shape.rotary_dim // 2
    # [kv heads, seq, pairs] of each head's own frequencies
    cos, sin = (table.T[layer["attention.rope_pairs"]].swapaxes(1, 2) for table in tables)

    def rotate(heads: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        first, second, rest = np.split(heads, [half, 2 * half], -1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

    q, k, v = rotate(q, cos[groups], sin[groups]), rotate(k, cos, sin)[:, groups], v[:, groups]
    distance = np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1]))
    seen = (distance >= 0) & (distance < (shape.sliding_window or x.shape[1]))
    scores = np.where(seen, q @ k.swapaxes(2, 3) / math.sqrt(config.head_dim), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    values = weights / weights.sum(-1, keepdims=True) @ v
    return np.einsum("bnsd,ndh->bsh", values, layer["attention.o_proj"]) + layer.get("attention.o_bias", 0)


def _mlp(config: ModelConfig, layer: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    inner = x @ layer["mlp.up_proj"] + layer.get("mlp.up_bias", 0)
    gate = x @ layer["mlp.gate_proj"] + layer.get("mlp.gate_bias", 0) if config.gated_mlp else inner
    active = ACTIVATIONS[config.hidden_act](gate)
    return (active * inner if config.gated_mlp else active) @ layer["mlp.down_proj"] + layer.get("mlp.down_bias", 0)
