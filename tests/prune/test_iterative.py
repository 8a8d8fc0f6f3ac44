import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig, uniform_query_to_kv
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Decoder, decoder_to_arrays
from intraslice_jax.prune.calibration import MLPCalibration, ResidualStream
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.iterative import IterativeSettings, learn_mixtures
from intraslice_jax.prune.linalg import solver_precision, to_solver
from intraslice_jax.prune.mixtures import better_mlp
from intraslice_jax.prune.mlp import fuse_mlp, select_channels
from intraslice_jax.prune.pipeline import prune_model

HIDDEN, INNER, KEEP = 16, 32, 16
STRONG = IterativeSettings(mixed_share=1.0, blocks=1, epochs=40, learning_rate=0.02)


def mergeable_mlp(rng):
    """Pairs of channels with the same gate and the same output: one mixture of each pair does the work of both."""
    gate = np.repeat(rng.standard_normal((HIDDEN, INNER // 2)), 2, 1)
    down = np.repeat(rng.standard_normal((INNER // 2, HIDDEN)), 2, 0)
    arrays = {"gate_proj": gate, "up_proj": rng.standard_normal((HIDDEN, INNER)), "down_proj": down}
    return {name: jnp.asarray(0.3 * array, jnp.float32) for name, array in arrays.items()}


def output(arrays, x):
    z = jax.nn.silu(x @ arrays["gate_proj"]) * (x @ arrays["up_proj"])
    return np.asarray(z @ arrays["down_proj"])


def model(layers=6, gated=True, bias=False):
    shape = LayerShape(uniform_query_to_kv(4, 2), 4, 4, 4, INNER)
    config = ModelConfig(
        "llama", 50, HIDDEN, 4, 4, (shape,) * layers, gated_mlp=gated, mlp_bias=bias, attention_output_bias=bias
    )
    return LanguageModel(config, Decoder(config), None, "tiny")


def windows(samples=8, seq=32):
    return np.random.default_rng(0).integers(0, 50, (samples, seq)).astype(np.int32)


def calibrated(dense, tokens):
    stream = ResidualStream.start(dense, tokens, 2)
    block, shape = dense.decoder.layers[0], dense.config.layers[0]
    return MLPCalibration.run(0, dense.config, shape, decoder_to_arrays(block), stream, PruneConfig())


def selected(layer, damping):
    with solver_precision():
        kept = select_channels(to_solver(layer.moments.gram), to_solver(layer.arrays["down_proj"]), KEEP)
        return fuse_mlp(layer.arrays, layer.moments, layer.tokens, kept, damping)


def with_mlp(dense, arrays):
    for name, array in arrays.items():
        getattr(dense.decoder.layers[0].mlp, name)[...] = array
    return dense


def test_mixtures_merge_what_selection_must_drop():
    rng = np.random.default_rng(0)
    arrays = mergeable_mlp(rng)
    layer = calibrated(with_mlp(model(1), arrays), windows(16))
    plain = selected(layer, 1e-4)
    better = better_mlp(layer, plain, KEEP, STRONG)
    note = better.notes["iterative"]
    assert note["accepted"]
    assert note["held_out_errors"]["mixtures"] < 0.5 * note["held_out_errors"]["selection"]
    # What the small module really computes, on all calibration text.
    x = jnp.concatenate(list(layer.inputs())).reshape(-1, HIDDEN)
    target = output(arrays, x)
    for pruned in (plain, better):
        small = {name: jnp.asarray(np.asarray(a), jnp.float32) for name, a in pruned.arrays.items()}
        assert small["up_proj"].shape == (HIDDEN, KEEP)
        error = np.square(output(small, x) - target).sum() / np.square(target).sum()
        np.testing.assert_allclose(error, pruned.relative_error, rtol=2e-3)
    assert better.relative_error < 0.5 * plain.relative_error


def test_best_channels_stay_and_losses_fall_in_every_block():
    rng = np.random.default_rng(1)
    arrays = mergeable_mlp(rng)
    order, x = rng.permutation(INNER), jnp.asarray(rng.standard_normal((6, 20, HIDDEN)), jnp.float32)
    settings = IterativeSettings(mixed_share=0.5, blocks=2, epochs=10, learning_rate=3e-3)
    learned = learn_mixtures(arrays, "silu", order, KEEP, x, settings, 0.01)
    fixed = np.sort(order[: KEEP // 2])
    for name in ("gate_proj", "up_proj"):
        np.testing.assert_array_equal(learned.arrays[name][:, : KEEP // 2], arrays[name][:, fixed])
    assert [len(curve) for curve in learned.losses] == [10, 10]
    assert all(curve[-1] < curve[0] for curve in learned.losses)
    again = learn_mixtures(arrays, "silu", order, KEEP, x, settings, 0.01)
    assert again.losses == learned.losses


def test_selection_stays_where_mixtures_are_not_better():
    layer = calibrated(model(1), windows())
    plain = selected(layer, 0.01)
    kept = better_mlp(layer, plain, KEEP, IterativeSettings(epochs=1, learning_rate=3.0))  # diverges
    assert not kept.notes["iterative"]["accepted"]
    assert kept.arrays is plain.arrays


def test_one_window_cannot_be_split():
    layer = calibrated(model(1), windows(1))
    plain = selected(layer, 0.01)
    kept = better_mlp(layer, plain, KEEP, IterativeSettings())
    assert "split" in kept.notes["iterative"]["reason"]


def test_only_inner_layers_try_mixtures():
    records = []
    config = PruneConfig(sparsity=0.5, iterative="always", align=4)
    pruned = prune_model(model(gated=False, bias=True), windows(), config, records.append)
    tried = ["iterative" in record.notes["mlp"] for record in records]
    assert tried == [False, False, True, True, False, False]
    assert np.isfinite(np.asarray(pruned.decoder(jnp.asarray(windows(1))))).all()


@pytest.mark.parametrize(("mode", "keep", "wanted"), [("never", 4, False), ("auto", 12, True), ("auto", 13, False)])
def test_auto_means_few_channels(mode, keep, wanted):
    dense = model()
    stream = ResidualStream.start(dense, windows(2), 2)
    block, shape = dense.decoder.layers[2], dense.config.layers[2]
    settings = PruneConfig(iterative=mode)
    layer = MLPCalibration.run(2, dense.config, shape, decoder_to_arrays(block), stream, settings)
    assert ("iterative" in IntraSlice().prune_mlp(layer, keep).notes) == wanted
