import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig, uniform_query_to_kv
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.prune.allocation import Modules, UnitScores, allocate, allocate_evenly, cap_and_spread, rank
from intraslice_jax.prune.attention import HeadEnergies, plan_heads
from intraslice_jax.prune.budget import TOLERANCE, LayerRatios, Ledger, narrowest
from intraslice_jax.prune.heads import choose_heads, plan_grouped_heads


def model_of(layers=4, kv=2, group=2, width=16, inner=96, hidden=64, **changes) -> ModelConfig:
    shape = LayerShape(uniform_query_to_kv(kv * group, kv), width, width, width, inner)
    return ModelConfig("tiny", 61, hidden, width, width, (shape,) * layers, **changes)


def random_scores(config, rng, components=False) -> UnitScores:
    def units(count):
        return np.exp(rng.normal(rng.normal(), 1.5, count))

    widths = [s.num_attention_heads * (s.v_head_dim if components else 1) for s in config.layers]
    return UnitScores(tuple(map(units, widths)), tuple(units(s.intermediate_size) for s in config.layers))


def random_energies(heads, width, rng) -> HeadEnergies:
    energies = object.__new__(HeadEnergies)
    energies.channel_scores = np.exp(rng.normal(rng.normal(0, 1.5, (heads, 1)), 1, (heads, width)))
    energies.total = energies.channel_scores.sum(1)
    spectra = -np.sort(-np.exp(rng.normal(0, 2, (heads, width))), 1)
    shares = spectra / spectra.sum(1, keepdims=True)
    energies.cumulative = np.concatenate([np.zeros((heads, 1)), np.cumsum(shares, 1)], 1)
    return energies


def attention_shape(shape: LayerShape, heads, width) -> LayerShape:
    to_kv = [shape.query_to_kv[h] for h in heads]
    kept = sorted(set(to_kv))
    qk = min(width, shape.qk_head_dim)
    return LayerShape(tuple(map(kept.index, to_kv)), qk, qk, width, shape.intermediate_size)


def prune_shapes(config: ModelConfig, ratios: LayerRatios, prune: PruneConfig, rng) -> ModelConfig:
    """What the layer loop does to the shapes of a model whose heads carry random energies."""
    ledger = Ledger(config, ratios, prune.align, prune.max_ratio)
    pruned = []
    for i, shape in enumerate(config.layers):
        channels = shape.num_attention_heads * shape.v_head_dim

        def cost(heads, width, shape=shape):
            return config.attention_parameters(attention_shape(shape, heads, width))

        heads, width = choose_heads(
            random_energies(shape.num_attention_heads, shape.v_head_dim, rng),
            channels - round(channels * ratios.attention[i]),
            shape.query_to_kv,
            prune.grouping,
            cost,
            ledger.attention_range(i),
            prune.head_align,
        )
        new = attention_shape(shape, heads, width)
        ledger.attention_done(i, new)
        pruned.append(dataclasses.replace(new, intermediate_size=ledger.mlp_width(i)))
    ledger.check()
    return config.with_layers(tuple(pruned))


@st.composite
def requests(draw):
    biased = draw(st.booleans())
    # Plain values: checked dataclasses draw random numbers of their own.
    model = {
        "layers": draw(st.integers(1, 12)),
        "kv": draw(st.integers(1, 6)),
        "group": draw(st.integers(1, 5)),
        "width": draw(st.sampled_from([8, 16, 24])),
        "inner": draw(st.integers(64, 400)),
        "hidden": draw(st.sampled_from([32, 80])),
        "gated_mlp": draw(st.booleans()),
        "attention_bias": biased,
        "attention_output_bias": biased,
        "mlp_bias": biased,
    }
    prune = {
        "sparsity": draw(st.floats(0, 0.85)),
        "align": draw(st.sampled_from([1, 4, 8, 16, 64])),
        "max_ratio": draw(st.sampled_from([0.6, 0.9, 1.0])),
        "kind_bias": draw(st.sampled_from([0.5, 1.0, 1.0, 1.5])),
        "grouping": draw(st.sampled_from(["ragged", "uniform"])),
    }
    return model, prune, draw(st.sampled_from(["even", "heads", "components"])), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(requests())
def test_the_budget_is_met_and_no_module_is_emptied(request):
    config, prune = model_of(**request[0]), PruneConfig(**request[1])
    units, seed = request[2:]
    rng = np.random.default_rng(seed)
    try:
        if units == "even":
            ratios = allocate_evenly(config, prune)
        else:
            ratios = allocate(config, random_scores(config, rng, units == "components"), prune)
    except InputError:
        reachable = prune.max_ratio - prune.align / config.layers[0].intermediate_size
        assert max(1, prune.kind_bias, 1 / prune.kind_bias) * prune.sparsity > reachable - 0.1
        return
    # What is asked of the layers is the request, exactly.
    assert ratios.sparsity(config) == pytest.approx(prune.sparsity, abs=1e-9)
    assert max(ratios.attention + ratios.mlp) <= prune.max_ratio + 1e-9

    pruned = prune_shapes(config, ratios, prune, rng)
    total = config.block_parameters()
    removed = 1 - pruned.block_parameters() / total
    # In these tiny models single steps of the alignment and of the heads' width are large.
    shape = config.layers[0]
    aligned = config.hidden_size * (3 if config.gated_mlp else 2) * prune.align
    channels = config.attention_parameters(shape) * 2 / shape.v_head_dim
    saturated = all(1 - s.intermediate_size / shape.intermediate_size > prune.max_ratio - 0.15 for s in pruned.layers)
    step = max(aligned, channels) if saturated else aligned
    assert abs(removed - prune.sparsity) <= max(TOLERANCE, 0.51 * step / total)
    for dense, new in zip(config.layers, pruned.layers, strict=True):
        inner, full = new.intermediate_size, dense.intermediate_size
        assert inner == full or inner % prune.align == 0
        assert 1 <= inner <= full
        assert 1 - inner / full <= prune.max_ratio + 1e-9
        assert config.attention_parameters(new) >= (1 - prune.max_ratio) * config.attention_parameters(dense) - 1
        assert new.num_key_value_groups is not None or prune.grouping == "ragged"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1e3), min_size=1, max_size=9), min_size=1, max_size=6),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_rank_removes_the_least_important_units(scores, share, seed):
    layers = [np.array(layer) for layer in scores]
    parameters = np.random.default_rng(seed).uniform(1, 5, len(layers))
    ratios = rank(layers, parameters, share * parameters.sum(), "mlp")
    assert ratios @ parameters == pytest.approx(share * parameters.sum(), abs=1e-9)
    counts = np.array([len(layer) for layer in layers])
    gone = ratios * counts
    # Whatever stays in any layer is at least as important as whatever went in any other.
    sorted_layers = [np.sort(layer) for layer in layers]
    last_gone = max(
        (s[int(np.ceil(g - 1e-9)) - 1] for s, g in zip(sorted_layers, gone, strict=True) if g > 1e-9), default=0
    )
    first_kept = min(
        (s[int(g + 1e-9)] for s, g in zip(sorted_layers, gone, strict=True) if g < len(s) - 1e-9), default=np.inf
    )
    assert last_gone <= first_kept


def test_units_of_equal_score_go_from_all_layers_alike():
    ratios = rank([np.ones(8), np.ones(8), np.ones(4)], np.full(3, 10.0), 15.0, "mlp")
    np.testing.assert_allclose(ratios, 0.5, atol=0.13)


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(RunError, match="layer 1, attention"):
        rank([np.ones(2), np.array([1, np.nan])], np.ones(2), 1.0, "attention")


def test_the_excess_is_spread_in_proportion():
    group = Modules(np.full(3, 10.0), np.full(3, 0.9))
    np.testing.assert_allclose(cap_and_spread(np.array([1.0, 0.2, 0.3]), group, 15.0), [0.9, 0.24, 0.36])
    # The second is lifted to the cap by the first one's excess, and its own goes on.
    np.testing.assert_allclose(cap_and_spread(np.array([1.0, 0.88, 0.12]), group, 20.0), [0.9, 0.9, 0.2])
    # Where the others give nothing they share it evenly.
    np.testing.assert_allclose(cap_and_spread(np.array([1.0, 0.0, 0.0]), group, 10.0), [0.9, 0.05, 0.05])


def test_kind_bias_is_the_quotient_of_the_kinds_ratios():
    config = model_of()
    for bias in (0.0, 0.5, 2.0):
        ratios = allocate_evenly(config, PruneConfig(0.3, kind_bias=bias, align=1))
        assert ratios.attention[0] == pytest.approx(bias * ratios.mlp[0])
        assert ratios.sparsity(config) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.95}, r"sparsity 0.95 cannot be reached: at most 0\.\d+ of the .* max_ratio 0.9 and align 8"),
        ({"sparsity": 0.6, "kind_bias": 50.0}, r"kind_bias 50 takes 1\d\d\.\d% of all attention parameters .* at most"),
        ({"sparsity": 0.6, "kind_bias": 0.0}, r"kind_bias 0 takes 1\d\d\.\d% of all MLP .* may be between"),
        (
            {"sparsity": 0.3, "align": 96},
            "takes 30.0% of all MLP .* align 96, at most 0 can go; no kind_bias changes that",
        ),
    ],
)
def test_an_impossible_budget_says_what_is_possible(options, message):
    config = model_of(inner=96, hidden=64, kv=4)
    with pytest.raises(InputError, match=message):
        allocate_evenly(config, PruneConfig(**options))


@pytest.mark.parametrize("max_ratio", [0.5, 0.9, 1.0])
def test_the_reachable_maximum_is_reachable(max_ratio):
    config, rng = model_of(inner=200), np.random.default_rng(0)
    with pytest.raises(InputError) as error:
        allocate_evenly(config, PruneConfig(0.999, max_ratio=max_ratio))
    largest = float(str(error.value).split("at most ")[1].split(" ")[0])
    assert 0 < largest <= max_ratio
    # Reaching it takes each kind's own maximum.
    for bias in np.linspace(0.8, 1.3, 501):
        try:
            prune = PruneConfig(largest - 1e-3, max_ratio=max_ratio, kind_bias=float(bias))
            ratios = allocate_evenly(config, prune)
        except InputError:
            continue
        pruned = prune_shapes(config, ratios, prune, rng)
        assert 1 - pruned.block_parameters() / config.block_parameters() == pytest.approx(largest, abs=0.01)
        return
    pytest.fail("no bias reaches the maximum")


def test_the_kind_bias_that_an_error_names_works():
    config = model_of(inner=96, hidden=64, kv=4)
    with pytest.raises(InputError) as error:
        allocate_evenly(config, PruneConfig(0.6, kind_bias=0.0))
    low, high = (float(str(error.value).split("between ")[1].split(" ")[i]) for i in (0, 2))
    allocate_evenly(config, PruneConfig(0.6, kind_bias=low))
    allocate_evenly(config, PruneConfig(0.6, kind_bias=high))
    for beyond in (low - 0.01, high + 0.01):
        with pytest.raises(InputError):
            allocate_evenly(config, PruneConfig(0.6, kind_bias=beyond))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ratio": 0.0}, "max_ratio must be above 0"),
        ({"max_ratio": 1.1}, "found 1.1"),
        ({"kind_bias": -1.0}, "kind_bias must be 0 or more"),
        ({"kind_bias": float("nan")}, "kind_bias"),
        ({"kind_bias": float("inf")}, "kind_bias"),
        ({"gradient_group": 0}, "gradient_group must be at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        PruneConfig(**options)


@pytest.mark.parametrize(
    ("full", "align", "ratio", "width"), [(96, 8, 0.9, 16), (100, 8, 1.0, 8), (7, 8, 1.0, 7), (80, 8, 0.9, 8)]
)
def test_narrowest(full, align, ratio, width):
    assert narrowest(full, align, ratio) == width


def test_a_budget_that_was_missed_is_reported():
    config = model_of(layers=1)
    ledger = Ledger(config, LayerRatios((0.9,), (0.0,)), 8)
    ledger.attention_done(0, config.layers[0])
    ledger.mlp_width(0)
    ledger.check()  # the MLP made up for it
    ledger = Ledger(config, LayerRatios((0.9,), (0.9,)), 8)
    ledger.attention_done(0, config.layers[0])
    ledger.mlp_width(0)
    with pytest.raises(InputError, match="could not be removed; ask for less"):
        ledger.check()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.05, 1), st.integers(0, 999))
def test_grouped_plans_leave_every_kv_head_equally_many_queries(kv, group, share, seed):
    to_kv = uniform_query_to_kv(kv * group, kv)
    energies = random_energies(kv * group, 16, np.random.default_rng(seed))
    budget = max(2, int(share * energies.channel_scores.size))
    heads, width = plan_grouped_heads(energies, budget, to_kv)
    counts = np.bincount(np.asarray(to_kv)[heads], minlength=kv)
    assert len(set(counts[counts > 0])) == 1
    assert width % 2 == 0
    assert 2 <= width <= 16
    assert width >= 11 or len(heads) == 1  # 3/4, and half an even step for rounding
    assert list(heads) == sorted(set(heads))
    # No other equal grouping of the same size carries more.
    best = {
        j: sorted((h for h in range(kv * group) if to_kv[h] == j), key=lambda h: -energies.total[h]) for j in range(kv)
    }
    members = {j: best[j][: counts.max()] for j in range(kv)}
    totals = sorted((energies.total[members[j]].sum() for j in range(kv)), reverse=True)
    assert energies.total[heads].sum() == pytest.approx(sum(totals[: np.count_nonzero(counts)]))


def test_one_query_head_per_kv_head_needs_no_grouping():
    energies = random_energies(6, 16, np.random.default_rng(3))
    to_kv = tuple(range(6))
    ragged = plan_heads(energies, 70)
    grouped = plan_grouped_heads(energies, 70, to_kv)
    assert energies.of(grouped[0], grouped[1]).sum() >= 0.9 * energies.of(ragged[0], ragged[1]).sum()


def test_a_plan_outside_the_range_gives_way_to_the_best_inside():
    energies = random_energies(4, 16, np.random.default_rng(5))
    to_kv = (0, 0, 1, 1)

    def cost(heads, width):
        return len(heads) * width

    usual = plan_heads(energies, 40)
    assert choose_heads(energies, 40, to_kv, "ragged", cost, (0, 64))[1] == usual[1]
    heads, width = choose_heads(energies, 40, to_kv, "ragged", cost, (20, 24))
    assert 20 <= len(heads) * width <= 24
    # Nothing lies between 65 and 70: the nearest is the whole.
    assert cost(*choose_heads(energies, 40, to_kv, "uniform", cost, (65, 70))) == 64
