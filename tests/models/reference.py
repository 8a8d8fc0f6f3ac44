"""The decoder written a second time: numpy, float64, one head and one position at a time."""

import math

import numpy as np

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.models.decoder import abstract_arrays


def random_arrays(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights large enough for every part to matter, and for each KV head its own choice of RoPE pairs."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, want in abstract_arrays(config).items():
        if path.endswith("rope_pairs"):
            kept = [rng.permutation(config.rotary_dim // 2)[: want.shape[1]] for _ in range(want.shape[0])]
            arrays[path] = np.sort(np.array(kept, np.int32).reshape(want.shape), 1)
            continue
        scale, shift = 1.0, 0.0
        if path.endswith("norm.weight"):
            scale, shift = 0.2, 1.0
        elif path.endswith("bias"):
            scale = 0.3
        elif "layers" in path:
            inputs = np.prod(want.shape[:-1]) if path.endswith("o_proj") else want.shape[0]
            scale = 1.5 / math.sqrt(inputs)
        arrays[path] = (shift + scale * rng.standard_normal(want.shape)).astype(np.float32)
    return arrays


def logits(config: ModelConfig, arrays: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Next-token logits [batch, seq, vocab] in float64, default RoPE."""
    weights = {path: np.asarray(array, np.float64) for path, array in arrays.items()}
    return np.stack([_sequence(config, weights, row) for row in tokens])


def _sequence(config: ModelConfig, weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    x = weights["embed_tokens"][tokens]
    for i, shape in enumerate(config.layers):
        prefix = f"layers.{i}."
        layer = {path.removeprefix(prefix): w for path, w in weights.items() if path.startswith(prefix)}
        normed = _norm(config, layer, "input_norm", x)
        after = x + _attention(config, shape, layer, normed)
        if not config.parallel_block:
            normed = _norm(config, layer, "post_norm", after)
        x = after + _mlp(config, layer, normed)
    x = _norm(config, weights, "norm", x)
    head = weights["embed_tokens" if config.tie_word_embeddings else "lm_head"]
    return x @ head.T + weights.get("lm_head_bias", 0.0)


def _norm(config: ModelConfig, weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    if config.norm == "rms":
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * weights[f"{name}.weight"]
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _rotated(config: ModelConfig, vector: np.ndarray, pairs: np.ndarray, position: int) -> np.ndarray:
    """Channel p and its partner p + len(pairs) turn by position * frequency."""
    out, half = vector.copy(), len(pairs)
    for p, pair in enumerate(pairs):
        angle = position * config.rope.theta ** (-2.0 * float(pair) / config.rotary_dim)
        a, b = vector[p], vector[p + half]
        out[p], out[p + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


def _attention(config: ModelConfig, shape: LayerShape, layer: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    seq = len(x)
    out = np.zeros((seq, config.hidden_size))

    def projected(name: str, head: int) -> np.ndarray:
        bias = layer.get(f"attention.{name}_bias")
        return x @ layer[f"attention.{name}_proj"][:, head] + (0.0 if bias is None else bias[head])

    for head, kv in enumerate(shape.query_to_kv):
        pairs = layer["attention.rope_pairs"][kv]
        queries = [_rotated(config, q, pairs, t) for t, q in enumerate(projected("q", head))]
        keys = [_rotated(config, k, pairs, t) for t, k in enumerate(projected("k", kv))]
        values = projected("v", kv)
        for t in range(seq):
            first = 0 if shape.sliding_window is None else max(0, t - shape.sliding_window + 1)
            scores = np.array([queries[t] @ keys[s] for s in range(first, t + 1)]) / math.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            out[t] += (weights / weights.sum()) @ values[first : t + 1] @ layer["attention.o_proj"][head]
    return out + layer.get("attention.o_bias", 0.0)


def _mlp(config: ModelConfig, layer: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def act(z: np.ndarray) -> np.ndarray:
        if config.hidden_act == "silu":
            return z / (1 + np.exp(-z))
        assert config.hidden_act == "gelu_new"
        return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    up = x @ layer["mlp.up_proj"] + layer.get("mlp.up_bias", 0.0)
    gate = x @ layer["mlp.gate_proj"] + layer.get("mlp.gate_bias", 0.0) if config.gated_mlp else None
    inner = act(up) if gate is None else act(gate) * up
    return inner @ layer["mlp.down_proj"] + layer.get("mlp.down_bias", 0.0)
