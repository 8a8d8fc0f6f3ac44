"""Every field of transformers' configurations: honoured, refused or without effect, with the same defaults."""

import ast
import dataclasses
import importlib
import inspect
import json
import textwrap

import numpy as np
import pytest
import torch
import transformers
from transformers import cache_utils, masking_utils, modeling_rope_utils

from intraslice_jax.convert import hf_config
from intraslice_jax.convert.families import FAMILIES
from tests.convert.checkpoints import SIZES, build, tokens, torch_logits

STOCK = {name.removesuffix("ForCausalLM"): family for name, family in FAMILIES.items() if not name.startswith("Intra")}

# What `hf_config` reads or refuses.
KNOWN = {*hf_config._Fields.__annotations__, *hf_config._REFUSED, "is_causal"}

# What changes no logits: training, what a call returns or how it is computed, labels of classifiers.
WITHOUT_EFFECT = {
    "attention_dropout": 0.5,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "initializer_range": 0.5,
    "use_cache": False,
    "pretraining_tp": 2,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": True,
    "chunk_size_feed_forward": 2,
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "problem_type": "regression",
    "transformers_version": "4.0.0",
}
# The same, but not to be set in a test: how numbers are stored, and what the library sets or calls itself.
OF_THE_LIBRARY = {
    "dtype",
    "_attn_implementation",
    "get_text_config",
    "standardize_rope_params",
    "validate_rope",
    "is_heterogeneous",
    # Asked of layers of kinds that are refused: recurrent ones.
    "number_of_conv_states",
}


def fields_read(source: str) -> set[str]:
    """`config.NAME`, `getattr(config, "NAME")` and `hasattr(config, "NAME")` of any configuration in a source text."""

    def is_config(node: ast.expr) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return name.endswith("config")

    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[asked, ast.Constant(value=name), *_]):
                found |= {name} if is_config(asked) else set()
    return found


@pytest.mark.parametrize("family", STOCK)
def test_no_field_is_overlooked(family):
    name = STOCK[family].model_type
    modelling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    sources = [modelling, masking_utils, modeling_rope_utils, cache_utils.get_layer_types_and_kwargs]
    read = set().union(*(fields_read(inspect.getsource(source)) for source in sources))
    assert {"hidden_size", "is_causal", "rope_parameters", "attention_chunk_size"} <= read
    declared = {field.name for field in dataclasses.fields(getattr(transformers, f"{family}Config"))}
    assert (read | declared) - KNOWN - WITHOUT_EFFECT.keys() - OF_THE_LIBRARY == set()


def test_fields_without_effect(tmp_path):
    plain = build("llama")
    plain.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | WITHOUT_EFFECT))
    changed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokens(12)
    np.testing.assert_allclose(torch_logits(changed, ids), torch_logits(plain, ids), atol=1e-5, rtol=0)
    assert hf_config.llama(raw | WITHOUT_EFFECT) == hf_config.llama(raw)


# Other values than the defaults, which fit each family's defaults where one of them is left out.
GIVEN = SIZES | {
    "hidden_size": 512,
    "num_attention_heads": 64,
    "hidden_act": "relu",
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": [7, 8],
    "max_position_embeddings": 77,
}
_RMS = {"rms_norm_eps": 1e-3, "rope_theta": 123.0}
OPTIONS = {
    "Llama": _RMS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "Mistral": _RMS | {"tie_word_embeddings": True, "sliding_window": 5, "head_dim": 16},
    "Qwen2": _RMS
    | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "SmolLM3": _RMS
    | {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "no_rope_layer_interval": 2,
    },
    "Phi3": _RMS
    | {
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0]},
    },
    "Phi": {"tie_word_embeddings": True, "layer_norm_eps": 1e-3, "rope_theta": 123.0, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("family", STOCK)
def test_defaults_are_those_of_transformers(family):
    given, read = GIVEN | OPTIONS[family], STOCK[family].read_config
    for missing in (None, *given):
        raw = {key: value for key, value in given.items() if key != missing}
        if family == "Phi3" and missing in ("hidden_size", "num_attention_heads", "partial_rotary_factor"):
            raw.pop("rope_scaling")  # factors for another width
        theirs = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(raw))).to_dict()
        ours, whole = read(raw, ""), read(json.loads(json.dumps(theirs)), "")
        assert ours == whole, missing


def test_the_defaults_of_the_families_differ():
    few = {"hidden_size": 512, "num_attention_heads": 64, "num_hidden_layers": 1}
    read = {family: STOCK[family].read_config(few, "") for family in STOCK}
    heads = {family: config.layers[0].num_key_value_heads for family, config in read.items()}
    assert heads == {"Llama": 64, "Mistral": 8, "Qwen2": 32, "SmolLM3": 4, "Phi3": 64, "Phi": 64}
    assert read["Mistral"].max_position_embeddings == 131072
    assert read["Qwen2"].max_position_embeddings == 32768
