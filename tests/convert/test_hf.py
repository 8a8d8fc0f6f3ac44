"""Every family and option against transformers' PyTorch classes, and the way back to the same bytes."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import AutoModelForCausalLM

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.convert.families import FAMILIES, to_checkpoint
from intraslice_jax.convert.load import load
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import abstract_arrays, decoder_to_arrays
from intraslice_jax.models.generate import stop_tokens
from tests.convert.checkpoints import CASES, LLAMA3, LONGROPE, build, save, tokens, torch_logits

SHORT, LONG = 6, 24  # on both sides of the length (16) at which `dynamic` and `longrope` switch


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = build("llama")
    return model, save(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def broken(llama, tmp_path):
    """A copy of the Llama folder to break."""
    return shutil.copytree(llama[1], tmp_path / "model")


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def logits(model, ids):
    return np.asarray(model.decoder(jnp.asarray(ids)))


def assert_same_arrays(one, other):
    one, other = decoder_to_arrays(one.decoder), decoder_to_arrays(other.decoder)
    assert one.keys() == other.keys()
    for path in one:
        assert one[path].dtype == other[path].dtype, path
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(other[path]), err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_round_trip(case, tmp_path):
    reference = build(case)
    model = load(save(reference, tmp_path))
    for ids in (tokens(LONG), tokens(SHORT)):
        np.testing.assert_allclose(logits(model, ids), torch_logits(reference, ids), atol=1e-4, rtol=0)

    stored = load_file(tmp_path / "model.safetensors")
    back = dict(to_checkpoint(f"{CASES[case][0]}ForCausalLM", model.config, decoder_to_arrays(model.decoder)))
    assert back.keys() == stored.keys()
    for name, array in back.items():
        assert array.dtype == stored[name].dtype
        np.testing.assert_array_equal(array, stored[name], err_msg=name)


@pytest.mark.parametrize("case", ["llama", "phi3-longrope", "phi"])
def test_bfloat16(case, tmp_path):
    save(build(case).to(torch.bfloat16), tmp_path)
    model = load(tmp_path)
    assert model.decoder.embed_tokens.dtype == jnp.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = torch_logits(reference, tokens(LONG))
    error = np.abs(logits(model, tokens(LONG)) - wanted)
    assert error.mean() < 0.02 * wanted.std()

    # The same numbers in float32 are a float32 model again.
    exact = torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tokens(LONG))
    np.testing.assert_allclose(logits(load(tmp_path, "float32"), tokens(LONG)), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("stored", "loaded"), [(torch.float16, "float16"), (torch.float64, "float32"), (torch.bfloat16, "bfloat16")]
)
def test_stored_dtypes(llama, tmp_path, stored, loaded):
    model = build("llama").to(stored)
    model = load(save(model, tmp_path))
    assert model.decoder.embed_tokens.dtype == jnp.dtype(loaded)
    np.testing.assert_allclose(
        np.asarray(model.decoder.embed_tokens[...], np.float32),
        load_file(llama[1] / "model.safetensors")["model.embed_tokens.weight"],
        atol=5e-3,
    )


def test_norms_in_another_dtype_follow_the_rest(broken, llama):
    def change(weights):
        for name in weights:
            if "norm" not in name:
                weights[name] = weights[name].astype(np.float16)

    edit_weights(broken, change)
    assert load(broken).decoder.norm.weight.dtype == jnp.float16


def test_sharded_and_bin_equal_single(llama, tmp_path):
    model, folder = llama
    single = load(folder)
    sharded = load(save(model, tmp_path / "sharded", max_shard_size="20KB"))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_arrays(single, sharded)

    torch.save(model.state_dict(), tmp_path / "whole.bin")
    for kind, legacy in (("zip", True), ("legacy", False)):
        (tmp_path / kind).mkdir()
        shutil.copy(folder / "config.json", tmp_path / kind)
        torch.save(model.state_dict(), tmp_path / kind / "pytorch_model.bin", _use_new_zipfile_serialization=legacy)
        assert_same_arrays(single, load(tmp_path / kind))
    (tmp_path / "zip" / "pytorch_model.bin").unlink()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    halves = [dict(list(state.items())[:9]), dict(list(state.items())[9:])]
    for i, half in enumerate(halves):
        torch.save(half, tmp_path / "zip" / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for name in half}
    (tmp_path / "zip" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_arrays(load(tmp_path / "zip"), load(folder, "bfloat16"))


def test_shards_without_index(llama, tmp_path):
    model, folder = llama
    save(model, tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_arrays(load(tmp_path), load(folder))


def test_bin_runs_no_code(broken):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(broken / "ran"),)

    (broken / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, broken / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        load(broken)
    assert not (broken / "ran").exists()


def test_biases_of_some_projections_only(tmp_path):
    """A bias that no layer has is zero, as transformers makes it; one that only a layer lacks is damage."""
    reference = build("llama-biases")
    folder = save(reference, tmp_path / "model")
    gone = [name for name, _ in reference.named_parameters() if name.endswith(("o_proj.bias", "up_proj.bias"))]
    for name in gone:
        reference.get_parameter(name).data.zero_()
    edit_weights(folder, lambda weights: [weights.pop(name) for name in gone])
    model = load(folder)
    np.testing.assert_allclose(logits(model, tokens(LONG)), torch_logits(reference, tokens(LONG)), atol=1e-4, rtol=0)
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.self_attn.q_proj.bias"))
    with pytest.raises(InputError, match=r"missing model\.layers\.1\.self_attn\.q_proj\.bias; left over nothing"):
        load(folder)


def test_old_spelling_of_llama(broken, llama):
    edit_config(broken, architectures=["LLaMAForCausalLM"])
    assert_same_arrays(load(broken), load(llama[1]))


def as_bin(folder, content):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_bin_of_parameters(llama, broken):
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in llama[0].state_dict().items()}
    assert_same_arrays(load(as_bin(broken, parameters)), load(llama[1]))


def with_norm(change):
    def changed(state):
        name = "model.norm.weight"
        return {**state, name: change(state[name])}

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_norm(lambda t: t.to(torch.float8_e4m3fn)), r"norm\.weight is stored as float8_e4m3fn, expected float32"),
        (with_norm(lambda t: t.to(torch.complex64)), r"norm\.weight is stored as complex64"),
        (with_norm(lambda t: t.to_sparse()), r"norm\.weight is stored as sparse_coo"),
        (with_norm(lambda t: t.to(torch.int32)), r"norm\.weight must not be int32"),
        (with_norm(lambda t: torch.ones(1).expand(2**45)), r"norm\.weight \[\d+\] is larger than what is stored of it"),
        (with_norm(lambda t: t.tolist()), r"does not hold a mapping of names to tensors"),
        (lambda state: {1: state["model.norm.weight"]}, r"does not hold a mapping of names to tensors"),
        (lambda state: [*state.values()], r"does not hold a mapping of names to tensors"),
    ],
)
def test_bin_of_other_things(llama, broken, change, message):
    with pytest.raises(InputError, match=message):
        load(as_bin(broken, change(llama[0].state_dict())))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_buffers_of_older_classes_are_no_weights(llama, broken, kind):
    """transformers leaves them aside as well."""
    attention = "model.layers.0.self_attn."
    old = {
        f"{attention}rotary_emb.inv_freq": torch.ones(4),
        f"{attention}rotary_emb.cos_cached": torch.ones(1, 1, 16, 8, dtype=torch.float16),
        f"{attention}rotary_emb.sin_cached": torch.ones(1, 1, 16, 8, dtype=torch.bfloat16),
        f"{attention}bias": torch.ones(1, 1, 16, 16, dtype=torch.bool),
        f"{attention}masked_bias": torch.tensor(-1e4),
        "model.causal_mask": torch.ones(16, 16, dtype=torch.bool),
        "model.embeddings.position_ids": torch.arange(16)[None],
    }
    state = {**llama[0].state_dict(), **old}
    if kind == "bin":
        as_bin(broken, state)
    else:
        save_torch_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert_same_arrays(load(broken), load(llama[1]))
    reference = AutoModelForCausalLM.from_pretrained(broken)
    np.testing.assert_allclose(logits(load(broken), tokens(SHORT)), torch_logits(reference, tokens(SHORT)), atol=1e-4)


def test_float8_in_safetensors(llama, broken):
    state = llama[0].state_dict()
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    state["model.norm.weight_scale"] = torch.ones(1)
    save_torch_file(state, broken / "model.safetensors")
    with pytest.raises(
        InputError, match=r"norm\.weight is stored as F8_E4M3, expected .*; use the unquantised checkpo"
    ):
        load(broken)


def test_tied_checkpoint_may_repeat_its_head(tmp_path):
    folder = save(build("llama-mha-tied"), tmp_path)
    single = load(folder)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    assert_same_arrays(load(folder), single)
    edit_weights(folder, lambda w: w.pop("model.embed_tokens.weight"))
    assert_same_arrays(load(folder), single)
    edit_weights(folder, lambda w: w.update({"model.embed_tokens.weight": w["lm_head.weight"] + np.float32(1)}))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(folder)


def test_stored_frequencies_are_no_weights(broken, llama):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    edit_weights(broken, lambda w: w.update(extra))
    assert_same_arrays(load(broken), load(llama[1]))


OLD_CONFIGS = {
    "llama-linear": ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0}}, ()),
    "llama-theta": ({"rope_theta": 123456.0, "rope_scaling": None}, ()),
    "llama3": ({"rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}, ()),
    "phi3-longrope": (
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "su",
                "short_factor": LONGROPE["short_factor"],
                "long_factor": LONGROPE["long_factor"],
            },
        },
        (),
    ),
    "llama-mha-tied": ({"rope_theta": 1e4}, ("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias")),
    "phi": ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, ("num_key_value_heads", "head_dim")),
}


@pytest.mark.parametrize("case", OLD_CONFIGS)
def test_configurations_of_older_transformers(case, tmp_path):
    new = load(save(build(case), tmp_path)).config
    changes, absent = OLD_CONFIGS[case]
    edit_config(tmp_path, drop=("rope_parameters", *absent), **changes)
    old = load(tmp_path).config
    assert json.loads(old.source) != json.loads(new.source)
    assert {**old.to_json(), "source": ""} == {**new.to_json(), "source": ""}


def test_source_and_generation_config_are_kept(llama):
    model = load(llama[1])
    assert json.loads(model.config.source) == json.loads((llama[1] / "config.json").read_text())
    assert model.generation_config["eos_token_id"] == 2
    assert model.tokenizer is None
    with pytest.raises(InputError, match=r"has no tokenizer"):
        model.require_tokenizer()


def test_token_0_and_tokens_that_are_none(broken):
    edit_config(broken, eos_token_id=[5, -1], pad_token_id=-1)
    (broken / "generation_config.json").write_text('{"eos_token_id": 0}')
    model = load(broken)
    assert (model.config.eos_token_id, model.config.pad_token_id) == ((5,), None)
    assert stop_tokens(model) == {0, 5}
    (broken / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id must be a whole number, found '2'"):
        load(broken)


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_not_ignored(broken, alone):
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if alone:
        (broken / "config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json: .* PEFT adapter.*merge it first.*merge_and_unload"):
        load(broken)


def test_export_of_a_pruned_model_loads(tmp_path):
    shapes = (
        LayerShape((0, 0, 1), qk_head_dim=6, rotary_dim=4, v_head_dim=5, intermediate_size=24),
        LayerShape((0, 1), qk_head_dim=4, rotary_dim=4, v_head_dim=7, intermediate_size=16, sliding_window=9),
    )
    config = ModelConfig(
        model_type="phi3",
        vocab_size=50,
        hidden_size=16,
        head_dim=8,
        rotary_dim=6,
        layers=shapes,
        attention_bias=True,
        mlp_bias=True,
        attention_output_bias=True,
        source='{"model_type": "phi3"}',
    )
    rng = np.random.default_rng(0)
    arrays = {
        path: np.sort(rng.permuted(np.tile(np.arange(3, dtype=np.int32), (2, 1)), axis=1)[:, :2])
        if "rope_pairs" in path
        else rng.standard_normal(array.shape).astype(np.float32)
        for path, array in abstract_arrays(config).items()
    }
    save_file(dict(to_checkpoint("IntraSliceForCausalLM", config, arrays)), tmp_path / "model.safetensors")
    described = {"architectures": ["IntraSliceForCausalLM"], "model_type": "intraslice"}
    (tmp_path / "config.json").write_text(json.dumps({**described, "intraslice": config.to_json()}))
    model = load(tmp_path)
    assert model.config == config
    for path, array in decoder_to_arrays(model.decoder).items():
        np.testing.assert_array_equal(np.asarray(array), arrays[path], err_msg=path)

    with pytest.raises(InputError, match=r"LlamaForCausalLM has no place for layers\.0\.attention\.rope_pairs"):
        dict(to_checkpoint("LlamaForCausalLM", config, arrays))


def test_fused_tensors_need_all_their_parts(tmp_path):
    model = load(save(build("phi3"), tmp_path))
    arrays = decoder_to_arrays(model.decoder)
    with pytest.raises(KeyError):
        dict(to_checkpoint("Phi3ForCausalLM", model.config, {k: v for k, v in arrays.items() if "k_proj" not in k}))
    with pytest.raises(InputError, match=r"Phi3ForCausalLM has no place for layers\.0\.attention\.k_bias"):
        dict(to_checkpoint("Phi3ForCausalLM", load(save(build("qwen2"), tmp_path / "q")).config, {}))


def test_hub_id_from_the_cache(llama, tmp_path, monkeypatch):
    commit = "0" * 40
    cache = tmp_path / "models--someone--tiny"
    shutil.copytree(llama[1], cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load("someone/tiny")
    assert model.name == "someone/tiny"
    assert_same_arrays(model, load(llama[1]))


def test_real_checkpoint_continues_a_story(shared_data):
    model = load(shared_data / "stories260k")
    ids = list(model.require_tokenizer()("Once upon a time, there was a little").input_ids)
    assert ids[0] == model.config.bos_token_id
    reference = torch_logits(AutoModelForCausalLM.from_pretrained(shared_data / "stories260k"), np.asarray([ids]))
    np.testing.assert_allclose(logits(model, np.asarray([ids])), reference, atol=1e-4, rtol=0)


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Phi3SmallForCausalLM"]}, r"Phi3SmallForCausalLM is not supported; supported: Llama"),
        ({"architectures": ["MixtralForCausalLM"]}, r"MixtralForCausalLM is not supported"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, r"Qwen3ForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gpt2"}, r"model_type 'gpt2' is not supported; supported: Llama"),
        ({"architectures": ["PhiForCausalLM"], "model_type": "phi-msft"}, r"model_type 'phi-msft' \(expected 'phi'\)"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised weights \(gptq\) are not supported"),
        ({"num_attention_heads": 5, "head_dim": None}, r"num_attention_heads \(5\) must be a multiple of"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": None},
            r"hidden_size \(32\) must be a multiple of num_attention_heads \(6\)",
        ),
        ({"num_key_value_heads": 3}, r"must be a multiple of num_key_value_heads \(3\)"),
        ({"hidden_size": 0}, r"hidden_size must be at least 1, found 0"),
        ({"num_hidden_layers": None}, r"num_hidden_layers must be a whole number, found nothing"),
        ({"hidden_act": "quick_gelu_of_mine"}, r"hidden_act 'quick_gelu_of_mine' is not supported; supported: silu"),
        ({"head_dim": 7}, r"head_dim 7 rotates 7 channels, expected an even number"),
        ({"rope_parameters": {"rope_type": "xpos"}}, r"rope_type 'xpos' is not supported; supported: default"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_type 'linear': factor is missing"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": -2}},
            r"rope_parameters\.factor must be at least 0\.000001, found -2",
        ),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, r"high_freq_factor must be above low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"differ between kinds of layers"),
        ({"rms_norm_eps": "tiny"}, r"rms_norm_eps must be a number, found 'tiny'"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings must be true or false, found 'yes'"),
        ({"num_hidden_layers": 2**31}, r"num_hidden_layers must be at most 10000, found 2147483648"),
        ({"hidden_size": 10**400}, r"hidden_size must be at most 2147483647, found 1000"),
        ({"vocab_size": float("inf")}, r"vocab_size must be a whole number, found inf"),
        ({"layer_types": 3}, r"layer_types must be a list, found 3"),
        ({"quantization_config": "gptq"}, r"quantization_config must be an object, found 'gptq'"),
        ({"is_causal": False}, r"is_causal false \(attention to later tokens\) is not supported"),
        ({"is_causal": None}, r"is_causal false"),
        ({"is_encoder_decoder": True}, r"is_encoder_decoder \(true\) is not supported"),
        ({"attention_chunk_size": 3}, r"attention_chunk_size \(attention within chunks\) is not supported"),
        ({"attribute_map": {"rms_norm_eps": "attention_dropout"}}, r"attribute_map \(fields that stand for others\)"),
        ({"layer_types": ["sliding_attention"] * 2}, r"layer_types names sliding_attention, but .* no sliding_window"),
        ({"architectures": [["Llama"]]}, r"architectures\.0 must be text, found \['Llama'\]"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id must be a whole number, found \[1, '2'\]"),
        ({"rope_theta": 1.0, "rope_parameters": None}, r"rope_theta must be above 1, found 1\.0"),
        ({"sliding_window": 16}, r"sliding_window 16 is not supported in this family"),
        ({"num_hidden_layers": 3}, r"holds 2 layers, the configuration says 3"),
        ({"num_hidden_layers": 9_000}, r"holds 2 layers, the configuration says 9000"),
        ({"num_hidden_layers": 1}, r"missing nothing; left over model\.layers\.1\."),
        ({"intermediate_size": 48}, r"mlp\.gate_proj\.weight has shape \[40, 32\], .*implies \[48, 32\]"),
        ({"attention_bias": True}, r"missing model\.layers\.0\.self_attn\.k_proj\.bias"),
    ],
)
def test_contradictory_llama(broken, changes, message):
    edit_config(broken, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mistral-window", {"sliding_window": 0}, r"sliding_window must be at least 1, found 0"),
        ("qwen2-window", {"layer_types": ["full_attention"]}, r"layer_types must hold 2 times .* found 1 entries"),
        ("qwen2-window", {"layer_types": ["chunked"] * 2}, r"layer_types must hold .* found chunked"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers must hold 2 numbers, one per layer, found 1"),
        (
            "phi3-longrope",
            {"rope_parameters": LONGROPE | {"long_factor": [1.0, 2.0]}},
            r"rope long_factor must hold 3 positive numbers, one per frequency, found 2 entries",
        ),
        (
            "phi3-longrope",
            {"rope_parameters": LONGROPE | {"short_factor": None}},
            r"rope_type 'longrope': short_factor is missing",
        ),
        (
            "phi3-partial",
            {"rope_parameters": {"partial_rotary_factor": 1.5}},
            r"partial_rotary_factor 1\.5 of head_dim 8 rotates 12 channels",
        ),
        ("phi3-window-tied", {"sliding_window": 0}, r"sliding_window must be at least 1, found 0"),
        ("qwen2-window", {"sliding_window": -1}, r"sliding_window must be at least 1, found -1"),
        ("phi3", {"num_attention_heads": 5}, r"num_attention_heads \(5\) must be a multiple of num_key_value_heads"),
        (
            "phi",
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
            r"hidden_size \(32\) must be a multiple of num_attention_heads \(5\)",
        ),
        (
            "phi3-longrope",
            {"rope_parameters": LONGROPE | {"short_factor": [1.0, -1.0, 2.0]}},
            r"rope_parameters\.short_factor\.1 must be at least 0\.000001, found -1\.0",
        ),
        ("phi", {"num_key_value_heads": 2}, r"self_attn\.k_proj\.weight has shape \[32, 32\], .* implies \[16, 32\]"),
        ("mistral-window", {"layer_types": ["full_attention"] * 2}, r"layer_types contradicts sliding_window"),
        (
            "smollm3",
            {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
            r"layer_types names sliding_attention, but the model has no sliding_window in use",
        ),
        (
            "phi3-longrope",
            {"original_max_position_embeddings": 1},
            r"'longrope': original_max_position_embeddings must be at least 2, found 1",
        ),
        ("phi", {"qk_layernorm": True}, r"qk_layernorm .* is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported in this family"),
    ],
)
def test_contradictory_options(case, changes, message, tmp_path):
    save(build(case), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp.gate_up_proj"])
def test_missing_fused_tensor(name, tmp_path):
    save(build("phi3"), tmp_path)
    edit_weights(tmp_path, lambda w: w.pop(f"model.layers.1.{name}.weight"))
    with pytest.raises(InputError, match=rf"missing model\.layers\.1\.{name}\.weight; left over nothing"):
        load(tmp_path)


def test_fused_tensor_of_another_height(tmp_path):
    save(build("phi3"), tmp_path)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    edit_weights(tmp_path, lambda w: w.update({name: w[name][:-8]}))
    with pytest.raises(
        InputError, match=r"qkv_proj\.weight has shape \[56, 32\], the configuration implies \[64, 32\]"
    ):
        load(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bad_number_is_named(broken, value, dtype):
    def change(weights):
        name = "model.layers.1.mlp.down_proj.weight"
        weights[name] = weights[name].astype(dtype)
        weights[name][3, 5] = weights[name][7, 0] = value

    edit_weights(broken, change)
    with pytest.raises(InputError, match=rf"layers\.1\.mlp\.down_proj\.weight holds {value} at index \[3, 5\]"):
        load(broken)


def test_too_large_for_float16(broken):
    edit_weights(broken, lambda w: w["model.norm.weight"].__setitem__(0, 1e6))
    assert load(broken, "bfloat16").decoder.norm.weight[0] > 9e5
    with pytest.raises(InputError, match=r"model\.norm\.weight does not fit into float16; use bfloat16 or float32"):
        load(broken, "float16")


def test_untied_head_missing(broken):
    edit_weights(broken, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"missing lm_head\.weight; .* needs tie_word_embeddings true"):
        load(broken)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_safetensors(broken, keep):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors .*truncated.*download it again"):
        load(broken)


def test_damaged_safetensors(broken):
    path = broken / "model.safetensors"
    content = path.read_bytes()
    for damaged in (
        content[:8] + b"x" + content[9:],
        content + b"0",
        content.replace(b'"F32"', b'"F33"', 1),
        content.replace(b"[32,32]", b"[32,31]", 1),
        content.replace(b"data_offsets", b"data_offsetz", 1),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors"):
            load(broken)


def header_of(content):
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [10**18]}, r"does not fit its 128 bytes"),
        ({"shape": [10**400]}, r"shape\.0.* must be"),
        ({"shape": [-32]}, r"shape\.0 must be at least 0, found -32"),
        ({"shape": None}, r"shape must be a list"),
        ({"shape": [float("inf")]}, r"shape\.0 must be a whole number"),
        ({"dtype": ["F32"]}, r"dtype must be text"),
        ({"data_offsets": [0, 128]}, r"begins at byte \d+, expected \d+"),
        ({"data_offsets": [0, 10**18]}, r"begins at byte \d+|does not fit its"),
        ({"data_offsets": [2**70, 0]}, r"data_offsets\.0 must be at most"),
        ({"data_offsets": {}}, r"data_offsets must be a list"),
    ],
)
def test_headers_that_lie(broken, change, message):
    path = broken / "model.safetensors"
    header, data = header_of(path.read_bytes())
    header["model.norm.weight"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(InputError, match=message) as caught:
        load(broken)
    assert "\n" not in str(caught.value)


def test_a_header_as_long_as_it_likes(broken):
    path = broken / "model.safetensors"
    content = path.read_bytes()
    for length in (10**18, 2**64 - 1, len(content)):
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(InputError, match="truncated or not a safetensors file"):
            load(broken)
    deep = b'{"a":' + b"[" * 10**5
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(InputError, match=r"the header of .*model\.safetensors cannot be read as JSON"):
        load(broken)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"model\.safetensors is not a file"):
        load(broken)


def test_index_and_shards(llama, tmp_path):
    folder = save(llama[0], tmp_path, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    for text, message in (
        (whole[:200], r"index\.json cannot be read as JSON"),
        ("{}", r"index\.json: weight_map is missing"),
        ('{"weight_map": {"a": 1}}', r"index\.json: weight_map\.a must be text, found 1"),
        ('{"weight_map":' + "[" * 10**5, r"index\.json cannot be read as JSON"),
        (whole.replace("model-00001", "x" * 300), r"safetensors cannot be read: File name too long"),
        (whole.replace("model-00001", "../model-00001"), r"names a shard outside its folder"),
        (whole.replace("model-00001", "model-00000"), r"model-00000-of-\d+\.safetensors is missing"),
    ):
        index.write_text(text)
        with pytest.raises(InputError, match=message):
            load(folder)


def test_not_a_model(broken, tmp_path):
    for source, message in (
        (tmp_path / "absent", r"absent does not exist; expected a folder with config\.json, a \.gguf file or a hub id"),
        (broken / "config.json", r"config\.json is not a model; expected a folder"),
        ("someone/absent", r"someone/absent .* the hub cannot be reached"),
        ("./no/such/folder/here", r"does not exist"),
        ("x" * 300, r"cannot be read: File name too long"),
    ):
        with pytest.raises(InputError, match=message):
            load(source)
    with pytest.raises(InputError, match=r"dtype 'int8' is not supported; expected float32"):
        load(broken, "int8")
    (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no weights: expected model\.safetensors"):
        load(broken)
    for text, message in (
        ("[1, 2]", r"config\.json must be an object, found \[1, 2\]"),
        ("[" * 5_000, r"config\.json cannot be read as JSON"),
        ('{"intraslice": {}}', r"model_type None is not supported"),
    ):
        (broken / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            load(broken)
    (broken / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds no config\.json; is it a model's folder\?"):
        load(broken)
    (broken / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds no config\.json; to load the GGUF file in it, name .*tiny\.gguf"):
        load(broken)


def test_every_family_is_tested():
    tested = {f"{family}ForCausalLM" for family, _ in CASES.values()}
    assert tested == set(FAMILIES) - {"IntraSliceForCausalLM"}
