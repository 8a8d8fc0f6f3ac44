import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.prune import attention, pairs
from intraslice_jax.prune.baselines import obs
from intraslice_jax.prune.compensation import Compensation, Sums, missed_squares, relative_error, ridge
from intraslice_jax.prune.linalg import (
    centred,
    damped,
    eigh_descending,
    solve_gram,
    solver_name,
    solver_precision,
    to_solver,
)
from tests.prune import reference

TOKENS, INPUTS, TARGETS = 40, 7, 9


@pytest.fixture(autouse=True)
def _float64():
    with solver_precision():
        yield


def activations(seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((TOKENS, INPUTS)) * np.exp(rng.standard_normal(INPUTS)) + offset
    return x, x @ rng.standard_normal((INPUTS, TARGETS)) + rng.standard_normal((TOKENS, TARGETS)) + offset


def moments(x, y):
    sums = Sums(jnp.asarray(x.sum(0)), jnp.asarray(y.sum(0)), len(x))
    return jnp.asarray(x.T @ x), jnp.asarray(x.T @ y), sums


@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("affine", [False, True])
def test_ridge_is_least_squares_with_damping_rows(damping, affine):
    x, y = activations(offset=2.0)
    gram, cross, sums = moments(x, y)
    fit = ridge(gram, cross, damping, sums if affine else None)
    a, offset = reference.ridge(x, y, damping, affine)
    np.testing.assert_allclose(np.asarray(fit.weights), a, rtol=1e-9, atol=1e-11)
    assert not fit.indefinite
    if affine:
        assert fit.offset is not None
        np.testing.assert_allclose(np.asarray(fit.offset), offset, rtol=1e-9, atol=1e-11)
    else:
        assert fit.offset is None


@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("affine", [False, True])
def test_missed_squares_are_those_of_the_residual(damping, affine):
    x, y = activations(offset=2.0)
    x[:, 3] *= damping > 0  # a dead channel makes the Gram matrix singular: the eigendecomposition solves it
    gram, cross, sums = moments(x, y)
    about = sums if affine else None
    fit = ridge(gram, cross, damping, about)
    assert bool(fit.indefinite) == (damping == 0)
    residual = x @ np.asarray(fit.weights) + (0 if fit.offset is None else np.asarray(fit.offset)) - y
    found = missed_squares(fit, gram, cross, jnp.asarray(np.sum(y**2)), damping, about)
    assert found == pytest.approx(np.sum(residual**2), rel=1e-8)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_relative_error_is_that_of_the_outputs(affine, seed):
    x, y = activations(offset=1.0)
    gram, cross, sums = moments(x, y)
    fit = ridge(gram, cross, 0.01, sums if affine else None)
    x, y = activations(seed, offset=1.0)  # seed 1: on tokens that the map was not fitted on
    gram, cross, sums = moments(x, y)
    output = np.random.default_rng(3).standard_normal((TARGETS, 5))
    offset = 0 if fit.offset is None else np.asarray(fit.offset)
    residual = (x @ np.asarray(fit.weights) + offset - y) @ output
    expected = np.sum(residual**2) / np.sum((y @ output) ** 2)
    args = gram, cross, jnp.asarray(y.T @ y), jnp.asarray(output)
    assert expected > 0.001
    assert relative_error(fit, *args, sums if affine else None) == pytest.approx(expected, rel=1e-9)


def test_relative_error_of_the_identity_and_of_nothing():
    x, _ = activations()
    gram = jnp.asarray(x.T @ x)
    output = jnp.asarray(np.random.default_rng(3).standard_normal((INPUTS, 5)))
    same, nothing = (Compensation(w, None, jnp.asarray(False)) for w in (jnp.eye(INPUTS), jnp.zeros((INPUTS, INPUTS))))
    assert relative_error(same, gram, gram, gram, output) == pytest.approx(0, abs=1e-14)
    assert relative_error(nothing, gram, gram, gram, output) == pytest.approx(1)
    # Outputs that are zero are met exactly by zero.
    assert relative_error(nothing, gram, gram, gram, jnp.zeros((INPUTS, 5))) == 0


def test_a_singular_gram_gives_the_minimum_norm_solution():
    x, y = activations()
    x[:, 3] = 0  # a dead channel: the Gram matrix has a zero row
    weights, indefinite = solve_gram(jnp.asarray(x.T @ x), jnp.asarray(x.T @ y))
    assert solver_name(indefinite) == "eigh"
    np.testing.assert_allclose(np.asarray(weights), np.linalg.lstsq(x, y, rcond=None)[0], rtol=1e-8, atol=1e-10)


def test_a_gram_that_rounding_made_indefinite_still_fits():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, 3)) @ rng.standard_normal((3, INPUTS))  # rank 3 of 7
    y = x @ rng.standard_normal((INPUTS, TARGETS))
    noise = rng.standard_normal((INPUTS, INPUTS))
    gram = x.T @ x - 1e-12 * (noise @ noise.T)
    assert np.linalg.eigvalsh(gram)[0] < -1e-13
    weights, indefinite = solve_gram(jnp.asarray(gram), jnp.asarray(x.T @ y))
    assert solver_name(indefinite) == "eigh"
    np.testing.assert_allclose(x @ np.asarray(weights), y, atol=1e-6)
    # With damping it is an ordinary problem again.
    assert not ridge(jnp.asarray(gram), jnp.asarray(x.T @ y), 0.01).indefinite


def test_nothing_at_all_is_mapped_to_nothing():
    fit = ridge(jnp.zeros((4, 4)), jnp.zeros((4, 6)), 0.01)
    assert fit.indefinite
    assert not np.asarray(fit.weights).any()


def test_damped_symmetrises_and_adds_to_the_diagonal():
    gram = np.random.default_rng(0).standard_normal((5, 5)) + 4 * np.eye(5)
    expected = (gram + gram.T) / 2 + 0.1 * np.diag(gram).mean() * np.eye(5)
    np.testing.assert_allclose(np.asarray(damped(jnp.asarray(gram), 0.1)), expected, rtol=1e-14)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_eigenvalues_descend_and_vectors_belong_to_them(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 4, 6))  # rank 4 of 6
    grams = x.swapaxes(1, 2) @ x
    values, vectors = (np.asarray(a) for a in eigh_descending(jnp.asarray(grams)))
    assert (values >= 0).all()
    assert (np.diff(values, axis=1) <= 0).all()
    np.testing.assert_allclose(vectors.swapaxes(1, 2) @ vectors, np.tile(np.eye(6), (3, 1, 1)), atol=1e-12)
    np.testing.assert_allclose((vectors * values[:, None]) @ vectors.swapaxes(1, 2), grams, atol=1e-11)


def test_centred_is_the_moment_about_the_mean():
    x, y = activations(offset=3.0)
    gram, cross, sums = moments(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    np.testing.assert_allclose(np.asarray(centred(gram, sums.inputs, sums.inputs, TOKENS)), x.T @ x, atol=1e-9)
    np.testing.assert_allclose(np.asarray(centred(cross, sums.inputs, sums.targets, TOKENS)), x.T @ y, atol=1e-9)


def test_weights_of_any_dtype_are_solved_in_float64():
    values = np.asarray([0.1, -3, 1e-30], np.float32)
    low = jnp.asarray(values).astype(jnp.bfloat16)
    for array in (low, values):
        assert to_solver(array).dtype == jnp.float64
        assert (np.asarray(to_solver(array)) == np.asarray(array).astype(np.float64)).all()


def _shapes(*shapes):
    return [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes]


INDICES = jax.ShapeDtypeStruct((4,), jnp.int64)
BATCHED = {
    "eigh_descending": (eigh_descending, _shapes((4, 6, 6))),
    "product_bases": (partial(attention.product_bases, width=3), _shapes((4, 6, 6), (4, 6, 6))),
    "unexplained_blocks": (partial(attention.unexplained_blocks, heads=4, damping=0.1), _shapes((24, 24))),
    "effective_bases": (
        partial(attention.effective_bases, kv_heads=2, width=3),
        [*_shapes((4, 6, 6), (4, 6, 9)), INDICES],
    ),
    "eliminate_pairs": (
        partial(pairs.eliminate_pairs, kv_heads=2, kept=2, damping=0.1),
        [*_shapes((4, 6, 6)), INDICES],
    ),
    "obs": (obs._head_errors, [*_shapes((4, 6, 4, 6), (4, 6, 9)), jax.ShapeDtypeStruct((4,), jnp.bool_)]),
}


@pytest.mark.parametrize("name", BATCHED)
def test_lapack_is_not_called_on_batches(name):
    """Two such calls at once wait for each other for ever on two cores (`linalg.each`)."""
    function, arguments = BATCHED[name]
    text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    results = [line.partition("custom-call(")[0] for line in text.splitlines() if '"lapack_' in line]
    assert results
    for dims in re.findall(r"f64\[([\d,]*)\]", " ".join(results)):
        assert dims.count(",") <= 1, results
