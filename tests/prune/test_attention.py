import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.config import LayerShape, PruneConfig
from intraslice_jax.models.decoder import block_from_arrays, decoder_to_arrays
from intraslice_jax.prune.attention import (
    AttentionPlan,
    HeadEnergies,
    effective_bases,
    head_blocks,
    plan_heads,
    plan_widths,
    product_bases,
    select_pairs,
    sum_groups,
    unexplained_blocks,
)
from intraslice_jax.prune.attention import value_bases as value_bases_of
from intraslice_jax.prune.calibration import AttentionCalibration, ResidualStream
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.linalg import solver_precision
from tests.prune import reference
from tests.prune.flavours import FLAVOURS, make, windows, with_arrays


def random_heads(seed, heads, width, spread=1.0):
    """An o-projection and per-head Gram matrices whose heads differ by about exp(spread)."""
    rng = np.random.default_rng(seed)
    o_proj = rng.standard_normal((heads, width, 5)) * np.exp(spread * rng.standard_normal((heads, 1, 1)))
    y = rng.standard_normal((heads, 30, width)) * np.exp(rng.standard_normal((heads, 1, width)))
    y = y @ np.linalg.qr(rng.standard_normal((heads, width, width)))[0]
    return o_proj, y.swapaxes(1, 2) @ y


def energies_of(o_proj, grams):
    with solver_precision():
        return HeadEnergies(jnp.asarray(o_proj), jnp.asarray(grams))


def plan(o_proj, grams, budget):
    heads, width = plan_heads(energies_of(o_proj, grams), budget)
    return [int(h) for h in heads], width


def test_energies():
    o_proj, grams = random_heads(0, 3, 4)
    o_proj[2], grams[1] = 0, 0  # one head whose output is ignored, one that is never attended to
    energies = energies_of(o_proj, grams)
    scores = np.sum(o_proj**2, -1) * np.diagonal(grams, axis1=1, axis2=2)
    np.testing.assert_allclose(energies.channel_scores, scores, rtol=1e-12)
    values = np.linalg.eigvalsh(grams[0])[::-1]
    np.testing.assert_allclose(
        energies.of(np.asarray([0, 1, 2]), 2), [scores[0].sum() * values[:2].sum() / values.sum(), 0, 0], rtol=1e-12
    )
    np.testing.assert_allclose(energies.cumulative[[0, 2], -1], 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    heads=st.sampled_from([1, 3, 8]),
    width=st.sampled_from([2, 8, 12]),
    share=st.floats(0.02, 1),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_plan_is_that_of_the_method(seed, heads, width, share, spread):
    o_proj, grams = random_heads(seed, heads, width, spread)
    budget = max(2, round(share * heads * width))
    kept, chosen = plan(o_proj, grams, budget)
    assert (kept, chosen) == reference.plan_heads(o_proj, grams, budget)
    assert len(kept) >= 1
    assert kept == sorted(set(kept))
    assert chosen % 2 == 0
    assert 2 <= chosen <= width
    if len(kept) > 1:
        assert chosen >= 0.75 * width
    # Nothing asked, nothing dropped for being small.
    if budget == heads * width and spread < 2:
        assert chosen == width


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([1, 3, 8]), width=st.sampled_from([2, 8]), budget=st.integers(-3, 60), dead=st.integers(0, 8)
)
def test_plan_with_dead_heads_is_never_empty(heads, width, budget, dead):
    o_proj, grams = random_heads(0, heads, width)
    grams[:dead] = 0
    kept, chosen = plan(o_proj, grams, budget)
    assert len(kept) >= 1
    assert chosen % 2 == 0
    assert 2 <= chosen <= width
    if 0 < dead < heads and budget <= (heads - dead) * width:
        assert min(kept) >= dead


def test_a_tie_between_two_even_widths_is_rounded_up():
    o_proj, grams = np.ones((2, 12, 3)), np.tile(np.eye(12), (2, 1, 1))
    # 9 channels per head: 8 would be narrower than three quarters.
    assert plan(o_proj, grams, 18) == ([0, 1], 10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([2, 4, 6, 8]), data=st.data())
def test_pairs_are_chosen_per_group_of_kept_heads(seed, width, data):
    to_kv = data.draw(st.sampled_from([(0, 1, 2, 3), (0, 0, 1, 1), (0, 0, 0, 1, 2, 2), (0, 0, 0, 0)]))
    heads = data.draw(st.sets(st.integers(0, len(to_kv) - 1), min_size=1).map(sorted))
    scores = np.random.default_rng(seed).random((len(to_kv), 8))
    kept = AttentionPlan(tuple(heads), tuple(to_kv[h] for h in heads), width, 0, width)
    pairs = select_pairs(scores, kept, 8)
    expected = reference.select_pairs(scores, to_kv, heads, width, 4)
    assert kept.kv_heads == tuple(expected)
    assert np.concatenate([pairs, pairs + 4], 1).tolist() == list(expected.values())
    assert [kept.kv_heads[j] for j in kept.local_query_to_kv] == list(kept.query_to_kv)


@pytest.mark.parametrize("width", [1, 3, 6])
def test_unrotated_products_are_approximated_as_well_as_their_rank_allows(width):
    rng = np.random.default_rng(width)
    mixing = rng.standard_normal((2, 6, 6)) * np.exp(rng.standard_normal((2, 1, 6)))
    q, k = rng.standard_normal((2, 40, 6)) @ mixing, rng.standard_normal((2, 30, 6)) @ mixing
    k[1, :, 2] = 0  # a dead channel
    with solver_precision():
        grams = (jnp.asarray(x.swapaxes(1, 2) @ x) for x in (q, k))
        left, right = map(np.asarray, product_bases(*grams, width))
    for head in range(2):
        product = q[head] @ k[head].T
        values = np.linalg.svd(product)[1]
        error = product - q[head] @ left[head] @ (k[head] @ right[head]).T
        np.testing.assert_allclose(np.square(error).sum(), np.square(values[width:]).sum(), atol=1e-8 * values[0] ** 2)


@settings(max_examples=50, deadline=None)
@given(pairs=st.integers(0, 8), rest=st.integers(0, 16), data=st.data())
def test_widths_keep_the_proportion_of_rotated_channels(pairs, rest, data):
    full = 2 * pairs + rest
    if full < 2:
        return
    width = data.draw(st.integers(1, full // 2).map(lambda half: 2 * half))
    rotary, other = plan_widths(width, LayerShape((0,), full, 2 * pairs, full, 8))
    assert (rotary + other, rotary % 2) == (width, 0)
    assert 0 <= rotary <= 2 * pairs
    assert 0 <= other <= rest
    assert abs(rotary - width * 2 * pairs / full) <= 2


def test_value_bases_span_the_strongest_directions_of_each_group():
    rng = np.random.default_rng(0)
    kept = AttentionPlan((0, 2, 3, 5), (0, 1, 1, 4), 8, 0, 4)
    y = rng.standard_normal((50, 4, 8)) * np.exp(rng.standard_normal((1, 4, 8)))
    with solver_precision():
        flat = jnp.asarray(y.reshape(50, -1))
        groups = sum_groups(head_blocks(flat.T @ flat, 4), np.asarray(kept.local_query_to_kv), 3)
        bases = np.asarray(value_bases_of(groups, kept.v_width))
    assert bases.shape == (3, 8, 4)
    for basis, members in zip(bases, ([0], [1, 2], [3]), strict=True):
        rows = y[:, members].swapaxes(0, 1).reshape(-1, 8)
        strongest = np.linalg.svd(rows)[2][:4].T  # another way to the same: of the rows themselves
        np.testing.assert_allclose(basis @ basis.T, strongest @ strongest.T, atol=1e-10)
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-12)


def prune_first_attention(model, ratio, tokens=None, damping=0.01, batch_size=2):
    """(pruned attention, block with it, reference layer, reference projections, layer input)."""
    tokens = windows() if tokens is None else tokens
    stream = ResidualStream.start(model, tokens, batch_size)
    shape, block = model.config.layers[0], model.decoder.layers[0]
    layer = AttentionCalibration(0, block, shape, stream, PruneConfig(damping=damping), model.config, (0, 10**9))
    pruned = IntraSlice().prune_attention(layer, ratio)
    arrays = dict(decoder_to_arrays(block))
    arrays |= {f"attention.{name}": np.asarray(a) for name, a in pruned.arrays.items()}
    whole = reference.Model(model.config, decoder_to_arrays(model.decoder))
    expected, x = whole.layers[0], whole.embed(tokens)
    projections = expected.prune(x, ratio, shape.intermediate_size, damping)
    return pruned, block_from_arrays(model.config, pruned.shape, arrays), expected, projections, x


def run_attention(model, block, x):
    x = jnp.asarray(x, jnp.float32)
    return np.asarray(
        jax.jit(lambda b, x, r: b.attention(b.input_norm(x), r))(block, x, model.decoder.rope_for(x.shape[1]))
    )


@pytest.mark.parametrize(("flavour", "ratio"), [*((flavour, 0.3) for flavour in FLAVOURS), ("ragged", 0.6)])
def test_fusion_equals_projections_in_the_full_size_module(flavour, ratio):
    model = make(flavour)
    pruned, block, expected, projections, x = prune_first_attention(model, ratio)
    shape = model.config.layers[0]
    assert list(pruned.heads) == projections.heads
    assert pruned.shape.num_attention_heads * pruned.shape.v_head_dim < shape.num_attention_heads * shape.v_head_dim
    half = shape.rotary_dim // 2
    dense_pairs = np.asarray(model.decoder.layers[0].attention.rope_pairs[...])
    pairs = [dense_pairs[kv][[c for c in channels if c < half]] for kv, channels in projections.channels.items()]
    assert np.asarray(pruned.arrays["rope_pairs"]).tolist() == np.asarray(pairs).tolist()

    # Also on tokens the statistics have not seen.
    for rows in (x, x[:, ::-1]):
        wanted = expected.attention(rows, projections)
        np.testing.assert_allclose(run_attention(model, block, rows), wanted, atol=2e-5 * np.abs(wanted).max())
    dense = expected.attention(x, expected.dense())
    bias = expected.w.get("attention.o_bias", 0)
    error = np.sum((expected.attention(x, projections) - dense) ** 2) / np.sum((dense - bias) ** 2)
    assert error > 1e-3
    assert pruned.relative_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("flavour", ["ragged", "phi"])
def test_nothing_removed_is_nothing_changed(flavour):
    model = make(flavour)
    pruned, block, expected, _, x = prune_first_attention(model, 0.0)
    assert pruned.shape == model.config.layers[0]
    wanted = expected.attention(x, expected.dense())
    np.testing.assert_allclose(run_attention(model, block, x), wanted, atol=2e-5 * np.abs(wanted).max())
    assert pruned.relative_error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dead", ["v_proj", "o_proj"])
def test_a_head_that_does_nothing_leaves_first(dead):
    model = make("mha")
    array = np.asarray(decoder_to_arrays(model.decoder)[f"layers.0.attention.{dead}"]).copy()
    array[(slice(None), 2) if dead == "v_proj" else 2] = 0
    model = with_arrays(model, **{f"layers__0__attention__{dead}": array})
    pruned, block, expected, projections, x = prune_first_attention(model, 0.25)
    assert pruned.heads == (0, 1, 3)
    wanted = expected.attention(x, projections)
    np.testing.assert_allclose(run_attention(model, block, x), wanted, atol=2e-5 * np.abs(wanted).max())
    assert pruned.shape.v_head_dim == 8
    assert pruned.relative_error < 1e-3


def test_a_module_that_is_dead_altogether():
    model = make("mha")
    zero = np.zeros_like(np.asarray(decoder_to_arrays(model.decoder)["layers.0.attention.v_proj"]))
    model = with_arrays(model, layers__0__attention__v_proj=zero)
    pruned, block, *_, x = prune_first_attention(model, 0.25)
    assert pruned.relative_error == 0
    assert not run_attention(model, block, x).any()


def test_constant_text():
    model = make("gqa")
    tokens = np.full((2, 12), 7, np.int32)
    pruned, block, expected, _, x = prune_first_attention(model, 0.3, tokens)
    wanted = expected.attention(x, expected.dense())
    # Every value row is the same: one direction carries everything, only damping stands in the way.
    np.testing.assert_allclose(run_attention(model, block, x), wanted, atol=0.01 * np.abs(wanted).max())
    assert pruned.relative_error < 1e-3
    assert all(np.isfinite(np.asarray(a)).all() for a in pruned.arrays.values())


@pytest.mark.parametrize("groups", [[[0], [1]], [[0, 1, 2], [3]]])
def test_effective_bases_lose_least_of_the_output(groups):
    rng = np.random.default_rng(0)
    to_kv = np.asarray([kv for kv, members in enumerate(groups) for _ in members])
    heads, v, width = len(to_kv), 8, 4
    y = rng.standard_normal((200, heads, v)) * np.exp(rng.standard_normal((1, heads, v)))
    o_proj = rng.standard_normal((heads, v, 16)) * np.exp(2 * rng.standard_normal((heads, v, 1)))

    def lost(bases):
        """Squared error of every head's share of the output, regressed on its projected channels."""
        errors = np.zeros(len(groups))
        for h, kv in enumerate(to_kv):
            z, target = y[:, h] @ bases[kv], y[:, h] @ o_proj[h]
            errors[kv] += np.square(target - z @ np.linalg.lstsq(z, target, rcond=None)[0]).sum()
        return errors

    with solver_precision():
        blocks = jnp.asarray(np.einsum("nhv,nhw->hvw", y, y))
        bases = np.asarray(effective_bases(blocks, jnp.asarray(o_proj), jnp.asarray(to_kv), len(groups), width))
        plain = np.asarray(value_bases_of(sum_groups(blocks, to_kv, len(groups)), width))
    np.testing.assert_allclose(bases.swapaxes(1, 2) @ bases, np.tile(np.eye(width), (len(groups), 1, 1)), atol=1e-10)
    assert (lost(bases) < 0.9 * lost(plain)).all()
    for kv, members in enumerate(groups):
        if len(members) == 1:  # nothing of this rank is better than the truncated SVD of the share itself
            share = y[:, members[0]] @ o_proj[members[0]]
            best = np.square(np.linalg.svd(share)[1][width:]).sum()
            assert lost(bases)[kv] == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("flavour", ["mha", "gqa", "biases"])
def test_the_output_metric_lowers_the_error_of_the_module(flavour):
    errors = {}
    for basis in ("activations", "outputs"):
        model = make(flavour)
        stream = ResidualStream.start(model, windows(), 2)
        shape, block = model.config.layers[0], model.decoder.layers[0]
        config = PruneConfig(value_basis=basis)
        layer = AttentionCalibration(0, block, shape, stream, config, model.config, (0, 10**9))
        errors[basis] = IntraSlice().prune_attention(layer, 0.4).relative_error
    assert errors["outputs"] < errors["activations"]


def test_unexplained_blocks_are_the_moments_of_residuals():
    y = np.random.default_rng(0).standard_normal((300, 12)) @ np.random.default_rng(1).standard_normal((12, 12))
    with solver_precision():
        blocks = np.asarray(unexplained_blocks(jnp.asarray(y.T @ y), 3, 0.0))
    for h in range(3):
        own, others = np.split(np.roll(y, -4 * h, 1), [4], 1)
        residual = own - others @ np.linalg.lstsq(others, own, rcond=None)[0]
        np.testing.assert_allclose(blocks[h], residual.T @ residual, rtol=1e-2, atol=1e-2 * np.abs(blocks[h]).max())
