"""What only a GPU shows; skipped elsewhere. Run with `JAX_PLATFORMS=cuda,cpu pytest tests/test_gpu.py`."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import intraslice_jax as isl
from intraslice_jax.calibrate.statistics import GramMoments, add_mlp, zeros_like_moments
from intraslice_jax.config import PRESETS
from intraslice_jax.models import attention
from intraslice_jax.prune.pipeline import prune_model
from tests.prune.flavours import make, windows

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")

GROUPS = {"even": (0, 0, 1, 1), "ragged": (0, 1, 1, 1, 2, 2)}


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("groups", GROUPS)
def test_cudnn_attention_and_its_gradient(groups, window):
    to_kv, rng = GROUPS[groups], np.random.default_rng(0)
    assert attention.has_fused_kernel()
    shapes = ((len(to_kv), 52), (max(to_kv) + 1, 52), (max(to_kv) + 1, 44))
    given = tuple(jnp.asarray(rng.standard_normal((2, 384, *shape)), jnp.bfloat16) for shape in shapes)

    @jax.jit
    def attend(*given):
        return attention.attend_causally(*given, to_kv, 0.125, window)

    found, back = jax.vjp(attend, *given)
    with jax.default_matmul_precision("highest"):
        expected, exact_back = jax.vjp(attend, *(a.astype(jnp.float32) for a in given))  # products, in float32
    close(found, expected, 0.01)
    cotangent = jnp.asarray(rng.standard_normal(found.shape), jnp.bfloat16)
    for ours, theirs in zip(back(cotangent), exact_back(cotangent.astype(jnp.float32)), strict=True):
        close(ours, theirs, 0.02)


def test_moments_are_taken_in_full_float32():
    block = make("gqa").decoder.layers[0]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 512, 16)), jnp.float32)
    zero = zeros_like_moments(GramMoments, gram=(24, 24), total=(24,))
    found, inner = add_mlp(zero, block.post_norm, block.mlp, x)
    inner = np.asarray(inner, np.float64).reshape(-1, 24)
    exact = inner.T @ inner
    assert np.linalg.norm(np.asarray(found.gram) - exact) < 2e-6 * np.linalg.norm(exact)  # TF32 leaves about 3e-4


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_gpu_prunes_like_a_cpu(name, tmp_path):
    """Another choice of heads, pairs or channels would give other logits."""
    here = pruned(name)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.test_gpu", name, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parent.parent)
    there = isl.restore(tmp_path / "there")
    assert here.config == there.config
    tokens = jnp.asarray(windows(2))
    with jax.default_matmul_precision("highest"):
        ours, theirs = (np.asarray(model.decoder(tokens)) for model in (here, there))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def pruned(name):
    config = dataclasses.replace(PRESETS[name], align=1)
    return prune_model(make("gqa", layers=3), windows(), config)


def close(found, expected, tolerance):
    found = found.astype(jnp.float32)
    assert jnp.linalg.norm(found - expected) < tolerance * jnp.linalg.norm(expected)


if __name__ == "__main__":
    isl.save(pruned(sys.argv[1]), sys.argv[2])
