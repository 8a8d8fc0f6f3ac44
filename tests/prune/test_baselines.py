"""The methods of the literature against plain numpy on the activations themselves."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.config import LayerShape, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune import elimination
from intraslice_jax.prune.baselines import heads, obs, slicegpt
from intraslice_jax.prune.biases import with_output_biases
from intraslice_jax.prune.linalg import solver_precision
from intraslice_jax.prune.methods import METHODS, create_method
from intraslice_jax.prune.pipeline import prune_model
from tests.prune import flavours
from tests.prune.reference import Model

BASELINES = [name for name in METHODS if name != "intraslice"]
WINDOWS = flavours.windows()


def prune(model, method, sparsity=0.4, **settings):
    return prune_model(model, WINDOWS, PruneConfig(sparsity, method=method, align=1, **settings))


def first_layer(model, pruned=None):
    """y [tokens, heads, v] of the dense first layer, and z [tokens, inner] behind the pruned attention."""
    reference = Model(model.config, decoder_to_arrays(model.decoder))
    layer, x = reference.layers[0], reference.embed(WINDOWS)
    y = layer.mixed(x, layer.dense())
    if pruned is not None:
        smaller = Model(pruned.config, decoder_to_arrays(pruned.decoder)).layers[0]
        after = x + smaller.attention(x, smaller.dense())
        z = layer.inner(x, after)
        return y.reshape(-1, *layer.w["attention.o_proj"].shape[:2]), z.reshape(-1, z.shape[-1])
    return y.reshape(-1, *layer.w["attention.o_proj"].shape[:2]), None


def weights(model, layer=0):
    prefix = f"layers.{layer}."
    arrays = decoder_to_arrays(model.decoder)
    return {k.removeprefix(prefix): np.asarray(a, np.float64) for k, a in arrays.items() if k.startswith(prefix)}


def share(shape, kept):
    """Removed fraction of the attention's weights, counted array by array."""

    def size(query, kv):
        return query * (shape.qk_head_dim + shape.v_head_dim) + kv * (shape.qk_head_dim + shape.v_head_dim)

    kv = len({shape.query_to_kv[h] for h in kept})
    return 1 - size(len(kept), kv) / size(shape.num_attention_heads, shape.num_key_value_heads)


def scores(method, shape, w, y, z):
    """Scores of heads and channels as the papers define them, from weights and activations."""
    o, down = w["attention.o_proj"], w["mlp.down_proj"]
    if method == "magnitude":
        to_kv, group = shape.query_to_kv, shape.group_sizes
        head = []
        for h, kv in enumerate(to_kv):
            own = np.sum(w["attention.q_proj"][:, h] ** 2) + np.sum(o[h] ** 2)
            shared = np.sum(w["attention.k_proj"][:, kv] ** 2) + np.sum(w["attention.v_proj"][:, kv] ** 2)
            head.append(np.sqrt(own + shared / group[kv]))
        columns = [w[f"mlp.{name}"] for name in ("gate_proj", "up_proj") if f"mlp.{name}" in w]
        return np.array(head), np.linalg.norm(np.concatenate([*columns, down.T]), axis=0)
    if method == "wanda_sp":
        head = [
            sum(np.linalg.norm(y[:, h, c]) * np.abs(o[h, c]).sum() for c in range(o.shape[1])) for h in range(len(o))
        ]
        return np.array(head), np.array([np.linalg.norm(z[:, j]) * np.abs(down[j]).sum() for j in range(len(down))])
    head = [sum(np.var(y[:, h, c]) * np.sum(o[h, c] ** 2) for c in range(o.shape[1])) for h in range(len(o))]
    return np.array(head), np.array([np.var(z[:, j]) * np.sum(down[j] ** 2) for j in range(len(down))])


@pytest.mark.parametrize("method", ["magnitude", "wanda_sp", "flap"])
@pytest.mark.parametrize("flavour", ["ragged", "biases", "phi"])
def test_units_with_the_highest_scores_stay_as_they_are(method, flavour):
    model = flavours.make(flavour)
    pruned = prune(model, method)
    w, small, shape = weights(model), weights(pruned), model.config.layers[0]
    y, z = first_layer(model, pruned)
    head, channel = scores(method, shape, w, y, z)

    order = np.argsort(head, kind="stable")
    sets = [sorted(order[n:].tolist()) for n in range(len(head))]
    best = min(sets, key=lambda kept: (round(abs(share(shape, kept) - 0.4), 12), -len(kept)))
    record = pruned.report["layers"][0]
    assert list(record["kept_heads"]) == best
    kv = sorted({shape.query_to_kv[h] for h in best})
    np.testing.assert_array_equal(small["attention.q_proj"], w["attention.q_proj"][:, best])
    np.testing.assert_array_equal(small["attention.k_proj"], w["attention.k_proj"][:, kv])
    np.testing.assert_array_equal(small["attention.v_proj"], w["attention.v_proj"][:, kv])
    np.testing.assert_array_equal(small["attention.o_proj"], w["attention.o_proj"][best])
    np.testing.assert_array_equal(small["attention.rope_pairs"], w["attention.rope_pairs"][kv])

    keep = record["intermediate_size"]
    kept = np.sort(np.argsort(-channel, kind="stable")[:keep])
    assert pruned.config.layers[0].intermediate_size == keep
    for name in ("gate_proj", "up_proj", "gate_bias", "up_bias"):
        if f"mlp.{name}" in w:
            np.testing.assert_array_equal(small[f"mlp.{name}"], w[f"mlp.{name}"][..., kept])
    np.testing.assert_array_equal(small["mlp.down_proj"], w["mlp.down_proj"][kept])

    lost_heads = [h for h in range(len(head)) if h not in best]
    lost = [j for j in range(len(channel)) if j not in kept]
    gone = np.einsum("nhv,hvd->nd", y[:, lost_heads], w["attention.o_proj"][lost_heads])
    gone_mlp = z[:, lost] @ w["mlp.down_proj"][lost]
    for name, missing, error in (
        ("attention.o_bias", gone, "attention_error"),
        ("mlp.down_bias", gone_mlp, "mlp_error"),
    ):
        shift = missing.mean(0) if method == "flap" and name in w else np.zeros(missing.shape[1])
        if name in w:
            np.testing.assert_allclose(small[name], w[name] + shift, rtol=1e-4, atol=1e-5)
        whole = (
            y.reshape(len(y), -1) @ w["attention.o_proj"].reshape(-1, 16) if "att" in name else z @ w["mlp.down_proj"]
        )
        expected = np.sum((missing - shift) ** 2) / np.sum(whole**2)
        assert record[error] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_flap_fills_the_biases_that_it_is_given():
    model = flavours.make("gqa")
    with_biases = prune(model, "flap", output_biases=True)
    assert with_biases.config.mlp_bias
    assert with_biases.config.attention_output_bias
    assert np.abs(weights(with_biases)["mlp.down_bias"]).max() > 0
    assert not weights(with_biases)["mlp.gate_bias"].any()
    without = prune(model, "flap")
    for error in ("attention_error", "mlp_error"):
        assert with_biases.report["layers"][0][error] < without.report["layers"][0][error]
    # The biases are parameters like all others.
    counted = sum(a.size for name, a in weights(with_biases).items() if name.startswith(("attention", "mlp")))
    counted -= weights(with_biases)["attention.rope_pairs"].size
    assert (
        with_biases.config.attention_parameters(with_biases.config.layers[0])
        + with_biases.config.mlp_parameters(with_biases.config.layers[0])
        == counted
    )
    assert with_biases.report["block_parameters"]["dense"] == model.config.block_parameters()


@pytest.mark.parametrize("flavour", ["gqa", "biases", "phi"])
def test_output_biases_change_nothing_by_themselves(flavour):
    model = flavours.make(flavour)
    biased = with_output_biases(model)
    tokens = jnp.asarray(WINDOWS)
    np.testing.assert_array_equal(np.asarray(model.decoder(tokens)), np.asarray(biased.decoder(tokens)))
    if flavour == "biases":
        assert biased.config == model.config


def brute_force(x, w, groups, damping, steps, noise=0.0):
    """Backward elimination: each time every remaining group is tried, all kept weights refitted by lstsq."""
    own = np.sum(x**2, 0)
    ridge = np.diag(np.sqrt(noise * own + damping * (1 + noise) * np.mean(own)))
    stacked = np.concatenate([x, ridge])
    kept = list(range(len(groups)))

    def fit(candidates):
        columns = [c for g in candidates for c in groups[g]]
        a = np.linalg.lstsq(stacked[:, columns], stacked @ w, rcond=None)[0]
        new = np.zeros_like(w)
        new[columns] = a
        return np.sum((stacked @ (new - w)) ** 2), new

    for _ in range(steps):
        kept = min(([h for h in kept if h != g] for g in kept), key=lambda candidates: fit(candidates)[0])
    return kept, fit(kept)[1]


def activations(rng, tokens, channels):
    mixing = rng.standard_normal((channels, channels)) * np.exp(rng.standard_normal(channels))
    return rng.standard_normal((tokens, channels)) @ mixing / np.sqrt(channels)


def moments(x):
    return GramMoments(jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(x.sum(0), jnp.float32))


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize(("channels", "count"), [(12, 5), (12, 11), (40, 33)])
def test_obs_on_channels_is_exact_backward_elimination(channels, count, noise):
    rng = np.random.default_rng(channels + count)
    x, w = activations(rng, 200, channels), rng.standard_normal((channels, 7))
    kept, expected = brute_force(x, w, [[j] for j in range(channels)], 0.01, count, noise)
    with solver_precision():
        inverse = elimination.inverse_moment(moments(x), len(x), 0.01, affine=False, noise=noise)
        left = elimination.eliminate_channels(inverse, jnp.asarray(w), jnp.asarray(count, jnp.int32))
        assert np.flatnonzero(np.asarray(left.stays)).tolist() == kept
        np.testing.assert_allclose(np.asarray(left.weights), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("query_to_kv", [(0, 1, 2, 3), (0, 0, 1, 1), (0, 0, 0, 1)])
def test_obs_on_heads_is_exact_backward_elimination(query_to_kv):
    rng = np.random.default_rng(4)
    x, w = activations(rng, 200, 12), rng.standard_normal((4, 3, 7))
    shape = LayerShape(query_to_kv, 8, 8, 3, 16)
    for ratio in (0.2, 0.45, 0.7, 0.99):
        with solver_precision():
            inverse = elimination.inverse_moment(moments(x), len(x), 0.01, affine=False)
            kept, new = obs.eliminate_heads(inverse, jnp.asarray(w), shape, ratio)
            new = np.asarray(new)
        groups = np.arange(12).reshape(4, 3).tolist()
        expected, fitted = brute_force(x, w.reshape(12, 7), groups, 0.01, 4 - len(kept))
        assert list(kept) == expected
        np.testing.assert_allclose(new.reshape(12, 7), fitted, rtol=1e-3, atol=1e-4)


def test_obs_of_channels_that_never_fire_removes_them_first():
    rng = np.random.default_rng(0)
    x, w = activations(rng, 100, 10), rng.standard_normal((10, 4))
    x[:, [2, 7]] = 0
    for damping in (0.0, 0.01):
        with solver_precision():
            inverse = elimination.inverse_moment(moments(x), len(x), damping, affine=False)
            left = elimination.eliminate_channels(inverse, jnp.asarray(w), jnp.asarray(2, jnp.int32))
            assert np.flatnonzero(~np.asarray(left.stays)).tolist() == [2, 7]
            silent = elimination.inverse_moment(moments(0 * x), len(x), damping, affine=True)
            left = elimination.eliminate_channels(silent, jnp.asarray(w), jnp.asarray(3, jnp.int32))
            assert int(left.stays.sum()) == 7
            assert np.isfinite(np.asarray(left.weights)).all()


@pytest.mark.parametrize("flavour", ["gqa", "biases"])
def test_obs_refits_what_stays(flavour):
    """The first layer's new projections are the damped least squares fit on what stays, with an offset if it can."""
    model = flavours.make(flavour)
    pruned = prune(model, "obs")
    w, small, record = weights(model), weights(pruned), pruned.report["layers"][0]
    y, z = first_layer(model, pruned)
    affine = flavour == "biases"
    down, kept = w["mlp.down_proj"], _columns(small["mlp.up_proj"], w["mlp.up_proj"])
    whole_o = w["attention.o_proj"].reshape(-1, 16)
    kept_o = [8 * h + c for h in record["kept_heads"] for c in range(8)]
    cases = (
        (z, down, kept, small["mlp.down_proj"], "mlp.down_bias", "mlp_error"),
        (y.reshape(len(y), -1), whole_o, kept_o, small["attention.o_proj"], "attention.o_bias", "attention_error"),
    )
    for x, before, columns, after, bias, error in cases:
        centre = x.mean(0) if affine else np.zeros(x.shape[1])
        ridge = np.sqrt(0.01 * np.mean(np.sum((x - centre) ** 2, 0))) * np.eye(x.shape[1])
        stacked = np.concatenate([x - centre, ridge])
        fitted = np.linalg.lstsq(stacked[:, columns], stacked @ before, rcond=None)[0]
        np.testing.assert_allclose(after.reshape(fitted.shape), fitted, rtol=1e-3, atol=1e-4)
        offset = centre @ before - centre[columns] @ fitted
        if affine:
            np.testing.assert_allclose(small[bias], w[bias] + offset, rtol=1e-3, atol=1e-4)
        expected = np.sum((x[:, columns] @ fitted + offset - x @ before) ** 2) / np.sum((x @ before) ** 2)
        assert record[error] == pytest.approx(expected, rel=1e-2, abs=1e-6)


def _columns(small, full):
    return [int(np.flatnonzero((full == column[:, None]).all(0))[0]) for column in small.T]


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("flavour", ["ragged", "phi"])
def test_the_budget_is_met_and_widths_are_what_the_ledger_says(method, flavour):
    model = flavours.make(flavour, layers=4)
    pruned = prune(model, method, 0.35)
    assert pruned.report["method"] == method
    assert pruned.report["removed_block_fraction"] == pytest.approx(0.35, abs=0.02)
    for record, shape in zip(pruned.report["layers"], pruned.config.layers, strict=True):
        assert record["intermediate_size"] == shape.intermediate_size
        assert len(record["kept_heads"]) == shape.num_attention_heads
        assert shape.qk_head_dim == model.config.layers[0].qk_head_dim
    assert np.isfinite(perplexity(pruned, WINDOWS).perplexity)


@pytest.mark.parametrize("method", BASELINES)
def test_nothing_removed_changes_nothing(method):
    model = flavours.make("biases")
    pruned, tokens = prune(model, method, 0.0), jnp.asarray(WINDOWS)
    assert pruned.config == model.config
    np.testing.assert_allclose(np.asarray(pruned.decoder(tokens)), np.asarray(model.decoder(tokens)), atol=1e-4)


def test_one_head_stays_whatever_is_asked():
    shape = LayerShape((0, 0, 1, 1), 8, 8, 8, 24)
    assert heads.best_heads(shape, np.array([1.0, 3.0, 4.0, 2.0]), 0.99) == (2,)
    assert heads.best_heads(shape, np.array([1.0, 3.0, 4.0, 2.0]), 0.0) == (0, 1, 2, 3)


def test_removed_share_counts_what_leaves():
    shape = LayerShape((0, 0, 0, 1, 2, 2), 6, 6, 4, 16)
    every = range(6)
    for kept in itertools.chain.from_iterable(itertools.combinations(every, n) for n in range(1, 7)):
        assert heads.removed_share(shape, kept) == pytest.approx(share(shape, kept))


def test_a_grouping_that_whole_heads_cannot_keep_is_refused():
    with pytest.raises(InputError, match=r"flap drops query heads one by one.*method intraslice"):
        prune(flavours.make("gqa"), "flap", grouping="uniform")
    assert prune(flavours.make("mha"), "flap", grouping="uniform").config.layers[0].num_key_value_groups == 1


def test_weights_in_half_precision_stay_so():
    pruned = prune(flavours.make("gqa", dtype=jnp.bfloat16), "obs")
    assert {str(a.dtype) for a in decoder_to_arrays(pruned.decoder).values()} == {"bfloat16", "int32"}


def test_registry():
    for name, kind in METHODS.items():
        assert isinstance(create_method(name), kind)
    with pytest.raises(InputError, match="no method 'wanda'; did you mean 'wanda_sp'"):
        create_method("wanda")
    with pytest.raises(InputError, match="known are flap, intraslice, magnitude, obs, wanda_sp"):
        create_method("xyz")
    with pytest.raises(InputError, match="intraslice compare"):
        create_method("slicegpt")


# SliceGPT


@pytest.mark.parametrize("flavour", ["ragged", "biases", "window"])
def test_slicegpt_without_slicing_is_the_dense_model(flavour):
    model, tokens = flavours.make(flavour), jnp.asarray(WINDOWS)
    sliced = slicegpt.slice_model(model, WINDOWS, 16)
    np.testing.assert_allclose(np.asarray(sliced.decoder(tokens)), np.asarray(model.decoder(tokens)), atol=1e-3)
    assert perplexity(sliced, WINDOWS).perplexity == pytest.approx(perplexity(model, WINDOWS).perplexity, rel=1e-3)


def test_slicegpt_against_projections_of_the_full_stream():
    """Cutting the stream is projecting it, with all weights as they were: bases from a float64 run of the layers."""
    model, width = flavours.make("biases", tie_word_embeddings=True), 11
    reference = Model(model.config, decoder_to_arrays(model.decoder))

    def cut(x, basis_of):
        flat = basis_of.reshape(-1, 16)
        basis = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :width]
        return x @ basis @ basis.T

    x = reference.embed(WINDOWS)
    for layer in reference.layers:
        x = cut(x, x)
        after = x + layer.attention(x, layer.dense())
        after = cut(after, after)
        x = after + layer.mlp(layer.inner(x, after), layer.dense())
    logits = reference.top.norm("norm", x) @ reference.top.w["embed_tokens"].T
    sliced = slicegpt.slice_model(model, WINDOWS, width, batch_size=4)
    np.testing.assert_allclose(np.asarray(sliced.decoder(jnp.asarray(WINDOWS))), logits, atol=2e-3)


@pytest.mark.parametrize("flavour", ["gqa", "biases"])
def test_slicegpt_counts_its_shortcuts(flavour):
    model = flavours.make(flavour)
    config, width = model.config, 10
    pruned = slicegpt.slice_model(model, WINDOWS, width)
    by_hand = 0
    for i, shape in enumerate(config.layers):
        out = width if i + 1 < config.num_layers else 16
        q, kv, inner = shape.num_attention_heads * 8, shape.num_key_value_heads * 8, shape.intermediate_size
        by_hand += width * (q + 2 * kv) + q * width + 2 * width * inner + inner * out  # modules
        by_hand += width * width + width * out  # shortcuts
        if flavour == "biases":
            by_hand += q + 2 * kv + width + 2 * inner + out
    assert pruned.report["block_parameters"] == {"dense": config.block_parameters(), "pruned": by_hand}
    assert slicegpt.block_parameters(config, width) == by_hand
    assert pruned.report["removed_block_fraction"] == 1 - by_hand / config.block_parameters()
    # The embedding is cut; the head is whole, and of its own even where it was tied.
    outside = pruned.report["total_parameters"]["pruned"] - by_hand
    assert outside == flavours.VOCAB * (width + 16) + 16 + 2 * config.num_layers * width


def test_slicegpt_chooses_the_width_that_meets_the_request():
    config = dataclasses.replace(flavours.make("gqa").config, hidden_size=576)
    for sparsity in (0.0, 0.2, 0.5, 0.9):
        width = slicegpt.width_for(config, sparsity)
        removed = [
            1 - slicegpt.block_parameters(config, w) / config.block_parameters() for w in (width - 1, width, width + 1)
        ]
        assert abs(removed[1] - sparsity) == min(abs(r - sparsity) for r in removed)
    pruned = slicegpt.prune_slicegpt(flavours.make("gqa"), WINDOWS, PruneConfig(0.5))
    assert pruned.report["removed_block_fraction"] == pytest.approx(0.5, abs=0.06)


def test_slicegpt_refuses_what_it_cannot_rotate():
    with pytest.raises(InputError, match="phi has parallel blocks"):
        slicegpt.slice_model(flavours.make("phi"), WINDOWS, 8)
    with pytest.raises(InputError, match="LayerNorm"):
        slicegpt.check_family(dataclasses.replace(flavours.make("gqa").config, norm="layer"))
    with pytest.raises(InputError, match="from 1 to 16, found 17"):
        slicegpt.slice_model(flavours.make("gqa"), WINDOWS, 17)


def test_slicegpt_in_half_precision():
    model = flavours.make("gqa", dtype=jnp.bfloat16)
    sliced = slicegpt.slice_model(model, WINDOWS, 16)
    floats = {a.dtype for a in jax.tree.leaves(sliced.decoder) if jnp.issubdtype(a.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(perplexity(sliced, WINDOWS).perplexity)
