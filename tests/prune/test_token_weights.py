"""Tokens that count by the loss gradient at them, against float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.calibrate import gradients
from intraslice_jax.calibrate.gradients import token_gradients
from intraslice_jax.calibrate.token_weights import CLIP, token_weights
from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune.pipeline import prune_model
from tests.prune import reference
from tests.prune.flavours import make, windows, with_arrays

FINE = PruneConfig(sparsity=0.3, align=1)


def losses(logits, tokens):
    """Mean token loss of every window."""
    logits = logits[:, :-1] - logits.max()
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_softmax, tokens[:, 1:, None], -1)[..., 0].mean(1)


@pytest.mark.parametrize("flavour", ["ragged", "phi", "window"])
def test_gradients_agree_with_finite_differences(flavour):
    model, tokens = make(flavour), windows(3, 12)
    told = []
    found = token_gradients(model, tokens, batch_size=2, on_batch=lambda *progress: told.append(progress))
    assert found.shape == (2, 3, 12)
    assert told == [(0, 3), (2, 3), (3, 3)]
    whole = reference.Model(model.config, decoder_to_arrays(model.decoder))
    x = whole.embed(tokens)
    for i, layer in enumerate(whole.layers):
        x = layer.run(x, layer.dense())
        for t in (0, 5, 10):
            slopes = []
            for channel in range(x.shape[2]):
                step = np.zeros_like(x)
                step[:, t, channel] = 1e-4
                up, down = (losses(whole.logits_behind(i, x + sign * step), tokens) for sign in (1, -1))
                slopes.append((up - down) / 2e-4)
            expected = np.square(slopes).sum(0)
            np.testing.assert_allclose(found[i, :, t], expected, rtol=1e-3)
    assert not found[:, :, -1].any()  # nothing follows the last token


def test_a_gradient_that_is_no_number_names_the_layer():
    model = make("gqa")
    up = np.asarray(decoder_to_arrays(model.decoder)["layers.1.mlp.up_proj"]) * np.float32(np.inf)
    with pytest.raises(RunError, match="layer 1"):
        token_gradients(with_arrays(model, layers__1__mlp__up_proj=up), windows(2, 8))


def test_weights_blend_and_are_clipped():
    g = np.random.default_rng(0).exponential(size=(2, 4, 50))
    g[1, 2, 3] = 1e4
    for strength in (0.0, 0.3, 1.0):
        found = token_weights(g, strength)
        np.testing.assert_allclose(found.mean((1, 2)), 1, rtol=1e-6)
        assert found.min() >= 1 - strength
    plain = token_weights(g[:1], 0.3)[0]
    np.testing.assert_allclose(plain, 0.7 + 0.3 * g[0] / g[0].mean(), rtol=1e-6)
    clipped = np.minimum(g[1], CLIP * g[1].mean())
    assert clipped.max() < g[1].max()
    np.testing.assert_allclose(token_weights(g, 1.0)[1], clipped / clipped.mean(), rtol=1e-6)
    np.testing.assert_array_equal(token_weights(np.zeros((1, 2, 3)), 1.0), 1)


@pytest.mark.parametrize("flavour", ["ragged", "biases", "phi", "partial"])
def test_the_pruned_model_is_that_of_weighted_least_squares(flavour):
    model, tokens, config = make(flavour), windows(), dataclasses.replace(FINE, loss_weight=0.8)
    pruned = prune_model(model, tokens, config)
    weights = token_weights(token_gradients(model, tokens), 0.8)
    expected, plain = (reference.Model(model.config, decoder_to_arrays(model.decoder)) for _ in range(2))
    widths = [shape.intermediate_size for shape in pruned.config.layers]
    expected.prune(tokens, 0.3, widths, config.damping, weights)
    plain.prune(tokens, 0.3, widths, config.damping)
    for record, projections in zip(pruned.report["layers"], expected.projections, strict=True):
        assert list(record["kept_heads"]) == projections.heads
    unseen = windows(3, 40, seed=9)
    wanted, unweighted = expected.logits(unseen), plain.logits(unseen)
    with jax.default_matmul_precision("highest"):
        found = np.asarray(pruned.decoder(jnp.asarray(unseen)))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(unweighted - wanted).max() > 0.01 * np.abs(wanted).max()


def test_without_room_for_activations_the_weights_are_the_same():
    model, tokens = make("gqa"), windows()
    both = [
        prune_model(model, tokens, dataclasses.replace(FINE, loss_weight=1.0, memory_budget=budget, batch_size=2))
        for budget in (2**30, 1)
    ]
    one, two = (decoder_to_arrays(pruned.decoder) for pruned in both)
    for name, array in one.items():
        np.testing.assert_allclose(np.asarray(two[name]), np.asarray(array), atol=1e-4 * np.abs(array).max())


def test_a_baseline_takes_no_gradients(monkeypatch):
    monkeypatch.setattr(gradients, "_backward", lambda *_: pytest.fail("a backward pass"))
    prune_model(make("gqa"), windows(), dataclasses.replace(FINE, method="wanda_sp", loss_weight=1.0))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range(strength):
    with pytest.raises(InputError, match="loss_weight"):
        PruneConfig(loss_weight=strength)
