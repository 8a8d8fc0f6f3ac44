"""Descriptions of models, generation settings, settings in YAML, files of ratios."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from intraslice_jax.commands.prune import Options
from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.families import FAMILIES
from intraslice_jax.convert.hf import GenerationSettings, read_config
from intraslice_jax.convert.pruned_config import pruned_config
from intraslice_jax.prune.estimators import read_ratios
from intraslice_jax.reading import read_json
from intraslice_jax.settings import load_settings
from tests.fuzz.harness import Mutation, Target, mutate_bytes, mutate_json

_BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": None,
    "is_causal": True,
    "quantization_config": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "attention_factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "truncate": True,
}
_LONGROPE = {"type": "su", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.5, 6.0]}
_FAMILIES = {
    "LlamaForCausalLM": {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": False},
    "MistralForCausalLM": {"rope_theta": 1e6, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2},
    "Qwen2ForCausalLM": {
        "rope_scaling": _YARN,
        "rope_theta": 1e6,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "SmolLM3ForCausalLM": {
        "no_rope_layers": [1, 0],
        "no_rope_layer_interval": 2,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
    },
    "Phi3ForCausalLM": {
        "rope_scaling": _LONGROPE,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "sliding_window": 9,
    },
    "PhiForCausalLM": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
    },
}


def _config(architecture: str) -> dict[str, object]:
    named = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type}
    return named | _BASE | _FAMILIES[architecture]


def _pruned() -> ModelConfig:
    return FAMILIES["LlamaForCausalLM"].read_config(_config("LlamaForCausalLM"), "")


def _json_target(name: str, file: str, content: object, read) -> Target:
    def example(folder: Path) -> Path:
        path = folder / file
        path.write_text(json.dumps(content))
        return path

    return Target(name, example, read, (mutate_json, mutate_json, mutate_json, mutate_bytes))


_SETTINGS = """\
# As a user writes them.
model: some/folder
output: "out"
preset: fast
dtype: bfloat16
journal: yes
prune:
  sparsity: 0.25
  damping: 1e-3
  align: gpu
  head-align: 16
  memory_budget: 0x8000000
  grouping: uniform
samples: 4
sequence_length: 64
calibration: [a.txt, b.txt]
startup_timeout: 30
"""

_PARTS = (
    "!!int ''", "!!bool x", "!!timestamp x", "!!float ''", "!!binary =", "!!set {x}", "!!map [1]", "!!str [1]",
    "!!python/object/apply:os.system [ls]", "9" * 5000, "0x" + "f" * 5000, "-" + "1:" * 50 + "1", ".inf", "-.inf",
    ".nan", "~", "true", "2001-99-99", "1e400", "[" * 3000, "{" * 3000, "- " * 3000, "*a", "&a [*a]", "? [a]", "|",
    ">-", '"\\0"', '"\\ud800"', '"\\u0085"', "\ufeff", "\u2028", "<<: {a: 1}", "%YAML 3.0", "--- 1", "...", "'",
    "{a: {b: c}}", "[[1, 2], 3]", "x" * 5000, "-1", "0", "18446744073709551616", "0.1", "&a [x, x]", "[*a, *a]",
    "../../etc",
)  # fmt: skip
"""What stands in place of a value, a key or a line."""


def mutate_yaml(rng: random.Random, content: bytes) -> bytes:
    """Values, keys or whole lines replaced by others that YAML has a meaning for; lines moved, indented, doubled."""
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, part = rng.randrange(len(lines)), rng.choice(_PARTS)
        key, _, value = lines[at].partition(":")
        action = rng.randrange(7)
        if action < 3:
            lines[at] = f"{key}: {part}"
        elif action == 3:
            lines[at] = f"{part}:{value}"
        elif action == 4:
            lines.insert(at, part)
        elif action == 5:
            lines.insert(at, lines[rng.randrange(len(lines))])
        else:
            lines[at] = rng.choice((" ", "  ", "\t", "- ")) + lines[at]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _yaml_target(name: str, file: str, content: str, read, *more: Mutation) -> Target:
    def example(folder: Path) -> Path:
        path = folder / file
        path.write_text(content)
        return path

    return Target(name, example, read, (mutate_yaml, mutate_yaml, mutate_bytes, *more))


def targets() -> list[Target]:
    """A target per family and kind of file."""
    pruned = _pruned()
    ratios = {
        "attention": [0.25, 0.0],
        "mlp": [0.5, 1],
        "heads": [{"num_attention_heads": 2, "qk_head_dim": 6, "v_head_dim": 8}] * 2,
    }

    def read_file_of_ratios(folder: Path) -> object:
        return [read_ratios(path, pruned) for path in folder.iterdir()]

    return [
        *(_json_target(f"config.json {name}", "config.json", _config(name), read_config) for name in _FAMILIES),
        _json_target("config.json IntraSlice", "config.json", pruned_config(pruned, "float32"), read_config),
        _json_target(
            "ModelConfig",
            "model.json",
            pruned.to_json(),
            lambda folder: ModelConfig.from_json(read_json(folder / "model.json", dict)),
        ),
        _json_target(
            "generation_config.json",
            "generation_config.json",
            {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": None, "temperature": 0.6, "do_sample": True},
            lambda folder: read_json(folder / "generation_config.json", GenerationSettings),
        ),
        _json_target("ratios JSON", "ratios.json", ratios, read_file_of_ratios),
        _yaml_target("ratios YAML", "ratios.yaml", yaml.safe_dump(json.loads(json.dumps(ratios))), read_file_of_ratios),
        _yaml_target(
            "settings YAML", "prune.yaml", _SETTINGS, lambda folder: load_settings(folder / "prune.yaml", Options)
        ),
    ]
