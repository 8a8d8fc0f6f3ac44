import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.config import LayerShape, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune import search
from intraslice_jax.prune.allocation import allocate_evenly
from intraslice_jax.prune.budget import HeadWidths, LayerRatios
from intraslice_jax.prune.estimators import estimate_ratios
from intraslice_jax.prune.exchange import Move, exchange
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.trials import Trials
from tests.io.test_journal import Passes, Stop, run_of_ratios
from tests.prune.flavours import make, windows, with_arrays
from tests.prune.test_sensitivity import log_softmax

CONFIG = PruneConfig(0.3, align=2, ratios="search", iterative="never", search_rounds=2)
ANY = HeadWidths(1, 2, 2)


@pytest.fixture
def from_uniform(monkeypatch):
    """The search begins with the same ratio everywhere."""
    monkeypatch.setattr(
        search.KLSensitivity, "resumed", lambda _, model, windows, config, *rest: allocate_evenly(model.config, config)
    )


def divergence(dense, pruned, tokens):
    logits = [log_softmax(model.decoder(jnp.asarray(tokens))) for model in (dense, pruned)]
    return (np.exp(logits[0]) * (logits[0] - logits[1])).sum(-1).mean()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_exchange_never_gives_back_more_than_it_removes_and_each_pair_pays(data):
    move = st.builds(
        Move,
        layer=st.integers(0, 4),
        heads=st.sampled_from([None, ANY]),
        parameters=st.integers(-9, 9).filter(bool),
        cost=st.floats(-1, 1),
    )
    moves = data.draw(st.lists(move, max_size=12))
    chosen = exchange(moves)
    assert all(chosen.count(m) <= moves.count(m) for m in chosen)
    assert len({(m.layer, m.heads is None) for m in chosen}) == len(chosen)
    assert all(sum(m.parameters for m in chosen[:n]) >= 0 for n in range(len(chosen) + 1))
    removals, returns = ([m.price for m in chosen if sign * m.parameters > 0] for sign in (1, -1))
    assert removals == sorted(removals)
    assert returns == sorted(returns, reverse=True)
    # The last of either side was still better than what the other side had next.
    assert all(cheap < dear for cheap, dear in zip(removals, returns, strict=False))


def test_the_dearest_parameters_come_back_for_the_cheapest():
    moves = [
        Move(0, None, 10, 0.5),
        Move(0, None, -10, -0.1),  # the same module as above
        Move(1, None, 10, 0.1),
        Move(2, ANY, -5, -0.4),
        Move(3, ANY, -5, -0.3),
        Move(3, None, -5, -0.01),
    ]
    assert exchange(moves) == [moves[2], moves[3], moves[4]]
    assert exchange(moves[:1]) == []


def test_steps_go_to_the_next_widths_of_a_grid():
    full = LayerShape((0, 0, 1, 1), 64, 64, 32, 1536)
    now = LayerShape((0, 0, 1), 50, 50, 32, 1000)
    found = search.steps(now, full, PruneConfig(align=8))
    assert found == Trials(
        [
            HeadWidths(2, 50, 32),
            HeadWidths(4, 50, 32),
            HeadWidths(3, 40, 32),
            HeadWidths(3, 56, 32),
            HeadWidths(3, 50, 28),
        ],
        [864, 1056],
    )
    even = search.steps(LayerShape((0, 1), 64, 64, 32, 1536), full, PruneConfig(align=8, grouping="uniform"))
    assert [heads.num_attention_heads for heads in even.attention[:2]] == [1, 4]
    assert even.mlp == [1440]


@pytest.mark.slow
def test_parameters_go_where_they_are_worth_most(from_uniform):
    model = make("gqa", layers=3)
    nothing = np.zeros_like(np.asarray(decoder_to_arrays(model.decoder)["layers.1.mlp.down_proj"]))
    model = with_arrays(model, layers__1__mlp__down_proj=nothing)
    tokens, done = windows(8), []
    uniform = prune_model(model, tokens, dataclasses.replace(CONFIG, ratios="uniform"))
    config = dataclasses.replace(CONFIG, search_rounds=1)
    ratios = estimate_ratios(model, tokens, config, lambda *progress: done.append(progress))
    assert ratios.mlp[1] > 0.3 > min(ratios.attention + ratios.mlp)
    assert done == [(6, 30), (14, 30), (22, 30), (30, 30)]  # 8 of every layer behind 2 of each
    found = prune_model(model, tokens, CONFIG, ratios=ratios)
    assert [s.num_attention_heads for s in found.config.layers] == [h.num_attention_heads for h in ratios.heads]
    removed = [m.report["removed_block_fraction"] for m in (found, uniform)]
    assert removed[0] == pytest.approx(removed[1], abs=0.03)
    assert divergence(model, found, tokens[-1:]) < 0.9 * divergence(model, uniform, tokens[-1:])


@pytest.mark.slow
def test_what_a_step_costs_is_what_it_does_to_the_whole_model(from_uniform, monkeypatch):
    """The last layer's steps see the same text as when that layer is pruned so in a whole run."""
    model, tokens, seen = make("phi", layers=2), windows(8), []

    def remember(moves):
        seen.extend(moves)
        return []

    monkeypatch.setattr(search, "exchange", remember)
    start = estimate_ratios(model, tokens, CONFIG)
    before = divergence(model, prune_model(model, tokens[:-1], CONFIG, ratios=start), tokens[-1:])
    last = next(m for m in seen if m.layer == 1 and m.heads is None and m.parameters > 0)
    part = last.parameters / model.config.mlp_parameters(model.config.layers[1])
    ratios = LayerRatios(start.attention, (start.mlp[0], start.mlp[1] + part), start.heads)
    pruned = prune_model(model, tokens[:-1], CONFIG, ratios=ratios)
    assert last.cost == pytest.approx(divergence(model, pruned, tokens[-1:]) - before, rel=1e-2, abs=1e-5)


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_where_it_was(from_uniform, tmp_path):
    whole, rest = Passes(), Passes()
    expected = run_of_ratios(CONFIG, tmp_path / "whole", whole)
    last = whole.done[-2]  # behind the first exchange, if there is one
    with pytest.raises(Stop):
        run_of_ratios(CONFIG, tmp_path / "journal", Passes(last))
    assert run_of_ratios(CONFIG, tmp_path / "journal", rest) == expected
    assert rest.done == [done for done in whole.done if done > last]


def test_the_time_limit_ends_a_search(from_uniform):
    done = []
    config = dataclasses.replace(CONFIG, search_seconds=1e-3)
    estimate_ratios(make("gqa", layers=3), windows(8), config, lambda *progress: done.append(progress))
    assert done == [(6, 54), (14, 54)]


def test_what_is_better_when_the_time_is_over_is_taken(from_uniform, monkeypatch):
    model, divergences = make("gqa"), iter([3.0, 2.0])
    monkeypatch.setattr(
        search._Candidates,
        "prune",
        lambda _, ratios: search._Candidate(model, ratios, model.decoder.layers.__getitem__, next(divergences)),
    )
    monkeypatch.setattr(search.Search, "_moves", lambda *_: [])
    monkeypatch.setattr(search, "exchange", lambda _: [Move(0, None, 96, 0.0)])
    ratios = estimate_ratios(model, windows(8), dataclasses.replace(CONFIG, search_seconds=1e-9))
    assert ratios.mlp[0] > ratios.mlp[1]


def test_only_intraslice_takes_widths():
    with pytest.raises(InputError, match="only method intraslice takes the widths of ratios search, found method flap"):
        estimate_ratios(make("gqa"), windows(8), dataclasses.replace(CONFIG, method="flap"))
    ratios = LayerRatios((0.3, 0.3), (0.3, 0.3), (HeadWidths(2, 8, 8),) * 2)
    with pytest.raises(InputError, match="only method intraslice takes widths of heads, found method flap"):
        prune_model(make("gqa"), windows(8), PruneConfig(method="flap"), ratios=ratios)
