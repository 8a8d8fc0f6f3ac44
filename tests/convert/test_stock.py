"""Pruned models as stock classes of transformers: filled with zeros, or small where all layers are alike."""

import dataclasses
import json

import numpy as np
import pytest
import transformers

from intraslice_jax.config import RopeConfig
from intraslice_jax.convert import load
from intraslice_jax.convert.export import export
from intraslice_jax.errors import InputError
from tests.convert.exported import TOKENS, greedy, in_torch, make, our_logits, quiet_torch, torch_logits
from tests.convert.narrowed import FAMILY_CASES, ragged, uniform

CLOSE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _quiet(tmp_path_factory):
    with quiet_torch(tmp_path_factory.mktemp("modules")):
        yield


def check(folder, model, architecture):
    """No code in the folder, the stock class, our logits before and behind the lengths at which RoPE types change."""
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    exported = in_torch(folder)
    assert type(exported) is getattr(transformers, architecture)
    for length in (40, 12) if "long_factor" in str(model.config.rope) else (40,):
        ids = TOKENS[:, :length]
        np.testing.assert_allclose(
            torch_logits(exported, ids), our_logits(model.decoder, ids), rtol=0, atol=CLOSE, err_msg=str(length)
        )
    return exported


def old_keys(model_type, rope_type="default", rope_theta=None, partial_rotary_factor=None, **scaling):
    """RoPE as transformers 4.x reads it."""
    keys = {"rope_theta": rope_theta, "partial_rotary_factor": partial_rotary_factor}
    if rope_type == "longrope":
        keys["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if rope_type != "default":
        keys["rope_scaling"] = {"type" if model_type == "phi3" else "rope_type": rope_type, **scaling}
    return {key: value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_padded_is_the_same_function(case, tmp_path):
    model = ragged(case)
    folder = export(model, tmp_path / "out", format="padded")
    check(folder, model, FAMILY_CASES[case][0])
    raw, written = json.loads(model.config.source), json.loads((folder / "config.json").read_text())
    # The same model for every release of transformers: 4.x does not know `rope_parameters`.
    rope = raw.pop("rope_parameters", {})
    assert written == raw | {"intermediate_size": 40, "torch_dtype": "float32"} | old_keys(raw["model_type"], **rope)
    assert "stored as zeros" in (folder / "README.md").read_text()


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_uniform_layout_is_a_small_stock_model(case, tmp_path):
    model = uniform(case)
    # Phi-3's class cannot hold the frequencies of narrower heads; Llama and Mistral compute the same.
    architecture = {"phi3": "MistralForCausalLM", "phi3 longrope": "LlamaForCausalLM"}
    folder = export(model, tmp_path / "out")
    exported = check(folder, model, architecture.get(case, FAMILY_CASES[case][0]))
    assert sum(p.numel() for p in exported.parameters()) == model.config.total_parameters()
    if case in ("llama", "smollm3", "phi3 longrope"):
        again = our_logits(load(folder).decoder, TOKENS)
        np.testing.assert_allclose(again, our_logits(model.decoder, TOKENS), rtol=0, atol=CLOSE)
    assert "trust_remote_code" not in (folder / "README.md").read_text()


def test_greedy_text_of_both(tmp_path):
    for name, model, form in (("padded", ragged("llama"), "padded"), ("uniform", uniform("llama"), "hf")):
        stock = in_torch(export(model, tmp_path / name, format=form))
        own = in_torch(export(dataclasses.replace(model, config=dataclasses.replace(model.config, source="")),
                              tmp_path / f"{name}-own"))  # fmt: skip
        assert type(own).__name__ == "IntraSliceForCausalLM"
        np.testing.assert_array_equal(greedy(stock, TOKENS[:, :6], 14), greedy(own, TOKENS[:, :6], 14))


def test_output_biases_make_a_llama_with_biases(tmp_path):
    model = ragged("llama", attention_output_bias=True, mlp_bias=True)
    exported = check(export(model, tmp_path / "out", format="padded"), model, "LlamaForCausalLM")
    assert exported.config.attention_bias
    assert exported.config.mlp_bias
    assert not exported.model.layers[0].self_attn.q_proj.bias.any()


def test_in_bfloat16_every_weight_is_rounded_once(tmp_path):
    model = uniform("llama")
    written = in_torch(export(model, tmp_path / "half", dtype="bfloat16")).state_dict()
    whole = in_torch(export(model, tmp_path / "whole")).state_dict()
    for name, tensor in whole.items():
        assert (tensor.bfloat16() == written[name]).all(), name


def test_what_no_stock_class_holds(tmp_path):
    windowed = ragged("mistral", attention_output_bias=True, mlp_bias=True)
    with pytest.raises(InputError, match=r"no stock class has mistral's features and output biases; .*--format hf"):
        export(windowed, tmp_path / "out", format="padded")
    with pytest.raises(InputError, match="does not know its original configuration"):
        export(make("llama"), tmp_path / "out", format="padded")
    # Somebody edited an export: its original configuration, from which stock classes get theirs, says something else.
    config = dataclasses.replace(ragged("llama").config, rope=RopeConfig(500.0), eos_token_id=(1, 3))
    with pytest.raises(InputError, match=r"differs from its original configuration in rope; .*--format hf"):
        export(dataclasses.replace(ragged("llama"), config=config), tmp_path / "out", format="padded")
    assert list(tmp_path.iterdir()) == []
    same = dataclasses.replace(config, rope=ragged("llama").config.rope)
    folder = export(dataclasses.replace(ragged("llama"), config=same), tmp_path / "out", format="padded")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [1, 3]


def test_frequencies_that_grow_with_the_text_stay_with_the_modelling_file(tmp_path):
    model = uniform("llama")
    rope = dataclasses.replace(model.config.rope, rope_type="dynamic", parameters=(("factor", 2.0),))
    raw = json.loads(model.config.source) | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    config = dataclasses.replace(model.config, rope=rope, source=json.dumps(raw))
    folder = export(dataclasses.replace(model, config=config), tmp_path / "out")
    assert list(folder.glob("modeling_*.py"))
