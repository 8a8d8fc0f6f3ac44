"""The ten lines of Python that the README shows."""

import subprocess
import sys

import numpy as np
import pytest

import intraslice_jax as isl
from intraslice_jax.errors import InputError
from tests.conftest import ROOT
from tests.tiny import tiny_text, write_tiny_llama

TEXT = tiny_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return isl.load(write_tiny_llama(tmp_path_factory.mktemp("api") / "model"))


@pytest.fixture(scope="module")
def layers():
    """What `on_layer` was told."""
    return []


@pytest.fixture(scope="module")
def pruned(model, layers):
    return isl.prune(
        model, TEXT, sparsity=0.25, samples=4, sequence_length=64, align=2, preset="fast", on_layer=layers.append
    )


def test_importing_the_package_is_cheap():
    code = "import sys, intraslice_jax as isl; assert 'prune' in dir(isl); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(loaded.stdout.split()) & {"jax", "flax", "numpy", "transformers", "yaml"}


def test_a_missing_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        isl.prnue  # noqa: B018


def test_pruning_leaves_the_model_as_it_was(model, pruned):
    assert model.report == {}
    assert pruned.config.block_parameters() < model.config.block_parameters()
    assert model.decoder.layers[0].mlp.up_proj.shape == (32, 64)
    assert pruned.report["calibration"]["samples"] == 4


def test_the_same_seed_gives_the_same_weights(model, pruned):
    again = isl.prune(model, TEXT, sparsity=0.25, samples=4, sequence_length=64, align=2, preset="fast")
    for a, b in zip(pruned.decoder.layers, again.decoder.layers, strict=True):
        np.testing.assert_array_equal(a.mlp.down_proj[...], b.mlp.down_proj[...])
        np.testing.assert_array_equal(a.attention.o_proj[...], b.attention.o_proj[...])


def test_save_and_restore_keep_the_perplexity(pruned, tmp_path):
    isl.save(pruned, tmp_path / "checkpoint")
    restored = isl.restore(tmp_path / "checkpoint")
    assert restored.report == isl.load(tmp_path / "checkpoint").report
    values = [isl.perplexity(m, TEXT, 64, windows=4) for m in (pruned, restored)]
    assert values[0] == values[1]


def test_a_checkpoint_is_cast_when_asked(pruned, tmp_path):
    isl.save(pruned, tmp_path / "checkpoint")
    half = isl.load(tmp_path / "checkpoint", dtype="bfloat16")
    assert half.decoder.layers[0].attention.q_proj[...].dtype == "bfloat16"
    assert half.decoder.layers[0].attention.rope_pairs[...].dtype == "int32"
    with pytest.raises(InputError, match="float8"):
        isl.load(tmp_path / "checkpoint", dtype="float8")


def test_export_is_loaded_again(pruned, tmp_path):
    isl.export(pruned, tmp_path / "hf")
    again = isl.load(tmp_path / "hf")
    assert again.config.layers == pruned.config.layers
    assert isl.perplexity(again, TEXT, 64, windows=4) == pytest.approx(
        isl.perplexity(pruned, TEXT, 64, windows=4), rel=1e-6
    )


def test_generate_continues_a_prompt(pruned):
    parts = []
    first = isl.generate(pruned, "the river", 8, on_token=parts.append)
    assert first == isl.generate(pruned, "the river", 8)
    assert isinstance(first, str)
    assert "".join(parts) == first


def test_progress_is_told(pruned, layers):
    assert [record.layer for record in layers] == [0, 1]
    assert layers[1].intermediate_size == pruned.config.layers[1].intermediate_size
    seen = []
    isl.perplexity(pruned, TEXT, 64, windows=4, batch_size=2, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (4, 4)]


def test_an_unknown_setting_is_named(model):
    with pytest.raises(InputError, match="did you mean 'damping'"):
        isl.prune(model, TEXT, sequence_length=64, dampening=0.1)


def test_a_file_of_ratios_must_not_contradict_the_sparsity(model, tmp_path):
    path = tmp_path / "ratios.json"
    path.write_text('{"attention": [0.25, 0.25], "mlp": [0.25, 0.25]}')
    settings = {"preset": "fast", "samples": 2, "sequence_length": 32, "align": 2, "ratios": str(path)}
    assert isl.prune(model, TEXT, **settings).report["sparsity"] == pytest.approx(0.25)
    with pytest.raises(InputError, match=r"`sparsity` asks for 30\.0%"):
        isl.prune(model, TEXT, 0.3, **settings)


def test_windows_are_as_long_as_a_short_context(model):
    context = model.config.max_position_embeddings
    assert isl.perplexity(model, TEXT) == isl.perplexity(model, TEXT, context)


def test_baselines_are_measured_without_what_goes_beyond_the_paper(model):
    flap = isl.prune(model, TEXT, 0.3, method="flap", samples=4, sequence_length=32)
    assert "refinement" not in flap.report
    assert len(set(flap.report["ratios"]["mlp"])) == 1


def test_a_window_longer_than_the_context_is_refused(model):
    with pytest.raises(InputError, match="context"):
        isl.perplexity(model, TEXT, 2048)
    with pytest.raises(InputError, match="context"):
        isl.prune(model, TEXT)
