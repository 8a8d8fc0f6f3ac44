"""The README.md of an export: what the model is and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from intraslice_jax.convert.hf import is_hub_id
from intraslice_jax.model import LanguageModel, StoredModel

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
```"""


Form = Literal["dense", "pruned", "uniform", "padded"]
"""An unpruned model; a pruned one with its own modelling file, as a smaller stock model, or filled with zeros."""

_LOADING = {
    "pruned": (
        "Layers differ in width, so the folder brings its own modelling file; it needs transformers 5.16 or newer."
    ),
    "uniform": "All layers have the same widths: the stock class loads the folder, no code of ours is needed.",
    "padded": (
        "What was pruned is stored as zeros, in the shapes of the original model: the stock class loads the folder and "
        "computes what the pruned model computes, but is no smaller or faster than the original in attention."
    ),
}


def model_card(model: LanguageModel | StoredModel, form: Form) -> str:
    """Markdown with the hub's metadata in front; the base model is named in it where it came from the hub."""
    hub, name = _name(model)
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    if hub:
        metadata.append(f"base_model: {model.name}")
    metadata += ["tags:", "- intraslice", "- pruned"] if form != "dense" else []
    body = _dense(model, name) if form == "dense" else _pruned(model, name, form)
    return "\n".join(["---", *metadata, "---", "", *body]) + "\n"


def description(model: LanguageModel | StoredModel) -> str:
    """The same in one line of text, for formats without a card."""
    _, name = _name(model)
    if not model.report:
        return f"{name}, written by intraslice-jax"
    facts = "; ".join(line.removeprefix("- ") for line in _facts(model.report) if line)
    return f"{name}, pruned by intraslice-jax with IntraSlice (arXiv 2602.01975)" + (f": {facts}" if facts else "")


def _name(model: LanguageModel | StoredModel) -> tuple[bool, str]:
    """Whether the model came from the hub, and what it is called."""
    hub = "/" in model.name and is_hub_id(model.name) and not Path(model.name).exists()
    return hub, model.name if hub else Path(model.name).name


def _dense(model: LanguageModel | StoredModel, name: str) -> list[str]:
    return [
        f"# {name}",
        "",
        f"{name} ({model.config.model_type}, {model.config.total_parameters():,} parameters), written by "
        "intraslice-jax in its original architecture. The licence of the original model applies.",
        "",
        _LOAD.format(trust=""),
    ]


def _pruned(model: LanguageModel | StoredModel, name: str, form: Form) -> list[str]:
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
        _LOADING[form],
        "",
        _LOAD.format(trust=", trust_remote_code=True" if form == "pruned" else ""),
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
