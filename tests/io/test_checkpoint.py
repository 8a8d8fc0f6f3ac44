import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from intraslice_jax.errors import InputError
from intraslice_jax.io.checkpoint import is_checkpoint, restore, save
from intraslice_jax.models.decoder import decoder_to_arrays
from tests.prune.flavours import make
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return dataclasses.replace(
        make("ragged", eos_token_id=(1, 2), source='{"a": 1}'),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        generation_config={"temperature": 0.6, "eos_token_id": [1, 2]},
        report={"sparsity": 0.3, "layers": [{"kept_heads": [0, 2], "attention_error": 0.125}]},
    )


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save(model, tmp_path_factory.mktemp("saved") / "checkpoint")


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def assert_same_arrays(a, b):
    first, second = decoder_to_arrays(a.decoder), decoder_to_arrays(b.decoder)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert np.asarray(first[name]).tobytes() == np.asarray(second[name]).tobytes(), name


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        restore(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_everything_comes_back(model, saved):
    assert is_checkpoint(saved)
    back = restore(saved)
    assert_same_arrays(model, back)
    assert back.config == model.config
    assert (back.name, back.generation_config, back.report) == (model.name, model.generation_config, model.report)
    text = "A river, 12 stones."
    assert back.tokenizer(text).input_ids == model.tokenizer(text).input_ids
    assert back.tokenizer.eos_token == "</s>"
    assert back.tokenizer.decode(back.tokenizer(text).input_ids) == text
    tokens = jnp.asarray([[5, 17, 3, 60]])
    np.testing.assert_array_equal(back.decoder(tokens), model.decoder(tokens))


def test_what_a_person_reads(model, saved):
    assert json.loads((saved / "report.json").read_text()) == model.report
    config = json.loads((saved / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["versions"].keys() >= {"jax", "flax", "numpy", "intraslice-jax"}
    assert [layer["qk_head_dim"] for layer in config["model"]["layers"]] == [6, 8]


@pytest.mark.parametrize("flavour", ["gqa", "ragged", "phi"])
def test_bfloat16_is_kept_bit_by_bit(flavour, tmp_path):
    model = make(flavour, dtype=jnp.bfloat16)
    back = restore(save(model, tmp_path / "out"))
    assert_same_arrays(model, back)
    assert back.decoder.embed_tokens[...].dtype == jnp.bfloat16
    assert back.decoder.layers[0].attention.rope_pairs[...].dtype == jnp.int32
    assert back.config == model.config
    assert (back.decoder.lm_head is None) == model.config.tie_word_embeddings
    assert back.tokenizer is None
    assert back.report == {}


def test_an_existing_output_is_kept_unless_told_otherwise(model, copy, tmp_path):
    other = make("gqa")
    with pytest.raises(InputError, match=r"copy exists already.*`overwrite=True`"):
        save(other, copy)
    assert_same_arrays(restore(copy), model)
    save(other, copy, overwrite=True)
    back = restore(copy)
    assert_same_arrays(back, other)
    assert back.tokenizer is None  # nothing of the old one is left
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_model_that_cannot_be_saved_leaves_the_old_checkpoint(model, copy, tmp_path):
    with pytest.raises(TypeError):
        save(dataclasses.replace(model, report={"x": object()}), copy, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    assert_same_arrays(restore(copy), model)


def array_files(path):
    """Files that hold the arrays' bytes or lead to them."""
    return [p for p in (path / "state").rglob("*") if p.is_file() and p.stat().st_size]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_state_file(copy, damage, capfd):
    for file in array_files(copy):
        data = file.read_bytes()
        if damage == "missing":
            file.unlink()
        elif damage == "truncated":
            file.write_bytes(data[: len(data) // 2])
        else:
            file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        assert file.relative_to(copy).as_posix() in refused(copy)
        file.write_bytes(data)
    restore(copy)
    assert capfd.readouterr().err == ""  # no library's traceback beside the one line


@pytest.mark.parametrize("name", ["report.json", "SHA256SUMS", "state"])
def test_a_missing_part(copy, name):
    if name == "state":
        shutil.rmtree(copy / name)
    else:
        (copy / name).unlink()
    assert name in refused(copy)


@pytest.mark.parametrize("name", ["report.json", "tokenizer.json"])
def test_a_text_file_that_was_cut(copy, name):
    (copy / name).write_text((copy / name).read_text()[:20])
    refused(copy)


def test_another_version(copy):
    edit(copy / "config.json", lambda config: config.update(format_version=2))
    assert "version 2, this program reads 1" in refused(copy)
    edit(copy / "config.json", lambda config: config.pop("format_version"))
    refused(copy)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda config: config.pop("model"), "model"),
        (lambda config: config.pop("name"), "name"),
        (lambda config: config.update(dtype="float23"), "float23"),
        (lambda config: config["model"].update(width=3), "width"),
        (lambda config: config["model"].pop("hidden_size"), "hidden_size"),
        (lambda config: config["model"]["rope"].pop("parameters"), "parameters"),
        (lambda config: config["model"]["layers"].pop(), "layers.1"),
        (lambda config: config["model"]["layers"][0].update(intermediate_size=23), "layers.0.mlp"),
        (lambda config: config["model"]["layers"][0].update(query_to_kv=[0, 2]), "query_to_kv"),
    ],
)
def test_a_description_that_does_not_fit(copy, change, names):
    edit(copy / "config.json", change)
    assert names in refused(copy)


def test_what_is_no_checkpoint(tmp_path):
    assert not is_checkpoint(tmp_path / "nowhere")
    assert "is not a checkpoint" in refused(tmp_path / "nowhere")
    for content in ("", "[]", "{}", '{"format": "other"}', "\x00"):
        (tmp_path / "config.json").write_text(content)
        assert not is_checkpoint(tmp_path)
        assert "is not a checkpoint" in refused(tmp_path)
