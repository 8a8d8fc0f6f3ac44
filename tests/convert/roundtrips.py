"""Random models of every family, dense and pruned, through every export: the same logits here and in PyTorch.

`python -m tests.convert.roundtrips 300` tries as many as wanted and prints a table.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.convert.export import export
from intraslice_jax.convert.families import FAMILIES, default_rope_pairs
from intraslice_jax.convert.load import open_stored
from intraslice_jax.errors import InputError
from intraslice_jax.model import StoredModel
from tests.convert.exported import in_torch, quiet_torch, random_arrays, torch_logits
from tests.convert.reference import numpy_logits
from tests.convert.test_gguf_export import byte_level

VOCAB = 264
CLOSE = 1e-4
TRAINED = 16  # original_max_position_embeddings
TOKENS = np.random.default_rng(5).integers(2, VOCAB, (2, 40), dtype=np.int32)


_tokenizer = cache(lambda: byte_level(vocab_size=VOCAB))


def random_model(seed: int) -> StoredModel:
    """A model of a random family and configuration, pruned to random shapes or not at all."""
    rng = random.Random(seed)
    raw = _random_raw(rng)
    family = FAMILIES[raw["architectures"][0]]
    config = family.read_config(raw, json.dumps(raw))
    config = _pruned(rng, config)
    numbers = np.random.default_rng(seed)
    arrays = random_arrays(config, numbers)
    if config.layers == family.read_config(raw, "").layers:
        pairs = default_rope_pairs(config)
    else:
        pairs = _random_pairs(rng, config)
    # Logits of the order of 1, for float32 has seven digits.
    arrays |= {path: arrays[path] / np.float32(8) for path in ("embed_tokens", "lm_head") if path in arrays}
    arrays |= {path: rows.astype(np.int32).reshape(arrays[path].shape) for path, rows in pairs.items()}
    return StoredModel(config, arrays, "float32", _tokenizer(), f"model {seed}")


def _random_raw(rng: random.Random) -> dict[str, Any]:
    """A `config.json` that transformers would write for the family."""
    architecture = rng.choice([name for name in FAMILIES if name != "IntraSliceForCausalLM"])
    model_type = FAMILIES[architecture].model_type
    kv_heads, layers = rng.randint(1, 3), rng.randint(1, 3)
    heads, head_dim = kv_heads * rng.randint(1, 3), rng.choice((4, 6, 8, 12))
    hidden = heads * head_dim
    if model_type == "phi3":
        hidden = max(hidden, 16)  # its class derives the width of a head from these two
        head_dim = hidden // heads - (hidden // heads) % 2
        hidden = heads * head_dim
    elif rng.random() < 0.5:
        hidden = heads * rng.choice((4, 8))
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": rng.randint(2, 24),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": rng.choice(("silu", "silu", "silu", "gelu", "relu", "gelu_new")),
        "max_position_embeddings": rng.choice((64, 32)),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": 0,
        "eos_token_id": rng.choice((1, [1, 2])),
        "pad_token_id": 0,
        "dtype": "float32",
    }
    if model_type == "phi":
        raw["layer_norm_eps"] = 1e-5
    else:
        raw["rms_norm_eps"] = rng.choice((1e-5, 1e-6))
    if model_type == "llama":
        raw |= {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3}
    if model_type == "smollm3":
        raw |= {"attention_bias": rng.random() < 0.3, "no_rope_layers": [rng.randint(0, 1) for _ in range(layers)]}
        raw["no_rope_layers"][rng.randrange(layers)] = 1
    window = rng.choice((None, 5, 20))
    if model_type in ("mistral", "phi3"):
        raw["sliding_window"] = window
    elif model_type in ("qwen2", "smollm3") and window is not None and rng.random() < 0.5:
        types = [rng.choice(("full_attention", "sliding_attention")) for _ in range(layers)]
        raw |= {"use_sliding_window": True, "sliding_window": window, "layer_types": types}
    return raw | _random_rope(rng, model_type, head_dim)


def _random_rope(rng: random.Random, model_type: str, head_dim: int) -> dict[str, Any]:
    """RoPE under the new key or the old ones."""
    partial = None
    if model_type in ("phi", "phi3"):
        partial = rng.choice([even / head_dim for even in range(2, head_dim + 1, 2)])
    kinds = ["default", "longrope"]
    if model_type != "phi3":
        kinds += ["linear", "yarn", "llama3"] + ["dynamic"] * (head_dim * (partial or 1) >= 4)
    kind = rng.choice(kinds)
    pairs = int(head_dim * (partial or 1)) // 2
    rope: dict[str, Any] = {
        "default": {},
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        },
        "longrope": {
            "short_factor": [rng.uniform(1, 1.5) for _ in range(pairs)],
            "long_factor": [rng.uniform(1, 8) for _ in range(pairs)],
        },
    }[kind]
    theta = {"rope_theta": rng.choice((500.0, 10000.0))} | (
        {} if partial is None else {"partial_rotary_factor": partial}
    )
    original = {"original_max_position_embeddings": TRAINED} if kind == "longrope" else {}
    if rng.random() < 0.5:
        top = original if model_type == "phi3" else {}
        return {"rope_parameters": {"rope_type": kind, **theta, **rope, **original}, **top}
    if kind == "default":
        return theta
    return theta | original | {"rope_scaling": {rng.choice(("type", "rope_type")): kind, **rope, **original}}


def _pruned(rng: random.Random, dense: ModelConfig) -> ModelConfig:
    """Nothing pruned; layers of one shape; each of its own; some left dense; or next to nothing left."""
    kind = rng.choice(("dense", "alike", "alike", "ragged", "ragged", "some dense", "least"))
    if kind == "dense":
        return dense
    if kind == "alike":
        shape = _narrowed(rng, next(s for s in dense.layers if s.rotary_dim), alike=True)
        layers = [_as(wide, shape) for wide in dense.layers]
    elif kind == "least":
        layers = [
            _shape(wide, (0,), rotary=min(2, wide.rotary_dim), rest=int(not wide.rotary_dim), v=1, inner=1)
            for wide in dense.layers
        ]
    else:
        keep = 0.5 if kind == "some dense" else 0.0
        layers = [wide if rng.random() < keep else _narrowed(rng, wide) for wide in dense.layers]
    changes = {}
    if rng.random() < 0.2:
        changes = {"attention_output_bias": True, "mlp_bias": True}
    return ModelConfig(**{**vars(dense), "layers": tuple(layers), **changes})


def _narrowed(rng: random.Random, wide: LayerShape, alike: bool = False) -> LayerShape:
    heads, most = rng.randint(1, wide.num_key_value_heads), wide.group_sizes[0]
    sizes = (
        [rng.randint(1, most)] * heads if alike or rng.random() < 0.3 else [rng.randint(1, most) for _ in range(heads)]
    )
    rotary = 2 * rng.randint(1, wide.rotary_dim // 2) if wide.rotary_dim else 0
    rest = rng.randint(int(not rotary), wide.qk_head_dim - wide.rotary_dim)
    v = rotary + rest if alike and rng.random() < 0.9 else rng.randint(1, wide.v_head_dim)
    groups = tuple(head for head, size in enumerate(sizes) for _ in range(size))
    return _shape(wide, groups, rotary, rest, v, rng.randint(1, wide.intermediate_size))


def _shape(wide: LayerShape, groups: tuple[int, ...], rotary: int, rest: int, v: int, inner: int) -> LayerShape:
    return LayerShape(groups, rotary + rest, rotary, v, inner, wide.sliding_window)


def _as(wide: LayerShape, shape: LayerShape) -> LayerShape:
    """The shape with the layer's own window, unrotated where the layer is."""
    rotary = shape.rotary_dim if wide.rotary_dim else 0
    rest = shape.qk_head_dim - rotary
    return _shape(wide, shape.query_to_kv, rotary, rest, shape.v_head_dim, shape.intermediate_size)


def _random_pairs(rng: random.Random, config: ModelConfig) -> dict[str, np.ndarray]:
    """The same for all heads, or each its own; seldom not in order."""
    everywhere = list(range(config.rotary_dim // 2))
    rng.shuffle(everywhere)
    common, ordered, rows = rng.random() < 0.5, rng.random() < 0.9, {}
    for i, shape in enumerate(config.layers):
        kept = []
        for _ in range(shape.num_key_value_heads):
            pairs = everywhere if common else rng.sample(everywhere, len(everywhere))
            kept.append(pairs[: shape.rotary_dim // 2])
        rows[f"layers.{i}.attention.rope_pairs"] = np.sort(kept) if ordered else np.asarray(kept, int)
    return rows


def expressible(form: str, config: ModelConfig) -> bool:
    """What docs/exports.md says about what a form can hold."""
    dense = FAMILIES[json.loads(config.source)["architectures"][0]].read_config(json.loads(config.source), "")
    plain = not config.parallel_block and config.gated_mlp
    if form == "gguf":
        return plain and config.hidden_act == "silu"
    if form == "padded" and (config.attention_output_bias, config.mlp_bias) != (
        dense.attention_output_bias,
        dense.mlp_bias,
    ):
        whole = all(shape.rotary_dim == shape.qk_head_dim for shape in dense.layers)
        return plain and whole and not any(shape.sliding_window for shape in dense.layers)
    return True


def round_trip(model: StoredModel, folder: Path, form: str) -> str:
    """Exports the model, reads it back here and, folders, in PyTorch; says in which class.

    Raises:
        AssertionError: logits differ, or a form is refused, or not, against what its page says.
    """
    config = model.config
    path = folder / ("model.gguf" if form == "gguf" else form)
    if not expressible(form, config):
        with pytest.raises(InputError) as refusal:
            export(model, path, format=form)
        assert "\n" not in str(refusal.value)
        return "refused"
    export(model, path, format=form)
    back = open_stored(path)
    readers: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "read back": lambda tokens: numpy_logits(back.config, back.arrays, tokens)
    }
    name, most = form, TOKENS.shape[1]
    if form == "gguf":
        most = min(most, back.config.max_position_embeddings)
    else:
        exported = in_torch(path, attention="eager")
        exported.save_pretrained(folder / f"{form}-saved")
        saved = open_stored(folder / f"{form}-saved")
        readers["PyTorch"] = lambda tokens: torch_logits(exported, tokens)
        readers["saved by transformers"] = lambda tokens: numpy_logits(saved.config, saved.arrays, tokens)
        name = type(exported).__name__
    for length in {min(most, TRAINED - 4), most}:
        tokens = TOKENS[:, :length]
        want = numpy_logits(config, model.arrays, tokens)
        for reader, logits in readers.items():
            worst = np.abs(logits(tokens) - want).max()
            assert worst < CLOSE, f"{form}, {reader}, {length} tokens: logits differ by {worst}"
    return name


FORMS = ("hf", "padded", "gguf")


def main(count: int, first: int = 0) -> int:
    """Tries the models of `count` seeds; prints what became of them and what failed."""
    outcomes: Counter[tuple[str, str]] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as modules, quiet_torch(Path(modules)):
        for seed in range(first, first + count):
            model = random_model(seed)
            for form in FORMS:
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        outcome = round_trip(model, Path(folder), form)
                    except Exception as error:
                        outcome = "FAILED"
                        failures.append(
                            f"{seed} {form} {model.config.model_type}: {type(error).__name__}: {error}"[:400]
                        )
                        print(failures[-1], flush=True)
                    outcomes[form, outcome] += 1
    for (form, outcome), times in sorted(outcomes.items()):
        print(f"{form:8} {outcome:24} {times:6}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
