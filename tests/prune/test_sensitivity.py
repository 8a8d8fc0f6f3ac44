import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.config import LayerShape, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from intraslice_jax.prune.allocation import allocate_by_costs, modules, power_laws
from intraslice_jax.prune.estimators import estimate_ratios
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.sensitivity import divergences
from tests.prune.flavours import make, windows, with_arrays

ALONE = PruneConfig(0.4, align=2, ratios="kl", iterative="never")


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("flavour", ["gqa", "phi"])
def test_divergence_is_that_of_the_model_with_one_module_pruned(flavour):
    model, tokens = make(flavour), windows(8)
    found = [costs[:, 1] for costs in divergences(model, tokens, ALONE, (0.2, ALONE.sparsity))]
    whole = prune_model(model, tokens[:7], dataclasses.replace(ALONE, ratios="uniform"))
    layer = 0  # its attention is the only module that sees the same text in a whole run
    arrays = decoder_to_arrays(model.decoder) | {
        name: array
        for name, array in decoder_to_arrays(whole.decoder).items()
        if name.startswith(f"layers.{layer}.attention")
    }
    shape = dataclasses.replace(whole.config.layers[0], intermediate_size=model.config.layers[0].intermediate_size)
    config = model.config.with_layers((shape, *model.config.layers[1:]))
    decoder = decoder_from_arrays(config, arrays)
    expected = []
    for judging in (tokens, tokens[7:]):  # their first 64 tokens, which are all, and those of the one held out
        dense, pruned = (log_softmax(judged(jnp.asarray(judging))) for judged in (model.decoder, decoder))
        expected.append((np.exp(dense) * (dense - pruned)).sum(-1).mean())
    assert found[0][layer] == pytest.approx(np.mean(expected), rel=1e-3)
    assert (np.concatenate(found) > 0).all()


def test_a_layer_that_does_nothing_costs_nothing_and_goes_first():
    model = make("gqa", layers=3)
    nothing = np.zeros_like(np.asarray(decoder_to_arrays(model.decoder)["layers.1.mlp.down_proj"]))
    model = with_arrays(model, layers__1__mlp__down_proj=nothing)
    done = []
    attention, mlp = divergences(model, windows(6), ALONE, (0.3, 0.6), lambda *progress: done.append(progress))
    np.testing.assert_allclose(mlp[1], 1e-7)
    assert min(attention.min(), mlp[[0, 2]].min()) > 1e-4
    assert done == [(i, 12) for i in range(13)]
    ratios = estimate_ratios(model, windows(6), ALONE)
    assert ratios.mlp[1] == pytest.approx(20 / 24)  # 0.9 of 24 channels, in steps of 2
    assert ratios.sparsity(model.config) == pytest.approx(0.4, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_point_gives_the_minimum_of_a_sum_of_squares(data):
    layers = data.draw(st.integers(1, 5))
    model = make("gqa", layers=layers).config
    draw = st.lists(st.floats(1e-6, 10), min_size=layers, max_size=layers).map(np.asarray)
    costs = data.draw(draw), data.draw(draw)
    prune = PruneConfig(data.draw(st.floats(0.05, 0.6)), align=2)
    ratios = allocate_by_costs(model, (0.3,), tuple(cost[:, None] for cost in costs), prune)
    assert ratios.sparsity(model) == pytest.approx(prune.sparsity, rel=1e-6)
    kinds = modules(model, prune)
    sizes, caps = (np.concatenate([getattr(kind, name) for kind in kinds]) for name in ("parameters", "caps"))
    found, cost = np.concatenate([ratios.attention, ratios.mlp]), np.concatenate(costs)
    assert (found <= caps + 1e-9).all()
    # The minimum by bisection on the price of a parameter.
    low, high = 0.0, 1e6
    for _ in range(200):
        price = (low + high) / 2
        best = np.minimum(price * sizes / cost, caps)
        low, high = (price, high) if best @ sizes < found @ sizes else (low, price)
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-9)


def test_a_module_that_is_cheap_at_first_and_dear_later_stops_where_it_gets_dear():
    model = make("gqa", layers=2).config
    points, prune = (0.2, 0.75), PruneConfig(0.3, align=2)
    usual = [1.0, (0.75 / 0.2) ** 2]
    steep = [0.05, 0.05 * (0.75 / 0.2) ** 5]
    scale, exponent = power_laws(points, np.asarray([usual, steep, [1.0, 1.1], [1.0, 1e9]]))
    np.testing.assert_allclose(exponent, [2, 5, 1.4, 6])  # the last two at their bounds
    np.testing.assert_allclose(np.exp(scale[:2]) * 0.2 ** exponent[:2], [usual[0], steep[0]])
    costs = np.asarray([usual] * 2), np.asarray([usual, steep])
    once = allocate_by_costs(model, points[:1], (costs[0][:, :1], costs[1][:, :1]), prune)
    twice = allocate_by_costs(model, points, costs, prune)
    assert once.mlp[1] > 0.8  # as if it went on with the square
    assert max(twice.attention) < twice.mlp[1] < 0.5


def test_a_ratio_at_which_rounding_took_nothing_says_nothing_about_the_cost():
    free, dear = [1e-7, 0.3], [0.003, 0.3]
    scale, exponent = power_laws((0.05, 0.75), np.asarray([free, dear, [1e-7, 1e-7]]))
    assert exponent[0] == 2
    assert np.exp(scale[0]) * 0.75**2 == pytest.approx(0.3)
    assert exponent[1] == pytest.approx(np.log(100) / np.log(15))
    assert np.exp(scale[2]) < 1e-6  # what costs nothing anywhere stays free


def test_a_cost_that_is_not_finite_is_named():
    model = make("gqa", layers=2).config
    costs = np.ones((2, 2)), np.asarray([[1.0, 2.0], [1.0, np.nan]])
    with pytest.raises(RunError, match="layer 1, MLP: what its pruning costs is not finite"):
        allocate_by_costs(model, (0.3, 0.75), costs, PruneConfig(0.3))


@pytest.mark.parametrize("sparsity", [1e-4, 0.05, 0.5, 0.76, 0.89])
def test_any_sparsity_within_reach_is_met(sparsity):
    one_head = LayerShape((0,), 8, 8, 8, 24)
    model = make("gqa", layers=2, shape=one_head)
    config = dataclasses.replace(ALONE, sparsity=sparsity, align=1, max_ratio=1.0)
    ratios = estimate_ratios(model, windows(3, 16), config)
    assert ratios.sparsity(model.config) == pytest.approx(sparsity, rel=1e-6)


def test_an_impossible_budget_says_what_is_possible():
    with pytest.raises(InputError, match=r"sparsity 0\.95 cannot be reached: at most"):
        estimate_ratios(make("gqa"), windows(4), dataclasses.replace(ALONE, sparsity=0.95))
