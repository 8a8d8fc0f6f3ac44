import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.config import PruneConfig
from intraslice_jax.models.decoder import block_from_arrays, decoder_to_arrays
from intraslice_jax.prune.calibration import AttentionCalibration, ResidualStream
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.linalg import solver_precision
from intraslice_jax.prune.pairs import contribution_gram, eliminate_pairs
from intraslice_jax.prune.pipeline import prune_model
from tests.prune.flavours import make, windows

PAIRS = 4


@pytest.fixture(autouse=True)
def _float64():
    with solver_precision():
        yield


def queries_and_keys(seed=0, positions=30):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal((2, 2 * PAIRS)))
    q, k = (rng.standard_normal((positions, 2 * PAIRS)) * s @ rng.standard_normal((2 * PAIRS,) * 2) for s in spread)
    return q, k - k.mean(0)


def contributions(q, k):
    """x and y of every pair for all pairs of positions: [positions^2, 2 * pairs]."""
    q, k = (a.reshape(-1, 2, PAIRS) for a in (q, k))
    turned = np.stack([-q[:, 1], q[:, 0]], 1)
    x, y = (np.einsum("tap,sap->tsp", a, k) for a in (q, turned))
    return np.concatenate([x, y], -1).reshape(-1, 2 * PAIRS)


def gram_of(q, k):
    return contribution_gram(jnp.asarray(q.T @ q)[None], jnp.asarray(k.T @ k)[None])


def test_contributions_follow_from_the_moments_of_queries_and_keys():
    q, k = queries_and_keys()
    both = contributions(q, k)
    np.testing.assert_allclose(np.asarray(gram_of(q, k))[0], both.T @ both, rtol=1e-9, atol=1e-6)


def test_the_logits_are_regressed_on_what_stays():
    q, k = queries_and_keys()
    both = contributions(q, k)
    logits = both[:, :PAIRS].sum(1)
    found = eliminate_pairs(gram_of(q, k), jnp.zeros(1, int), 1, PAIRS - 1, 0.0)

    def fit(pairs):
        columns = both[:, [*pairs, *(p + PAIRS for p in pairs)]]
        weights = np.linalg.lstsq(columns, logits, rcond=None)[0]
        return np.square(columns @ weights - logits).sum(), weights

    best = min(itertools.combinations(range(PAIRS), PAIRS - 1), key=lambda pairs: fit(pairs)[0])
    assert tuple(np.asarray(found.pairs)[0]) == best
    weights = np.concatenate([np.asarray(found.scale)[0], np.asarray(found.turn)[0]])
    np.testing.assert_allclose(weights, fit(best)[1], rtol=1e-3, atol=1e-4)  # 1e-6 of damping is the least


def test_heads_of_a_group_keep_the_same_pairs_and_groups_are_apart():
    data = [queries_and_keys(seed) for seed in range(3)]
    grams = jnp.concatenate([gram_of(q, k) for q, k in data])
    together = eliminate_pairs(grams, jnp.asarray([0, 0, 1]), 2, 2, 0.01)
    alone = eliminate_pairs(grams[2:], jnp.asarray([0]), 1, 2, 0.01)
    assert together.pairs.shape == (2, 2)
    assert together.scale.shape == together.turn.shape == (3, 2)
    np.testing.assert_array_equal(np.asarray(together.pairs)[1], np.asarray(alone.pairs)[0])
    np.testing.assert_allclose(np.asarray(together.turn)[2], np.asarray(alone.turn)[0], rtol=1e-9)


def test_all_pairs_stay_as_they_are():
    found = eliminate_pairs(gram_of(*queries_and_keys()), jnp.zeros(1, int), 1, PAIRS, 0.01)
    np.testing.assert_array_equal(np.asarray(found.pairs), [np.arange(PAIRS)])
    np.testing.assert_array_equal(np.asarray(found.scale), 1)
    np.testing.assert_array_equal(np.asarray(found.turn), 0)


@pytest.mark.parametrize("flavour", ["mha", "ragged", "partial", "biases"])
def test_turned_pairs_fold_into_the_query_projection(flavour):
    """The pruned block is the block that the error was computed for: turning commutes with RoPE."""
    with solver_precision():
        model, tokens = make(flavour), windows(6)
        config = PruneConfig(0.4, pair_selection="logits")
        stream = ResidualStream.start(model, tokens, 6)
        shape, block = model.config.layers[0], model.decoder.layers[0]
        layer = AttentionCalibration(0, block, shape, stream, config, model.config, (0, 10**9))
        pruned = IntraSlice().prune_attention(layer, 0.4)
        arrays = decoder_to_arrays(block)
        arrays = arrays | {
            f"attention.{n}": np.asarray(a).astype(arrays[f"attention.{n}"].dtype) for n, a in pruned.arrays.items()
        }
        small = block_from_arrays(model.config, pruned.shape, arrays)
        x = stream.batches[0]
        before, after = (np.asarray(b.attention(b.input_norm(x), stream.rope)) for b in (block, small))
    bias = np.asarray(arrays["attention.o_bias"]) * 0 if "attention.o_bias" in arrays else 0
    if flavour != "biases":  # the error is relative to the output without its bias
        error = np.square(after - before).sum() / np.square(before - bias).sum()
        assert error == pytest.approx(pruned.relative_error, rel=2e-2)
    assert np.square(after - before).sum() < np.square(before).sum()


def test_joint_selection_lowers_the_error_of_the_attention():
    model, tokens = make("mha", layers=1), windows(8)
    errors = [
        prune_model(model, tokens, PruneConfig(0.4, align=2, pair_selection=name)).report["layers"][0][
            "attention_error"
        ]
        for name in ("products", "logits")
    ]
    assert errors[1] < errors[0]
