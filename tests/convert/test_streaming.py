"""File to file, a model passes through memory tensor by tensor."""

import sys
from contextlib import closing

import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax import api
from intraslice_jax.config import PruneConfig
from intraslice_jax.convert import load, open_stored
from intraslice_jax.errors import InputError
from intraslice_jax.io.journal import Journal
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune.pipeline import prune_model
from tests.convert.checkpoints import build, save, tokens
from tests.convert.measure_streaming import COMMANDS, make_checkpoint, peak
from tests.tiny import tiny_config, tiny_weights, write_tiny_llama

MB = 10**6


def files(folder):
    """Contents of the weight files by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("case", ["llama-mha-tied", "phi3-longrope", "phi"])
def test_the_way_there_and_back_keeps_every_byte(case, tmp_path):
    source = save(build(case), tmp_path / "hf")
    api.save(api.open_stored(source), tmp_path / "orbax")
    restored, loaded = api.restore(tmp_path / "orbax"), load(source)
    assert (restored.config, restored.generation_config) == (loaded.config, loaded.generation_config)
    for name, array in decoder_to_arrays(loaded.decoder).items():
        np.testing.assert_array_equal(decoder_to_arrays(restored.decoder)[name], array, name)
    stored = api.open_stored(tmp_path / "orbax")
    streamed, in_memory = api.export(stored, tmp_path / "a"), api.export(loaded, tmp_path / "b")
    assert files(streamed) == files(in_memory)
    assert (streamed / "config.json").read_bytes() == (in_memory / "config.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "orbax").iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "report.json",
        "state",
    ]


def test_pruned_models_stream_too(tmp_path):
    pruned = prune_model(load(save(build("llama"), tmp_path / "hf")), tokens(16), PruneConfig(0.3, align=2))
    api.save(pruned, tmp_path / "orbax")
    streamed = api.export(api.open_stored(tmp_path / "orbax"), tmp_path / "a")
    assert files(streamed) == files(api.export(pruned, tmp_path / "b"))
    api.save(open_stored(streamed), tmp_path / "again")
    assert api.restore(tmp_path / "again").config == pruned.config


@pytest.mark.parametrize("residency", ["device", "disk"])
def test_layers_without_rotation_go_through_a_journal(tmp_path, residency):
    """Their RoPE pairs are arrays of size zero."""
    source, config = save(build("smollm3"), tmp_path / "hf"), PruneConfig(0.3, align=2)
    with closing(Journal(tmp_path / "journal")) as journal:
        journal.begin({})
        pruned = prune_model(api.load(source, residency=residency), tokens(16), config, run_log=journal)
        api.save(pruned, tmp_path / "out")
    expected = prune_model(load(source), tokens(16), config)
    found, wanted = (decoder_to_arrays(model.decoder) for model in (api.restore(tmp_path / "out"), expected))
    assert found.keys() == wanted.keys()
    assert found["layers.1.attention.rope_pairs"].size == 0
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name)


def test_another_dtype_on_the_way(tmp_path):
    source = write_tiny_llama(tmp_path / "hf")
    api.save(api.open_stored(source, "bfloat16"), tmp_path / "orbax")
    restored = api.restore(tmp_path / "orbax")
    assert restored.decoder.embed_tokens.dtype == jnp.bfloat16
    half = api.open_stored(tmp_path / "orbax", "float16")
    assert half.dtype == "float16"
    name = "layers.1.mlp.down_proj"
    assert half.arrays[name].dtype == np.float16
    np.testing.assert_array_equal(half.arrays[name], decoder_to_arrays(restored.decoder)[name].astype(jnp.float16))


def test_a_damaged_number_leaves_nothing(tmp_path):
    weights = tiny_weights(tiny_config())
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    stored = api.open_stored(write_tiny_llama(tmp_path / "hf", weights=weights))
    for write in (api.save, api.export):
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan at index \[3, 4\]"):
            write(stored, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_follows_the_largest_tensor(tmp_path):
    largest = make_checkpoint(tmp_path / "hf", layers=6)
    assert sum(map(len, files(tmp_path / "hf").values())) > 700 * MB
    for name, arguments in COMMANDS.items():
        assert peak(tmp_path, arguments) < 1.3 * largest + 500 * MB, name
