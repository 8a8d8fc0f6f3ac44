import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.config import PruneConfig
from intraslice_jax.models.decoder import block_from_arrays, decoder_to_arrays
from intraslice_jax.prune.calibration import MLPCalibration, ResidualStream
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.linalg import solver_precision
from intraslice_jax.prune.mlp import eliminate, select_channels
from intraslice_jax.prune.pipeline import prune_model
from tests.prune import reference
from tests.prune.flavours import make, windows, with_arrays


def prune_first_mlp(model, keep, tokens=None, damping=0.01):
    """(pruned MLP, block with it, reference layer, reference projections, the layer's input)."""
    tokens = windows() if tokens is None else tokens
    stream = ResidualStream.start(model, tokens, 2)
    shape, arrays = model.config.layers[0], decoder_to_arrays(model.decoder.layers[0])
    layer = MLPCalibration.run(0, model.config, shape, arrays, stream, PruneConfig(damping=damping))
    pruned = IntraSlice().prune_mlp(layer, keep)
    arrays = dict(arrays) | {f"mlp.{name}": np.asarray(a) for name, a in pruned.arrays.items()}
    whole = reference.Model(model.config, decoder_to_arrays(model.decoder))
    expected, x = whole.layers[0], whole.embed(tokens)
    projections = expected.prune(x, 0.0, keep, damping, attention=False)
    block = block_from_arrays(model.config, dataclasses.replace(shape, intermediate_size=keep), arrays)
    return pruned, block, expected, projections, x


def run_mlp(block, x, after):
    x, after = jnp.asarray(x, jnp.float32), jnp.asarray(after, jnp.float32)
    return np.asarray(jax.jit(lambda block, x, after: block.mlp(block.mlp_input(x, after)))(block, x, after))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, 12))
def test_the_strongest_channels_are_kept(seed, keep):
    rng = np.random.default_rng(seed)
    z, down = rng.standard_normal((30, 12)) * np.exp(rng.standard_normal(12)), rng.standard_normal((12, 5))
    kept = select_channels(jnp.asarray(z.T @ z), jnp.asarray(down), keep)
    # Alone in the sum, a channel adds this much to the output's energy.
    energy = [np.sum(np.outer(z[:, j], down[j]) ** 2) for j in range(12)]
    assert kept.tolist() == sorted(np.argsort(energy)[12 - keep :])


@pytest.mark.parametrize("flavour", ["gqa", "biases", "phi"])
def test_fusion_equals_projections_in_the_full_size_module(flavour):
    model = make(flavour)
    pruned, block, expected, projections, x = prune_first_mlp(model, 16)
    kept = projections.mlp_channels
    dense_up = np.asarray(decoder_to_arrays(model.decoder)["layers.0.mlp.up_proj"])
    np.testing.assert_array_equal(np.asarray(pruned.arrays["up_proj"]), dense_up[:, kept])
    # Also on tokens the statistics have not seen.
    for rows in (x, x[:, ::-1]):
        after = rows + expected.attention(rows, projections)
        z = expected.inner(rows, after)
        wanted = expected.mlp(z, projections)
        np.testing.assert_allclose(run_mlp(block, rows, after), wanted, atol=2e-5 * np.abs(wanted).max())
    z = expected.inner(x, x + expected.attention(x, projections))
    dense, bias = expected.mlp(z, expected.dense()), expected.w.get("mlp.down_bias", 0)
    error = np.sum((expected.mlp(z, projections) - dense) ** 2) / np.sum((dense - bias) ** 2)
    assert error > 1e-3
    assert pruned.relative_error == pytest.approx(error, rel=1e-3)


def test_compensation_is_better_than_leaving_channels_out():
    _, _, expected, projections, x = prune_first_mlp(make("biases"), 16)
    z = expected.inner(x, x + expected.attention(x, projections))
    dense = expected.mlp(z, expected.dense())
    without = z * np.isin(np.arange(24), projections.mlp_channels)
    left_out = expected.mlp(without, expected.dense()) - dense
    assert np.sum((expected.mlp(z, projections) - dense) ** 2) < 0.8 * np.sum(left_out**2)


@pytest.mark.parametrize("flavour", ["gqa", "phi"])
def test_nothing_removed_is_nothing_changed(flavour):
    model = make(flavour)
    pruned, *_ = prune_first_mlp(model, 24)
    for name, array in pruned.arrays.items():
        dense = np.asarray(decoder_to_arrays(model.decoder)[f"layers.0.mlp.{name}"])
        np.testing.assert_array_equal(np.asarray(array).astype(np.float32), dense)
    assert pruned.relative_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dead", ["up_proj", "gate_proj", "down_proj"])
def test_a_dead_channel_is_the_first_to_go(dead):
    model = make("gqa")
    array = np.asarray(decoder_to_arrays(model.decoder)[f"layers.0.mlp.{dead}"]).copy()
    array[5 if dead == "down_proj" else (slice(None), 5)] = 0
    model = with_arrays(model, **{f"layers__0__mlp__{dead}": array})
    pruned, block, expected, projections, x = prune_first_mlp(model, 23)
    assert projections.mlp_channels == [j for j in range(24) if j != 5]
    np.testing.assert_array_equal(np.asarray(block.mlp.down_proj[...]).shape, (23, 16))
    after = x + expected.attention(x, projections)
    wanted = expected.mlp(expected.inner(x, after), expected.dense())
    np.testing.assert_allclose(run_mlp(block, x, after), wanted, atol=2e-5 * np.abs(wanted).max())
    assert pruned.relative_error == pytest.approx(0, abs=1e-9)


def test_dead_channels_that_stay_do_no_harm():
    model = make("gqa")
    up = np.asarray(decoder_to_arrays(model.decoder)["layers.0.mlp.up_proj"]).copy()
    up[:, 3:] = 0  # 3 channels are alive, 8 are kept
    pruned, *_ = prune_first_mlp(with_arrays(model, layers__0__mlp__up_proj=up), 8)
    assert all(np.isfinite(np.asarray(a)).all() for a in pruned.arrays.values())
    assert pruned.relative_error == pytest.approx(0, abs=1e-9)
    zero = np.zeros_like(up)
    pruned, block, *_, x = prune_first_mlp(with_arrays(model, layers__0__mlp__up_proj=zero), 8)
    assert not run_mlp(block, x, x).any()
    assert pruned.relative_error == 0
    assert pruned.notes["solver"] == "eigh"


def test_without_damping_a_singular_gram_is_solved_all_the_same():
    # 12 tokens and a constant text: rank 1, far fewer than the 16 channels kept.
    model = make("gqa")
    pruned, block, expected, projections, x = prune_first_mlp(model, 16, np.full((1, 12), 7, np.int32), damping=0.0)
    after = x + expected.attention(x, projections)
    wanted = expected.mlp(expected.inner(x, after), expected.dense())
    np.testing.assert_allclose(run_mlp(block, x, after), wanted, atol=1e-3 * np.abs(wanted).max())
    assert pruned.relative_error < 1e-5


def test_a_bfloat16_module_is_solved_in_float64():
    model = make("gqa", dtype=jnp.bfloat16)
    pruned, block, *_ = prune_first_mlp(model, 16)
    assert np.asarray(pruned.arrays["down_proj"]).dtype == np.float64
    assert block.mlp.down_proj[...].dtype == jnp.bfloat16


def test_with_nothing_but_noise_elimination_is_selection_by_energy():
    z, rng = np.random.default_rng(0).standard_normal((40, 12)), np.random.default_rng(1)
    z = z @ rng.standard_normal((12, 12))
    down = jnp.asarray(rng.standard_normal((12, 5)), jnp.float32)
    moments = GramMoments(jnp.asarray(z.T @ z, jnp.float32), jnp.asarray(z.sum(0), jnp.float32))
    with solver_precision():
        found = {noise: eliminate({"down_proj": down}, moments, 40, 5, 0.0, noise).tolist() for noise in (0.0, 1e6)}
    by_energy = select_channels(moments.gram, down, 5).tolist()
    assert found[1e6] == by_energy
    assert found[0.0] != by_energy


@pytest.mark.parametrize("flavour", ["gqa", "phi"])
def test_elimination_chooses_better_than_energy(flavour):
    model, tokens = make(flavour), windows()
    errors = {}
    for selection in ("energy", "obs"):
        config = PruneConfig(0.4, align=2, selection=selection)
        pruned = prune_model(model, tokens, config)
        errors[selection] = pruned.report["layers"][0]["mlp_error"]
    assert errors["obs"] < errors["energy"]
