"""Models whose layers are not on the device: the same bits, in less memory."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from intraslice_jax import api
from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.models.streamed import StreamedDecoder
from intraslice_jax.prune.pipeline import prune_model
from tests.prune.flavours import make, windows
from tests.prune.measure_residency import make as make_large
from tests.prune.measure_residency import measure
from tests.tiny import write_tiny_llama

FINE = PruneConfig(sparsity=0.3, align=1, batch_size=3)


def streamed(model):
    arrays = {name: np.asarray(array) for name, array in decoder_to_arrays(model.decoder).items()}
    return dataclasses.replace(model, decoder=StreamedDecoder(model.config, arrays))


def arrays_of(model):
    decoder = model.decoder
    return decoder.arrays if isinstance(decoder, StreamedDecoder) else decoder_to_arrays(decoder)


def assert_same_bits(found, expected):
    assert found.config == expected.config
    one, two = arrays_of(found), arrays_of(expected)
    assert set(one) == set(two)
    for name in two:
        assert np.asarray(one[name]).tobytes() == np.asarray(two[name]).tobytes(), name


@pytest.mark.parametrize(
    ("flavour", "settings"),
    [
        ("gqa", {"ratios": "fisher_pca"}),
        ("phi", {"ratios": "fisher_components"}),
        ("gqa", {"ratios": "kl"}),
        ("gqa", {"output_biases": True, "method": "flap"}),
        ("mha", {"layout": "uniform"}),
        ("gqa", {"loss_weight": 0.5, "dense_targets": 1.0}),
    ],
)
def test_the_same_bits(flavour, settings):
    config = dataclasses.replace(FINE, **settings)
    model = make(flavour, layers=3)
    assert_same_bits(prune_model(streamed(model), windows(), config), prune_model(model, windows(), config))


def test_ratios_from_a_file(tmp_path):
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"attention": [0.1, 0.5], "mlp": [0.4, 0.2]}))
    config, model = dataclasses.replace(FINE, ratios=str(file)), make("gqa")
    assert_same_bits(prune_model(streamed(model), windows(), config), prune_model(model, windows(), config))


@pytest.mark.parametrize("residency", ["host", "disk"])
def test_what_else_is_done_with_a_model(residency, tmp_path):
    folder = write_tiny_llama(tmp_path / "hf", num_hidden_layers=3)
    here, there = api.load(folder), api.load(folder, residency=residency)
    tokens = np.random.default_rng(0).integers(0, 258, (3, 32), dtype=np.int32)
    assert perplexity(there, tokens).mean_nll == perplexity(here, tokens).mean_nll
    api.save(there, tmp_path / "saved")
    assert_same_bits(api.load(tmp_path / "saved"), here)
    assert_same_bits(api.load(tmp_path / "saved", residency=residency), here)
    files = [api.export(model, tmp_path / name) / "model.safetensors" for model, name in ((here, "a"), (there, "b"))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_next_layer_is_fetched_ahead_in_either_direction():
    model = make("gqa", layers=4)
    asked = []

    class Watched(dict):
        def __getitem__(self, path):
            if path.endswith("q_proj"):
                asked.append(int(path.split(".")[1]))
            return super().__getitem__(path)

    arrays = {name: np.asarray(array) for name, array in decoder_to_arrays(model.decoder).items()}
    decoder = StreamedDecoder(model.config, Watched(arrays))
    assert sum(1 for _ in decoder.layers) == 4
    assert asked == [0, 1, 2, 3]
    asked.clear()
    assert sum(1 for _ in reversed(decoder.layers)) == 4
    assert asked == [3, 2, 1, 0]


def test_a_damaged_layer_is_found_when_it_is_fetched():
    model = make("gqa", layers=3)
    arrays = {name: np.array(array) for name, array in decoder_to_arrays(model.decoder).items()}
    arrays["layers.2.mlp.up_proj"][1, 2] = np.nan
    broken = dataclasses.replace(model, decoder=StreamedDecoder(model.config, arrays))
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj is not finite at \(1, 2\)"):
        prune_model(broken, windows(), FINE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_model_twice_the_budget(tmp_path: Path):
    weights = make_large(tmp_path, layers=12)
    make_large(tmp_path, layers=1)
    budget = weights / 2
    options = ("--preset", "fast", "--method", "magnitude")  # which adds little of its own
    _, program = measure(tmp_path, 1, "disk", *options)
    live, peak = measure(tmp_path, 12, "disk", *options)
    assert live < budget
    assert peak - program < budget
