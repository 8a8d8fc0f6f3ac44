import dataclasses
import json
import resource
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from intraslice_jax.config import RopeConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io.checkpoint import is_checkpoint, open_checkpoint, restore, save
from intraslice_jax.io.digests import write_digests
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.parallel.mesh import make_mesh
from tests.prune.flavours import GQA, make
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
        (lambda config: config["model"]["rope"].pop("parameters"), "their model differs"),
        (lambda config: config["model"]["layers"].pop(), "1 layers, state/ holds 2"),
        (lambda config: config["model"]["layers"][0].update(intermediate_size=23), "layers.0.mlp"),
        (lambda config: config["model"]["layers"][0].update(query_to_kv=[0, 2]), "query_to_kv"),
    ],
)
def test_a_description_that_does_not_fit(copy, change, names):
    edit(copy / "config.json", change)
    assert names in refused(copy)


def test_the_arrays_of_another_model_of_the_same_shape(copy, tmp_path):
    other = make("ragged", rope=RopeConfig(theta=5e5), source='{"a": 1}')
    save(other, tmp_path / "other")
    for name in ("state", "SHA256SUMS"):
        (shutil.rmtree if name == "state" else Path.unlink)(copy / name)
        (tmp_path / "other" / name).rename(copy / name)
    assert "were written for different models: their model differs" in refused(copy)


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["0" * 64 + "  ../../etc/passwd"], "has a line that is not a digest and the name of a file in this folder"),
        (["0" * 64 + "  /etc/passwd"], "has a line that is not"),
        (["hello"], "has a line that is not"),
        (["0" * 64 + "  state/" + "x" * 300], "cannot be read: File name too long"),
        (["0" * 64 + "  state"], "state is missing"),
        ([], "SHA256SUMS is empty"),
    ],
)
def test_digests_that_lie(copy, lines, names):
    (copy / "SHA256SUMS").write_text("\n".join(lines))
    if not lines:
        shutil.rmtree(copy / "state")
    assert names in refused(copy)


def test_damage_with_digests_that_fit_it(copy, model, capfd):
    """Orbax fails in many ways; all of them are one line. Some of its files are of no use for reading."""
    failures = []
    for file in array_files(copy):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        write_digests(copy, "state")
        for read in (restore, lambda path: open_checkpoint(path).in_memory()):
            try:
                assert_same_arrays(read(copy), model)
            except InputError as error:
                failures.append(str(error))
        file.write_bytes(data)
    assert len(failures) >= 6
    assert all("is damaged" in failure and "\n" not in failure for failure in failures)
    assert capfd.readouterr().err == ""
    shutil.rmtree(copy / "state" / "state")
    write_digests(copy, "state")
    refused(copy)


def test_arrays_of_size_zero(tmp_path):
    """Layers without rotation, as SmolLM3 has them, have none of the RoPE pairs."""
    model = make("gqa", layers=2, shape=dataclasses.replace(GQA, rotary_dim=0))
    save(model, tmp_path / "whole")
    save(open_checkpoint(tmp_path / "whole"), tmp_path / "streamed")
    mesh = make_mesh("data=1,model=1")
    for back in (restore(tmp_path / "whole"), restore(tmp_path / "streamed"), restore(tmp_path / "whole", mesh)):
        assert back.decoder.layers[0].attention.rope_pairs.shape == (2, 0)
        assert_same_arrays(back, model)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_full_disk_is_one_line_and_leaves_nothing(model, tmp_path, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (save, lambda model, out: save(open_checkpoint(tmp_path / "whole"), out)):
        save(model, tmp_path / "whole", overwrite=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(RunError, match=r"out cannot be written: ") as caught:
                write(model, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert capfd.readouterr().err == ""


def test_what_is_no_checkpoint(tmp_path):
    assert not is_checkpoint(tmp_path / "nowhere")
    assert "is not a checkpoint" in refused(tmp_path / "nowhere")
    for content in ("", "[]", "{}", '{"format": "other"}', "\x00", "[" * 10**5, '{"a":' * 10**5):
        (tmp_path / "config.json").write_text(content)
        assert not is_checkpoint(tmp_path)
        assert "is not a checkpoint" in refused(tmp_path)
