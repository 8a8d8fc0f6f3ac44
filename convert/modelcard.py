"""The README.md of an export: what the model is and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intraslice_jax.convert.hf import is_hub_id
from intraslice_jax.model import LanguageModel, StoredModel

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```"""


def model_card(model: LanguageModel | StoredModel, pruned: bool) -> str:
    """Markdown with the hub's metadata in front; the base model is named in it where it came from the hub."""
    hub = "/" in model.name and is_hub_id(model.name) and not Path(model.name).exists()
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    if hub:
        metadata.append(f"base_model: {model.name}")
    metadata += ["tags:", "- intraslice", "- pruned"] if pruned else []
    name = model.name if hub else Path(model.name).name
    body = _pruned(model, name) if pruned else _dense(model, name)
    return "\n".join(["---", *metadata, "---", "", *body]) + "\n"


def _dense(model: LanguageModel | StoredModel, name: str) -> list[str]:
    return [
        f"# {name}",
        "",
        f"{name} ({model.config.model_type}, {model.config.total_parameters():,} parameters), written by "
        "intraslice-jax in its original architecture. The licence of the original model applies.",
        "",
        _LOAD.format(trust=""),
    ]


def _pruned(model: LanguageModel | StoredModel, name: str) -> list[str]:
    config = model.config
    rows = [
        f"| {i} | {s.num_attention_heads} | {s.num_key_value_heads} | {s.qk_head_dim} | {s.v_head_dim} "
        f"| {s.intermediate_size} |"
        for i, s in enumerate(config.layers)
    ]
    return [
        f"# {name}, pruned with IntraSlice",
        "",
        f"{name} ({config.model_type}) with {config.total_parameters():,} parameters left, pruned by intraslice-jax "
        "with IntraSlice ([arXiv 2602.01975](https://arxiv.org/abs/2602.01975)): attention heads, head channels and "
        "MLP channels are gone from its weights, nothing was added. The licence of the original model applies.",
        "",
        *_facts(model.report),
        "## Loading",
        "",
        "Layers differ in width, so the folder brings its own modelling file; it needs transformers 5.16 or newer.",
        "",
        _LOAD.format(trust=", trust_remote_code=True"),
        "",
        "## Layers",
        "",
        "| layer | query heads | key/value heads | query/key width | value width | MLP width |",
        "|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]


def _facts(report: Mapping[str, Any]) -> list[str]:
    fractions = {
        "removed_block_fraction": "removed from attention and MLP of the decoder layers",
        "removed_model_fraction": "removed from the whole model",
    }
    facts = [f"- {report[key]:.2%} of the parameters {text}" for key, text in fractions.items() if key in report]
    samples, length = report.get("calibration_samples"), report.get("calibration_sequence_length")
    if samples and length:
        facts.append(f"- calibrated on {samples} windows of {length} tokens")
    return [*facts, ""] if facts else []
