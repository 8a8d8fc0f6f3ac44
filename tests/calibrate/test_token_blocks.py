"""Functions of tokens block by block: the same values and gradients as at once, and blocks no larger than asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.calibrate import token_blocks
from intraslice_jax.calibrate.gradients import group_gradients
from intraslice_jax.calibrate.token_blocks import by_token_blocks
from tests.prune.flavours import make

RNG = np.random.default_rng(0)
X, MASK = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((3, 24, 5), (3, 7)))
WEIGHT = jnp.asarray(RNG.standard_normal((5, 7)), jnp.float32)


def masked(x, mask):
    return jnp.tanh(jnp.einsum("btd,de->bte", x, WEIGHT)) * mask[:, None]


@pytest.mark.parametrize(("most", "shape"), [(8, (1, 8, 5)), (7, (1, 6, 5)), (5, (1, 4, 5)), (30, (1, 24, 5))])
def test_values_and_gradients_are_those_of_the_whole(most, shape):
    seen = []

    def watched(x, mask):
        seen.append(x.shape)
        return masked(x, mask)

    def loss(function):
        return lambda x, mask: jnp.sum(jnp.sin(function(x, mask)))

    found = by_token_blocks(watched, X, MASK, most=most)
    assert set(seen) == {shape}
    np.testing.assert_allclose(found, masked(X, MASK), rtol=1e-5, atol=1e-6)
    ours = jax.grad(loss(lambda x, mask: by_token_blocks(masked, x, mask, most=most)), (0, 1))(X, MASK)
    for one, plain in zip(ours, jax.grad(loss(masked), (0, 1))(X, MASK), strict=True):
        np.testing.assert_allclose(one, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("x", "most"), [(X[:, :23], 12), (X[:1], 12), (X, 1000)])
def test_what_cannot_or_need_not_be_cut_stays_whole(x, most):
    seen = []
    by_token_blocks(lambda x: seen.append(x.shape) or x, x, most=most)
    assert seen == [x.shape]


def test_mask_gradients_in_blocks_are_those_at_once(monkeypatch):
    model = make("gqa", max_position_embeddings=512)
    windows = RNG.integers(0, 32, (4, 512)).astype(np.int32)
    both = list(group_gradients(model, windows, group=4, batch_size=4))
    jax.clear_caches()
    monkeypatch.setattr(token_blocks, "one_cpu", lambda: False)
    plain = list(group_gradients(model, windows, group=4, batch_size=4))
    jax.clear_caches()
    for a, b in zip(both[0].mlp + both[0].attention, plain[0].mlp + plain[0].attention, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
