"""Attention head by head, as it runs on one CPU, against the products over all heads that run elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.models import attention
from intraslice_jax.models.attention_by_head import attend_by_head

GROUPS = {"even": (0, 0, 1, 1), "ragged": (0, 1, 1, 1, 2, 2), "own": (0, 1, 2)}


def inputs(query_to_kv, seq, dtype=jnp.float32, qk=6, v=5):
    rng = np.random.default_rng(0)
    shapes = ((len(query_to_kv), qk), (max(query_to_kv) + 1, qk), (max(query_to_kv) + 1, v))
    return tuple(jnp.asarray(rng.standard_normal((2, seq, *shape)), dtype) for shape in shapes)


@pytest.fixture
def elsewhere(monkeypatch):
    """`attend_causally` as on accelerators and meshes."""
    monkeypatch.setattr(attention, "one_cpu", lambda: False)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("qk", "v"), [(6, 5), (16, 32)])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("groups", GROUPS)
def test_outputs_and_gradients_are_the_same(groups, window, qk, v):
    to_kv = GROUPS[groups]
    given = inputs(to_kv, 37, qk=qk, v=v)

    def whole(*given):
        return attention.attend_causally(*given, to_kv, 0.3, window)

    def by_head(*given):
        return attend_by_head(*given, to_kv, 0.3, window, 8)

    expected, back = jax.vjp(whole, *given)
    found, found_back = jax.vjp(by_head, *given)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape), jnp.float32)
    for ours, theirs in zip(found_back(cotangent), back(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.usefixtures("elsewhere")
def test_bfloat16():
    given = inputs(GROUPS["ragged"], 37, jnp.bfloat16)
    exact = attend_by_head(*(a.astype(jnp.float32) for a in given), GROUPS["ragged"], 0.3, None, 8)
    found = attend_by_head(*given, GROUPS["ragged"], 0.3, None, 8)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.05)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_fused_call_means_the_same(groups, window):
    given = inputs(GROUPS[groups], 37)
    expected = attention.attend_causally(*given, GROUPS[groups], 0.3, window)
    found = attention.attend_fused(*given, GROUPS[groups], 0.3, window, "xla")
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_the_fused_kernel_takes_what_it_can(monkeypatch):
    def allowed(qk=52, v=56, dtype=jnp.bfloat16, seq=4):
        return attention.fused_kernel(*(jnp.zeros((1, seq, 3, width), dtype) for width in (qk, v)))

    assert not allowed()  # this is a CPU
    monkeypatch.setattr(attention, "has_fused_kernel", lambda: True)
    assert allowed()
    assert not allowed(dtype=jnp.float32)
    assert not allowed(qk=132)
    assert not allowed(v=132)
    assert not allowed(seq=3)


def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch):
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")  # which it is not: cuDNN fails
    monkeypatch.setattr(attention.jax, "device_count", lambda: 1)
    attention.has_fused_kernel.cache_clear()
    try:
        assert not attention.has_fused_kernel()
    finally:
        attention.has_fused_kernel.cache_clear()
