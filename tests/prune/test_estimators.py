import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.calibrate.gradients import group_gradients
from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune import estimators
from intraslice_jax.prune.allocation import UnitScores
from intraslice_jax.prune.budget import HeadWidths, LayerRatios
from intraslice_jax.prune.estimators import (
    ESTIMATORS,
    Eigenbases,
    component_scores,
    eigenbases,
    estimate_ratios,
    rotated_scores,
)
from tests.prune.flavours import make, windows, with_arrays

GRADIENT = ["fisher", "fisher_pca", "fisher_components"]


def definition(name, config, groups, prune) -> LayerRatios:
    """Section 4 read again, unit by unit, for models whose layers are all alike and no layer reaches the maximum."""
    shape = config.layers[0]
    count, v, inner = shape.num_attention_heads, shape.v_head_dim, shape.intermediate_size
    attention, mlp = [], []
    for layer in range(config.num_layers):
        for head in range(count):
            if name == "fisher":
                attention.append((sum(float(sum(g.attention[layer][head])) ** 2 for g in groups), layer))
                continue
            covariance = sum(np.float64(g.head_gram[layer][head]) for g in groups)
            q = np.linalg.eigh(covariance)[1]
            for i in range(v):
                if name == "fisher_pca":
                    parts = [float(np.float64(g.attention[layer][head]) @ q[:, i]) for g in groups]
                else:
                    parts = [float(q[:, i] @ np.float64(g.matrices[layer][head]) @ q[:, i]) for g in groups]
                attention.append((sum(part**2 for part in parts), layer))
        for channel in range(inner):
            mlp.append((sum(float(g.mlp[layer][channel]) ** 2 for g in groups), layer))

    def ratios(units):
        budget = prune.sparsity * len(units)
        gone = np.zeros(config.num_layers)
        for _, layer in sorted(units):
            part = min(1, max(budget, 0))
            gone[layer] += part
            budget -= part
        return tuple(gone / (len(units) / config.num_layers))

    return LayerRatios(ratios(attention), ratios(mlp))


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("sparsity", [0.15, 0.3])
def test_ratios_agree_with_the_definition_on_the_same_gradients(name, sparsity):
    model, tokens = make("gqa", layers=3), windows(7, 24)
    prune = PruneConfig(sparsity, ratios=name, gradient_group=2, align=1, max_ratio=1.0)
    found = estimate_ratios(model, tokens, prune)
    groups = list(group_gradients(model, tokens, group=2, matrices=name == "fisher_components"))
    expected = definition(name, model.config, groups, prune)
    np.testing.assert_allclose(found.attention, expected.attention, atol=1e-9)
    np.testing.assert_allclose(found.mlp, expected.mlp, atol=1e-9)
    assert np.std(found.mlp) > 0.01
    assert np.std(found.attention) > 0.01


@pytest.mark.parametrize("flavour", ["ragged", "phi"])
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_flavour_gets_ratios_that_add_up(name, flavour):
    model = make(flavour)
    found = estimate_ratios(model, windows(3, 16), PruneConfig(0.3, ratios=name, align=1))
    assert found.sparsity(model.config) == pytest.approx(0.3, abs=1e-9)
    assert all(0 <= ratio <= 0.9 + 1e-9 for ratio in found.attention + found.mlp)


def random_case(seed, heads=3, v=8, eigenvalues=None):
    """Second moments with the given spectrum, and gradients of five groups."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((heads, v, v)))[0]
    values = np.sort(rng.exponential(1, v))[::-1] if eigenvalues is None else np.asarray(eigenvalues, np.float64)
    gram = np.einsum("hvi,i,hwi->hvw", q, values, q)
    return gram, rng.standard_normal((5, heads, v)), rng.standard_normal((5, heads, v, v)), rng


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(8, 7, 6, 5, 4, 3, 2, 1), (5, 5, 5, 2, 2, 1, 0, 0), (1,) * 8]))
def test_scores_do_not_depend_on_signs_or_on_bases_of_eigenspaces(seed, eigenvalues):
    gram, gradients, matrices, rng = random_case(seed, eigenvalues=eigenvalues)
    basis = eigenbases(gram)
    values = np.asarray(eigenvalues, np.float64)
    other = basis.vectors * rng.choice([-1, 1], (3, 1, 8))
    for value in set(eigenvalues):
        space = np.flatnonzero(values == value)
        turn = np.linalg.qr(rng.standard_normal((len(space), len(space))))[0]
        other[:, :, space] = other[:, :, space] @ turn
    turned = Eigenbases(other, basis.space)
    products = np.einsum("ghv,ghw->hvw", gradients, gradients)

    def all_scores(basis):
        monkeypatch = pytest.MonkeyPatch()
        with monkeypatch.context() as patch:
            patch.setattr(estimators, "eigenbases", lambda gram: basis)
            rotated = rotated_scores(products, gram)
        return rotated, component_scores(matrices[0], basis)

    for found, expected in zip(all_scores(turned), all_scores(basis), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    # The plain reading does depend on the basis where there is a choice of more than signs.
    plain = [np.square(np.einsum("ghv,hvi->ghi", gradients, b.vectors)).sum(0) for b in (turned, basis)]
    assert np.allclose(*plain) == (len(set(eigenvalues)) == 8)


def test_eigenspaces_are_found():
    gram, *_ = random_case(0, eigenvalues=(5, 5, 5, 2, 2, 1, 0, 0))
    np.testing.assert_array_equal(eigenbases(gram).space, [[0, 0, 0, 1, 1, 2, 3, 3]] * 3)


def test_a_whole_heads_scores_add_up_to_the_unrotated_squares():
    gram, gradients, _, _ = random_case(1)
    products = np.einsum("ghv,ghw->hvw", gradients, gradients)
    scores = rotated_scores(products, gram).reshape(3, 8)
    np.testing.assert_allclose(scores.sum(1), np.square(gradients).sum((0, 2)))


@pytest.mark.parametrize("eigenvalues", [(3, 3, 3), (4, 2, 2)])
def test_component_scores_are_the_mean_over_all_bases(eigenvalues):
    gram, _, matrices, rng = random_case(2, heads=1, v=3, eigenvalues=eigenvalues)
    basis = eigenbases(gram)
    found = component_scores(matrices[0], basis)[0]
    space = np.flatnonzero(np.asarray(eigenvalues) == eigenvalues[-1])
    turns = np.linalg.qr(rng.standard_normal((100_000, len(space), len(space))))[0]
    vectors = np.einsum("vi,nij->nvj", basis.vectors[0][:, space], turns)
    drawn = np.square(np.einsum("nvi,vw,nwi->ni", vectors, matrices[0, 0], vectors)).mean()
    np.testing.assert_allclose(found[space], drawn, rtol=0.03)


@pytest.mark.parametrize("name", GRADIENT)
def test_a_head_that_does_nothing_goes_first(name):
    model = make("mha")
    o_proj = np.array(decoder_to_arrays(model.decoder)["layers.1.attention.o_proj"])
    o_proj[2] = 0
    down = np.array(decoder_to_arrays(model.decoder)["layers.0.mlp.down_proj"])
    down[:12] = 0
    model = with_arrays(model, layers__1__attention__o_proj=o_proj, layers__0__mlp__down_proj=down)
    config = model.config
    attention, mlp = (size(config.layers[0]) for size in (config.attention_parameters, config.mlp_parameters))
    share = attention / (attention + mlp)
    # One head of eight, then a quarter of the channels: exactly what does nothing.
    prune = PruneConfig(share / 8, ratios=name, align=1, kind_bias=1e9)
    np.testing.assert_allclose(estimate_ratios(model, windows(4, 24), prune).attention, [0, 0.25], atol=1e-6)
    prune = PruneConfig((1 - share) / 4, ratios=name, align=1, kind_bias=0.0)
    np.testing.assert_allclose(estimate_ratios(model, windows(4, 24), prune).mlp, [0.5, 0], atol=1e-6)


def test_a_third_partys_estimator_is_one_class(monkeypatch):
    class Depth:
        def __call__(self, model, windows, config, on_batch=None):
            layers = enumerate(model.config.layers)
            return UnitScores(*zip(*((np.full(4, i + 1.0), np.full(24, i + 1.0)) for i, _ in layers), strict=True))

    monkeypatch.setitem(ESTIMATORS, "depth", Depth())
    found = estimate_ratios(make(layers=3), windows(), PruneConfig(0.4, ratios="depth", align=1))
    assert found.attention[0] > found.attention[1] > found.attention[2] == 0
    assert found.mlp[0] == pytest.approx(0.9, abs=0.05)


def test_scores_that_are_not_finite_are_named(monkeypatch):
    scores = UnitScores((np.ones(4),) * 2, (np.ones(24), np.full(24, np.nan)))
    monkeypatch.setitem(ESTIMATORS, "broken", lambda *args: scores)
    with pytest.raises(RunError, match="layer 1, mlp"):
        estimate_ratios(make(), windows(), PruneConfig(ratios="broken"))


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_ratios_from_a_file_are_used_as_they_are(tmp_path, suffix):
    model = make()
    path = tmp_path / f"ratios.{suffix}"
    text = (
        '{"attention": [0.25, 0], "mlp": [0.5, 0.1]}' if suffix == "json" else "attention: [0.25, 0]\nmlp: [.5, .1]\n"
    )
    path.write_text(text)
    found = estimate_ratios(model, windows(), PruneConfig(ratios=str(path)))
    assert found == LayerRatios((0.25, 0.0), (0.5, 0.1))
    attention, mlp = (
        size(model.config.layers[0]) for size in (model.config.attention_parameters, model.config.mlp_parameters)
    )
    assert found.sparsity(model.config) == pytest.approx((0.25 * attention + 0.6 * mlp) / (2 * (attention + mlp)))


def test_a_file_of_ratios_must_not_contradict_the_sparsity(tmp_path):
    path, model = tmp_path / "ratios.json", make()
    path.write_text('{"attention": [0.25, 0.25], "mlp": [0.25, 0.25]}')
    for sparsity in (None, 0.25, 0.253):
        estimate_ratios(model, windows(), PruneConfig(sparsity, ratios=str(path)))
    for sparsity in (0.0, 0.3):
        with pytest.raises(InputError, match=r"ratios\.json removes 25\.0% .* `sparsity` asks for (0|30)\.0%; leave"):
            estimate_ratios(model, windows(), PruneConfig(sparsity, ratios=str(path)))


def test_reported_ratios_can_be_used_again(tmp_path):
    model = make()
    ratios = estimate_ratios(model, windows(), PruneConfig(0.3, ratios="fisher"))
    path = tmp_path / "ratios.json"
    for found in (ratios, dataclasses.replace(ratios, heads=(HeadWidths(3, 6, 8), HeadWidths(1, 8, 2)))):
        path.write_text(json.dumps(dataclasses.asdict(found)))
        assert estimate_ratios(model, windows(), PruneConfig(ratios=str(path))) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"attention": [0.1], "mlp": [0.1, 0.2]}', "'attention' holds 1 ratios, the model has 2 layers"),
        ('{"attention": [0.1, 0.2], "mlp": [0.1, 1.2]}', r"mlp\.1 must be at most 1, found 1\.2"),
        ('{"attention": [-0.1, 0.2], "mlp": [0.1, 0.2]}', r"attention\.0 must be at least 0, found -0\.1"),
        ('{"attention": [0.1, 0.95], "mlp": [0.1, 0.2]}', r"attention\[1\] is 0.95, above the maximum of 0.9"),
        ('{"attention": [0.1, NaN], "mlp": [0.1, 0.2]}', r"attention\.1 must be at most 1, found nan"),
        ('{"attention": [0.1, "x"], "mlp": [0.1, 0.2]}', r"attention\.1 must be a number, found 'x'"),
        ('{"attention": [0.1, true], "mlp": [0.1, 0.2]}', r"attention\.1 must be a number, found True"),
        ('{"attention": [0.1, 0.2]}', "mlp is missing"),
        ('{"attention": 0.3, "mlp": [0.1, 0.2]}', "attention must be a list, found 0.3"),
        ('{"attentoin": [0.1, 0.2], "mlp": [0.1, 0.2]}', "unknown key 'attentoin'; did you mean 'attention'"),
        (
            '{"attention": [0.1, 0.2], "mlp": [0.1, 0.2], "heads": [{"num_attention_heads": 2}, {}]}',
            r"heads\.0\.qk_head_dim is missing",
        ),
        ('{"attention": [0.1, 0.2], "mlp": [0.1, 0.2], "heads": 3}', "heads must be a list, found 3"),
        ('{"attention": [0.1, 0.2], "mlp": [0.1, 0.2], "heads": [WIDTHS]}', "'heads' holds 1 layers, the model has 2"),
        (
            '{"attention": [0.1, 0.2], "mlp": [0.1, 0.2], "heads": [WIDTHS, WIDTHS]}',
            r"heads\[0\]: num_attention_heads is 9, the model has 4",
        ),
        ("[0.1, 0.2]", r"must be an object, found \[0\.1, 0\.2\]"),
        ('{"attention": [0.1', "cannot be read as JSON"),
        ("[" * 5_000, "cannot be read as JSON"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "ratios.json"
    widths = '{"num_attention_heads": 9, "qk_head_dim": 2, "v_head_dim": 2}'
    path.write_text(text.replace("WIDTHS", widths))
    with pytest.raises(InputError, match=message) as error:
        estimate_ratios(make(), windows(), PruneConfig(ratios=str(path)))
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fischer", "unknown ratios 'fischer'; did you mean 'fisher'"),
        (
            "xyz",
            "known are fisher, fisher_components, fisher_pca, kl, uniform; or name a .json",
        ),
        ("missing.yaml", "missing.yaml is missing; `ratios` takes a file of ratios or one of uniform, fisher"),
        ("x" * 300, "unknown ratios 'xxx"),
        ("x" * 300 + ".json", r"xxx\.json cannot be read: File name too long"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        estimate_ratios(make(), windows(), PruneConfig(ratios=name))


def test_an_impossible_budget_is_refused_before_the_gradients_are_taken(monkeypatch):
    monkeypatch.setattr(estimators, "group_gradients", lambda *args, **options: pytest.fail("too late"))
    with pytest.raises(InputError, match="at most"):
        estimate_ratios(make(), windows(), PruneConfig(0.97, ratios="fisher"))
