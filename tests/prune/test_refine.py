import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import decoder_to_arrays, run_block
from intraslice_jax.prune import pipeline
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.refine import RefineSettings, refine_block, with_weights
from tests.prune.flavours import make, windows

PLAIN = PruneConfig(0.4, align=2, iterative="never")


def distance(block, x, target, rope):
    """The loss by its definition, in float64."""
    out, target = (np.asarray(a, np.float64) for a in (run_block(block, x, rope), target))
    return np.mean(np.square(out - target).sum(-1) / np.square(target).sum(-1))


def first_layer(flavour, samples=8):
    """A pruned first layer, what it reads, and what the dense one makes of it."""
    model, tokens = make(flavour), windows(samples)
    pruned = prune_model(model, tokens, PLAIN)
    x, rope = model.decoder.embed(jnp.asarray(tokens)), model.decoder.rope_for(tokens.shape[1])
    return pruned.decoder.layers[0], x, run_block(model.decoder.layers[0], x, rope), rope


@pytest.mark.parametrize("flavour", ["gqa", "phi"])
def test_a_layer_comes_nearer_on_windows_it_was_not_learned_on(flavour):
    block, x, target, rope = first_layer(flavour, 32)
    settings = RefineSettings(epochs=3, learning_rate=0.005)
    refined = refine_block(block, [x[:20], x[20:]], [target[:20], target[20:]], [20, 12], rope, settings)
    held, errors = slice(28, 32), refined.notes["held_out_errors"]
    better = with_weights(block, refined.arrays)
    assert errors["before"] == pytest.approx(distance(block, x[held], target[held], rope), rel=1e-4)
    assert errors["after"] == pytest.approx(distance(better, x[held], target[held], rope), rel=1e-4)
    assert refined.notes["accepted"]
    assert errors["after"] < 0.97 * errors["before"]
    assert len(refined.notes["losses"]) == 3
    before = decoder_to_arrays(block)
    for name, array in refined.arrays.items():
        assert array.shape == before[name].shape
        assert bool((array == before[name]).all()) != name.endswith("_proj"), name


def test_copies_that_fill_up_a_batch_are_not_learned_from():
    block, x, target, rope = first_layer("gqa")
    settings = RefineSettings(epochs=1)
    junk = jnp.concatenate([x[4:], 100 * x[:4]]), jnp.concatenate([target[4:], -target[:4]])
    padded = refine_block(block, [x[:4], junk[0]], [target[:4], junk[1]], [4, 4], rope, settings)
    whole = refine_block(block, [x], [target], [8], rope, settings)
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(padded.arrays[name], array)


def test_what_does_not_help_is_refused():
    block, x, target, rope = first_layer("gqa")
    refined = refine_block(block, [x], [target], [8], rope, RefineSettings(epochs=1, learning_rate=30.0))
    assert not refined.notes["accepted"]
    for name, array in decoder_to_arrays(block).items():
        np.testing.assert_array_equal(refined.arrays[name], array)


def test_one_window_cannot_be_split():
    block, x, target, rope = first_layer("gqa", 1)
    refined = refine_block(block, [x], [target], [1], rope, RefineSettings())
    assert refined.notes == {"accepted": False, "reason": "one window cannot be split"}


def test_a_pruned_model_follows_the_dense_stream(monkeypatch):
    """Every layer is told what the dense model has behind the same layer, drift of the layers before it included."""
    model, tokens, seen = make("gqa", layers=3), windows(32), []
    real = pipeline.refine_block

    def spy(block, inputs, targets, *rest):
        seen.append((jnp.concatenate(list(inputs)), jnp.concatenate(list(targets))))
        return real(block, inputs, targets, *rest)

    monkeypatch.setattr(pipeline, "refine_block", spy)
    pruned = prune_model(model, tokens, dataclasses.replace(PLAIN, refine=2))
    dense_x = pruned_x = model.decoder.embed(jnp.asarray(tokens))
    rope = model.decoder.rope_for(tokens.shape[1])
    for i, (inputs, targets) in enumerate(seen):
        dense_x = run_block(model.decoder.layers[i], dense_x, rope)
        np.testing.assert_allclose(targets, dense_x, atol=1e-5)
        np.testing.assert_allclose(inputs, pruned_x, atol=1e-5)
        pruned_x = run_block(pruned.decoder.layers[i], pruned_x, rope)
        assert set(pruned.report["layers"][i]["notes"]["refine"]) == {"accepted", "held_out_errors", "losses"}
    plain = prune_model(model, tokens, PLAIN)
    assert plain.config == pruned.config

    def drift(other):
        return float(jnp.square(other.decoder.hidden_states(jnp.asarray(tokens)) - model.decoder.norm(dense_x)).mean())

    assert drift(pruned) < drift(plain)


def test_the_same_run_gives_the_same_bits():
    model, tokens = make("gqa"), windows(6)
    config = dataclasses.replace(PLAIN, refine=1)
    first, second = (decoder_to_arrays(prune_model(model, tokens, config).decoder) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)


def test_a_negative_number_of_passes():
    with pytest.raises(InputError, match="refine must be 0"):
        PruneConfig(refine=-1)
