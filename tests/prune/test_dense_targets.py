"""Modules corrected towards the dense model's stream, against float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.calibrate.gradients import token_gradients
from intraslice_jax.calibrate.token_weights import token_weights
from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune.pipeline import prune_model
from tests.prune import reference
from tests.prune.flavours import make, windows

FINE = PruneConfig(sparsity=0.3, align=1, dense_targets=1.0)
COUNT = 17  # two of them held out


def run(model, tokens):
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.decoder(jnp.asarray(tokens)))


def strengths(pruned):
    notes = [record["notes"] for record in pruned.report["layers"]]
    return [note[module]["dense_targets"] for note in notes for module in ("attention", "mlp")]


@pytest.mark.parametrize(
    ("flavour", "changes"),
    [
        ("gqa", {}),
        ("ragged", {"dense_targets": 0.3}),
        ("biases", {}),
        ("phi", {}),
        ("biases", {"loss_weight": 0.8}),
    ],
)
def test_the_pruned_model_has_the_corrections_of_the_method(flavour, changes):
    model, tokens, config = make(flavour), windows(COUNT), dataclasses.replace(FINE, **changes)
    pruned = prune_model(model, tokens, config)
    weights = token_weights(token_gradients(model, tokens), config.loss_weight)
    widths = [shape.intermediate_size for shape in pruned.config.layers]
    expected, plain = (reference.Model(model.config, decoder_to_arrays(model.decoder)) for _ in range(2))
    expected.prune(tokens, 0.3, widths, config.damping, weights, most=config.dense_targets)
    plain.prune(tokens, 0.3, widths, config.damping, weights)
    wanted = [strength for projections in expected.projections for strength in projections.strengths]
    # Before the first attention both streams are the embedding: there is no drift but rounding.
    np.testing.assert_allclose(strengths(pruned)[1:], wanted[1:], atol=1e-3)
    assert max(wanted[1:]) > 0.05
    unseen = windows(3, 40, seed=9)
    logits, without = expected.logits(unseen), plain.logits(unseen)
    np.testing.assert_allclose(run(pruned, unseen), logits, atol=1e-4 * np.abs(logits).max())
    assert np.abs(without - logits).max() > 0.01 * np.abs(logits).max()


def test_the_largest_strength_is_kept():
    found = strengths(prune_model(make("gqa"), windows(COUNT), dataclasses.replace(FINE, dense_targets=0.3)))
    assert max(found) == pytest.approx(0.3)
    assert min(found) >= 0


def test_the_stream_is_nearer_to_that_of_the_dense_model():
    model, tokens, unseen = make("gqa", layers=4), windows(64), windows(16, seed=9)
    missed = {}
    for most in (0.0, 1.0):
        pruned = prune_model(model, tokens, dataclasses.replace(FINE, dense_targets=most))
        states = [m.decoder.hidden_states(jnp.asarray(unseen)) for m in (model, pruned)]
        missed[most] = float(jnp.square(states[0] - states[1]).mean())
    assert missed[1.0] < missed[0.0]


@pytest.mark.parametrize("flavour", ["phi"])
def test_without_room_for_activations_the_corrections_are_the_same(flavour):
    model, tokens = make(flavour), windows(COUNT)
    kept, again = (
        run(prune_model(model, tokens, dataclasses.replace(FINE, memory_budget=budget)), windows(3, 40, seed=9))
        for budget in (2**30, 1)
    )
    np.testing.assert_allclose(kept, again, atol=1e-4 * np.abs(again).max())


def test_nothing_to_correct_where_nothing_is_removed():
    model, tokens = make("gqa"), windows()
    same = prune_model(model, tokens, dataclasses.replace(FINE, sparsity=0.0))
    np.testing.assert_allclose(run(same, tokens), run(model, tokens), atol=1e-4)


def test_one_window_cannot_be_split():
    with pytest.raises(InputError, match=r"dense_targets .* at least 2; raise `samples`"):
        prune_model(make("gqa"), windows(1), FINE)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range(strength):
    with pytest.raises(InputError, match="dense_targets"):
        PruneConfig(dense_targets=strength)
