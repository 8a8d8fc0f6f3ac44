"""Exports: PyTorch computes what we compute, whatever the family; files are whole or absent."""

import dataclasses
import functools
import json
import re
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.convert import load
from intraslice_jax.convert.export import export
from intraslice_jax.convert.families import FAMILIES
from intraslice_jax.convert.modeling_intraslice import CACHE
from intraslice_jax.convert.pruned_config import pruned_config
from intraslice_jax.convert.shards import parse_size
from intraslice_jax.convert.tokenizer import tokenizer_from_folder
from intraslice_jax.convert.tokenizer_writing import save_tokenizer
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from tests.convert.exported import (
    FLAVOURS,
    LAYERS,
    TOKENS,
    VOCAB,
    greedy,
    in_torch,
    make,
    our_logits,
    quiet_torch,
    torch_logits,
    with_random_weights,
)
from tests.convert.test_gguf_export import byte_level, sentencepiece
from tests.tiny import tiny_config, write_tiny_llama, write_tokenizer

CLOSE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _own_module_cache(tmp_path_factory):
    with quiet_torch(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Exports by flavour, each written once."""
    written = {}

    def get(flavour):
        if flavour not in written:
            path = tmp_path_factory.mktemp("export") / flavour.replace(" ", "_")
            written[flavour] = export(make(flavour), path)
        return written[flavour]

    return get


@pytest.fixture(scope="module")
def logits_of():
    """Our logits by flavour and number of tokens, each computed once."""

    @functools.cache
    def logits(flavour, length):
        return our_logits(make(flavour).decoder, TOKENS[:, :length])

    return lambda flavour: functools.partial(logits, flavour)


def stored(path):
    """All tensors of a folder as NumPy arrays, bfloat16 included, and the safetensors files they are in."""
    files, tensors = sorted(path.glob("*.safetensors")), {}
    for file in files:
        with safe_open(file, "np") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, [file.name for file in files]


# Pruned models


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_torch_has_our_logits(folder, logits_of, flavour, attention):
    exported, want = in_torch(folder(flavour), attention), logits_of(flavour)
    # Beyond sliding windows, the original context of longrope and the trained one of dynamic scaling ...
    np.testing.assert_allclose(torch_logits(exported, TOKENS), want(40), rtol=0, atol=CLOSE)
    # ... and within: the frequencies of these two depend on the length.
    if flavour in ("llama dynamic", "phi3"):
        np.testing.assert_allclose(torch_logits(exported, TOKENS[:, :12]), want(12), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("flavour", ["llama", "mistral", "qwen2", "smollm3", "phi", "phi3"])
def test_greedy_text_with_a_cache_is_that_without(folder, flavour):
    exported = in_torch(folder(flavour))
    plain = greedy(exported, TOKENS[:, :6], 14, use_cache=False)
    np.testing.assert_array_equal(greedy(exported, TOKENS[:, :6], 14), plain)
    if flavour == "phi3":
        return  # a static cache cannot start anew where longrope changes its frequencies
    static = greedy(exported, TOKENS[:, :6], 14, cache_implementation="static", disable_compile=True)
    np.testing.assert_array_equal(static, plain)


@pytest.mark.parametrize("flavour", ["llama", "mistral", "phi"])
def test_cached_steps_have_our_logits_and_copy_no_heads(folder, logits_of, flavour, monkeypatch):
    exported, widths = in_torch(folder(flavour), "sdpa"), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, **options):
        widths.append((key.shape[1], value.shape[1]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    found, cache = [], {}
    with torch.no_grad():
        for token in torch.from_numpy(TOKENS).long().split(1, dim=1):
            out = exported(token, use_cache=True, **cache)
            cache = {CACHE: out[CACHE]}
            found.append(out.logits)
    np.testing.assert_allclose(torch.cat(found, 1), logits_of(flavour)(40), rtol=0, atol=CLOSE)
    assert widths == [(shape.num_key_value_heads,) * 2 for shape in make(flavour).config.layers] * len(found)


def test_a_cached_step_takes_a_mask_of_every_head(tmp_path):
    path = export(make("llama", layers=LAYERS[:1]), tmp_path / "ragged")
    tokens = torch.from_numpy(TOKENS[:, :9]).long()
    hidden = torch.zeros(2, LAYERS[0].num_attention_heads, 1, 9)
    hidden[:, 1, :, 2:5] = -torch.inf  # from one query head
    logits = []
    for attention in ("eager", "sdpa"):
        exported = in_torch(path, attention)
        with torch.no_grad():
            cache = {CACHE: exported(tokens[:, :8], use_cache=True)[CACHE]}
            logits.append(exported(tokens[:, 8:], attention_mask=hidden, **cache).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=CLOSE)


def test_greedy_text_is_ours(folder):
    model, length, new = make("llama"), 6, 14
    tokens = np.zeros((2, length + new), np.int32)
    tokens[:, :length] = TOKENS[:, :length]
    for end in range(length, length + new):  # attention is causal: what stands behind does not matter
        tokens[:, end] = our_logits(model.decoder, tokens)[:, end - 1].argmax(-1)
    np.testing.assert_array_equal(greedy(in_torch(folder("llama")), TOKENS[:, :length], new), tokens)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("flavour", ["llama", "qwen2", "phi3"])
def test_padding_changes_nothing(folder, flavour, attention):
    exported = in_torch(folder(flavour), attention)
    short, long = TOKENS[:1, :5], TOKENS[1:, :9]
    padded, mask = np.zeros((2, 9), np.int32), torch.ones((2, 9), dtype=torch.long)
    padded[0, 4:], padded[1], mask[0, :4] = short, long, 0
    # As in the stock class, longrope changes the frequencies of a whole batch when its longest row needs it.
    new = 7 if flavour == "phi3" else 14
    together = greedy(exported, padded, new, attention_mask=mask)
    np.testing.assert_array_equal(together[0, 4:], greedy(exported, short, new)[0])
    np.testing.assert_array_equal(together[1], greedy(exported, long, new)[0])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = torch_logits(exported, padded, attention_mask=mask, position_ids=positions)
    np.testing.assert_allclose(logits[0, 4:], torch_logits(exported, short)[0], rtol=0, atol=CLOSE)


def test_hidden_states_and_attentions_come_on_request(folder):
    with torch.no_grad():
        out = in_torch(folder("llama"), "eager")(
            torch.from_numpy(TOKENS).long(), output_attentions=True, output_hidden_states=True
        )
    assert [a.shape[1] for a in out.attentions] == [shape.num_attention_heads for shape in LAYERS]
    assert len(out.hidden_states) == len(LAYERS) + 1


def test_training_reaches_every_weight(folder):
    exported = in_torch(folder("llama biases")).train()
    # Older releases know the second name only.
    enable = getattr(exported, "activation_checkpointing_enable", None) or exported.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    tokens = torch.from_numpy(TOKENS).long()
    exported(tokens, labels=tokens).loss.backward()
    without = [name for name, weight in exported.named_parameters() if weight.grad is None]
    assert not without


def test_kernels_of_one_width_get_it(folder, logits_of):
    """As flash attention or vLLM are called: no mask, queries, keys and values equally wide, grouped heads."""

    def kernel(module, query, key, value, attention_mask, scaling, **kwargs):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[1] == key.shape[1] * module.num_key_value_groups
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    name = "one_width"
    ALL_ATTENTION_FUNCTIONS.register(name, kernel)
    try:
        logits = torch_logits(in_torch(folder("llama"), name), TOKENS)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]
    np.testing.assert_allclose(logits, logits_of("llama")(40), rtol=0, atol=CLOSE)


def test_config_describes_the_model(folder):
    path = folder("llama")
    raw = json.loads((path / "config.json").read_text())
    # Nothing is said twice: what transformers has keys for is not in ours.
    assert "rope" not in raw["intraslice"]
    assert not {"vocab_size", "hidden_act", "qk_head_dim", "intermediate_size"} & {
        *raw["intraslice"],
        *raw["intraslice"]["layers"][0],
    }
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert [layer.num_key_value_heads for layer in config.per_layer_config] == [3, 3, 2]
    assert [layer.intermediate_size for layer in config.per_layer_config] == [24, 16, 20]
    assert [layer.qk_head_dim for layer in config.per_layer_config] == [6, 4, 8]
    assert config.tie_word_embeddings


def test_layers_that_agree_need_no_per_layer_config(tmp_path):
    shape = LayerShape((0, 0, 1, 1), 8, 8, 8, 24)
    model = make("llama", layers=(shape, shape))
    path = export(model, tmp_path / "out")
    assert "per_layer_config" not in json.loads((path / "config.json").read_text())
    np.testing.assert_allclose(
        torch_logits(in_torch(path), TOKENS), our_logits(model.decoder, TOKENS), rtol=0, atol=CLOSE
    )


def test_tied_embeddings_stay_tied(folder):
    exported = in_torch(folder("llama"))
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert "lm_head.weight" not in stored(folder("llama"))[0]
    exported = in_torch(folder("mistral"))
    assert not torch.equal(exported.lm_head.weight, exported.model.embed_tokens.weight)


@pytest.mark.parametrize("flavour", ["llama", "phi"])
def test_saved_by_transformers_and_loaded_again(folder, flavour, tmp_path):
    exported = in_torch(folder(flavour))
    exported.save_pretrained(tmp_path / "again")
    again = in_torch(tmp_path / "again")
    np.testing.assert_array_equal(torch_logits(again, TOKENS), torch_logits(exported, TOKENS))
    assert_same(load(tmp_path / "again"), make(flavour))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_loaded_by_us_again(folder, flavour):
    assert_same(load(folder(flavour)), make(flavour))


def edited(folder, path, **changes):
    """A copy of an export whose `config.json` somebody edited."""
    shutil.copytree(folder, path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))
    return path


EDITS = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}, "hidden_act": "gelu"},
    "mistral": {"sliding_window": 9, "rope_theta": 300.0, "attention_bias": True, "rms_norm_eps": 0.5},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 1.0}},
}


@pytest.mark.parametrize("flavour", EDITS)
def test_an_edited_configuration_means_the_same_to_both(folder, logits_of, tmp_path, flavour):
    path = edited(folder(flavour), tmp_path / "edited", **EDITS[flavour])
    model = load(path)
    ours = our_logits(model.decoder, TOKENS)
    np.testing.assert_allclose(torch_logits(in_torch(path), TOKENS), ours, rtol=0, atol=CLOSE)
    assert np.abs(ours - logits_of(flavour)(40)).max() > 0.01
    # In the first version the key intraslice repeated everything; PyTorch read the top level then, too.
    old = edited(path, tmp_path / "old", intraslice=make(flavour).config.to_json())
    if flavour == "mistral":
        with pytest.raises(InputError, match=r"sliding_window of layer 0 is 9, but intraslice\.layers says 5"):
            load(old)
    else:
        assert load(old).config == model.config


def test_a_larger_vocabulary_is_read_back(folder, tmp_path):
    exported = in_torch(folder("llama"))
    exported.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    exported.save_pretrained(tmp_path / "larger")
    ours = our_logits(load(tmp_path / "larger").decoder, TOKENS)
    np.testing.assert_allclose(torch_logits(exported, TOKENS), ours, rtol=0, atol=CLOSE)


def test_exports_of_the_first_version_are_read(folder, tmp_path):
    for flavour in ("llama", "qwen2", "smollm3", "phi3"):
        path = edited(folder(flavour), tmp_path / flavour, intraslice=make(flavour).config.to_json())
        assert_same(load(path), make(flavour))


def old_copy(**changes):
    """The key `intraslice` of the first version, its first layer changed."""
    old = make("llama").config.to_json()
    old["layers"][0] |= changes
    return {"intraslice": old}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads of layer 0 is 5, but its intraslice.query_to_kv makes it 6"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but intraslice.layers has 3 entries"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers is 3, but layer_types has 1 entries"),
        ({"per_layer_config": {"9": {"head_dim": 4}}}, "per_layer_config names layer 9, but num_hidden_layers is 3"),
        ({"per_layer_config": {"0": {"sliding_window": 4}}}, r"per_layer_config.0.sliding_window"),
        ({"intraslice": {"layers": []}}, r"intraslice.model_type is missing"),
        ({"intraslice": 3}, "intraslice must be"),
        (old_copy(v_head_dim=5), "v_head_dim of layer 0 is 4, but intraslice.layers says 5"),
        (old_copy(sliding_window=5), "sliding_window of layer 0 is None, but intraslice.layers says 5"),
        (old_copy(query_to_kv=[0, 2**31 - 1]), "query_to_kv must count up from 0 without gaps"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load(edited(folder("llama"), tmp_path / "edited", **changes))


def assert_same(model, want):
    # As it is written: a RoPE factor that follows from two lengths is spelled out for transformers.
    assert pruned_config(model.config, "float32") == pruned_config(want.config, "float32")
    arrays, expected = decoder_to_arrays(model.decoder), decoder_to_arrays(want.decoder)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], name)


# Files


def test_shards(folder, tmp_path):
    path = export(make("llama biases"), tmp_path / "out", max_shard_size=4000)
    tensors, files = stored(path)
    whole, single = stored(folder("llama biases"))
    assert single == ["model.safetensors"]
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert tensors.keys() == whole.keys() == index["weight_map"].keys()
    for file in files:
        names = [name for name, where in index["weight_map"].items() if where == file]
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= 4000
    np.testing.assert_array_equal(
        torch_logits(in_torch(path), TOKENS), torch_logits(in_torch(folder("llama biases")), TOKENS)
    )
    assert_same(load(path), make("llama biases"))


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_other_dtypes(folder, logits_of, tmp_path, dtype, kind):
    path = export(make("phi"), tmp_path / "out", dtype=dtype)
    exported = in_torch(path)
    assert exported.dtype == getattr(torch, dtype)
    whole = stored(folder("phi"))[0]
    for name, tensor in exported.state_dict().items():
        if name.endswith("rope_pairs"):
            assert tensor.dtype == torch.int32
        else:
            np.testing.assert_array_equal(tensor.float().numpy(), whole[name].astype(kind).astype(np.float32), name)
    want = logits_of("phi")(40)
    assert np.abs(torch_logits(exported, TOKENS) - want).max() < 0.05 * np.abs(want).max()
    again = load(path)
    assert {array.dtype.name for array in jax.tree.leaves(again.decoder)} == {dtype, "int32"}
    back = stored(export(again, tmp_path / "back"))[0]
    for name, tensor in stored(path)[0].items():
        assert tensor.tobytes() == back[name].tobytes()


def test_no_second_copy_of_the_model(tmp_path):
    """Memory follows the largest tensor, not the model."""
    config = ModelConfig("llama", 2048, 256, 32, 32, (LayerShape((0, 0, 1, 1), 32, 32, 32, 2048),) * 8)
    model = with_random_weights(config)
    largest = 4 * 256 * 2048
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        export(model, tmp_path / "out", dtype="bfloat16", max_shard_size=3 * largest)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert config.total_parameters() * 2 > 12 * largest / 1.3
    assert peak < 2.5 * largest


def test_tokenizer_generation_settings_and_card(tmp_path):
    write_tokenizer(tmp_path)
    report = {
        "removed_block_fraction": 0.3012,
        "removed_model_fraction": 0.2,
        "calibration_samples": 8,
        "calibration_sequence_length": 128,
    }
    model = dataclasses.replace(
        make("llama", pad_token_id=0), tokenizer=tokenizer_from_folder(tmp_path), name="owner/base", report=report
    )
    settings = {"eos_token_id": [1, 3], "do_sample": True, "temperature": 0.5}
    path = export(dataclasses.replace(model, generation_config=settings), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    assert tokenizer("Hello, world").input_ids == model.tokenizer("Hello, world").input_ids
    assert in_torch(path).generation_config.temperature == 0.5
    card = (path / "README.md").read_text()
    for text in ("base_model: owner/base\n", "30.12%", "20.00%", "8 windows of 128 tokens", "trust_remote_code=True"):
        assert text in card
    path = export(dataclasses.replace(model, name=str(tmp_path / "here" / "model")), tmp_path / "other")
    assert json.loads((path / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    assert not [file.name for file in path.iterdir() if str(tmp_path) in file.read_bytes().decode("utf-8", "ignore")]


@pytest.mark.parametrize("made", [byte_level, sentencepiece])
def test_the_tokenizer_of_an_export_is_for_every_release(tmp_path, made):
    tokenizer = made()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = "{{ messages }}"
    save_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # 4.x does not know TokenizersBackend, local_files_only, a list of extra_special_tokens or templates in other files.
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|end|>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens", "auto_map"} & written.keys()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again, text = tokenizer_from_folder(tmp_path), "the river <s> runs<|end|>  over café"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    for name in ("chat_template", "model_max_length", "eos_token", "unk_token", "pad_token"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens)


# Unpruned models: the family's own layout


@pytest.mark.parametrize("tied", [True, False])
def test_an_unpruned_llama_is_the_stock_class(tmp_path, tied):
    source = write_tiny_llama(tmp_path / "source", tie_word_embeddings=tied, auto_map={"AutoConfig": "gone.Config"})
    path = export(load(source), tmp_path / "out")
    tensors, before = stored(path)[0], stored(source)[0]
    assert tensors.keys() == before.keys()
    for name, array in before.items():
        assert array.tobytes() == tensors[name].tobytes()
    wanted = {k: v for k, v in json.loads((source / "config.json").read_text()).items() if k != "auto_map"}
    assert json.loads((path / "config.json").read_text()) == wanted | {"torch_dtype": "float32"}
    assert not list(path.glob("*.py"))
    exported = in_torch(path)
    assert type(exported) is transformers.LlamaForCausalLM
    # The source without its auto_map, which names a file that is not there.
    (source / "config.json").write_text(json.dumps(wanted))
    original = AutoModelForCausalLM.from_pretrained(source)
    np.testing.assert_array_equal(torch_logits(exported, TOKENS), torch_logits(original, TOKENS))
    np.testing.assert_allclose(
        torch_logits(exported, TOKENS), our_logits(load(path).decoder, TOKENS), rtol=0, atol=CLOSE
    )


STOCK = {
    "Phi3ForCausalLM": {
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "PhiForCausalLM": {"hidden_act": "gelu_new", "num_key_value_heads": 4},
    "Qwen2ForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 7},
    "SmolLM3ForCausalLM": {"no_rope_layers": [0, 1], "pad_token_id": 0},
}


@pytest.mark.parametrize("architecture", STOCK)
def test_unpruned_exports_load_in_the_stock_class(tmp_path, architecture):
    family = FAMILIES[architecture]
    raw = tiny_config(
        architectures=[architecture],
        model_type=family.model_type,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        head_dim=None,
        **STOCK[architecture],
    )
    raw = {key: value for key, value in raw.items() if value is not None}
    config = family.read_config(raw, json.dumps(raw))
    model = with_random_weights(config, identity_pairs=True)
    exported = in_torch(export(model, tmp_path / "out"))
    assert type(exported) is getattr(transformers, architecture)
    np.testing.assert_allclose(torch_logits(exported, TOKENS), our_logits(model.decoder, TOKENS), rtol=0, atol=CLOSE)
    # Pairs in another order in one KV head: a stock class holds the same function, its channels in the usual order.
    arrays = decoder_to_arrays(model.decoder)
    name = "layers.1.attention.rope_pairs"
    arrays[name] = arrays[name].at[0].set(arrays[name][0, ::-1])
    model = with_arrays(model, arrays)
    exported = in_torch(export(model, tmp_path / "pairs"))
    assert type(exported).__name__ == architecture.replace("Phi3", "Llama")
    np.testing.assert_allclose(torch_logits(exported, TOKENS), our_logits(model.decoder, TOKENS), rtol=0, atol=CLOSE)


def with_arrays(model, arrays):
    return dataclasses.replace(model, decoder=decoder_from_arrays(model.config, arrays))


def test_unpruned_in_another_dtype(tmp_path):
    source = write_tiny_llama(tmp_path / "source", torch_dtype="float32")
    path = export(load(source), tmp_path / "out", dtype="bfloat16", max_shard_size="20KB")
    assert {array.dtype for array in stored(path)[0].values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert len(stored(path)[1]) > 1
    config = json.loads((path / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert in_torch(path).dtype == torch.bfloat16


# Refusals


def test_refuses_an_existing_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="overwrite"):
        export(make("llama"), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    export(make("llama"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_a_failure_leaves_nothing(tmp_path):
    model = make("llama")
    arrays = decoder_to_arrays(model.decoder)
    arrays["layers.2.mlp.up_proj"] = arrays["layers.2.mlp.up_proj"].at[3, 4].set(-1e5)
    with pytest.raises(InputError, match=r"float16.*model\.layers\.2\.mlp\.up_proj\.weight holds -100000.*bfloat16"):
        export(with_arrays(model, arrays), tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "pickle"}, "format 'pickle' is not supported"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"max_shard_size": "5 apples"}, "max_shard_size must be a size such as 5GB"),
        ({"max_shard_size": 0}, "max_shard_size must be"),
    ],
)
def test_refuses_unknown_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        export(make("llama"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_refuses_windows_of_different_sizes(tmp_path):
    layers = tuple(dataclasses.replace(LAYERS[2], sliding_window=size) for size in (4, 8))
    with pytest.raises(InputError, match=r"different sizes \[4, 8\]"):
        export(make("llama", layers=layers), tmp_path / "out")


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "500 mb", "1.5GiB", "7", 7)] == [5 * 10**9, 5 * 10**8, 3 * 2**29, 7, 7]


def test_the_modelling_file_stands_alone(folder):
    """It may import PyTorch, transformers and what they bring; attention goes through one replaceable call."""
    text = (folder("llama") / "modeling_intraslice.py").read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported == {"dataclasses", "huggingface_hub", "torch", "transformers", "typing"}
    assert text.count(".get_interface(") == 1
