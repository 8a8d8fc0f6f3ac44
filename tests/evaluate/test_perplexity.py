import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.evaluate.perplexity import automatic_batch, perplexity
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Decoder, decoder_from_arrays, decoder_to_arrays, run_block
from intraslice_jax.models.head import CHUNK, token_nll
from intraslice_jax.parallel.batches import even_batch

LAYERS = (LayerShape((0, 0, 1), 8, 8, 6, 24), LayerShape((0, 1), 4, 4, 5, 10))


def make(seed=0, **changes) -> LanguageModel:
    config = ModelConfig("llama", 61, 16, 8, 8, LAYERS, **changes)
    decoder = Decoder(config, rngs=nnx.Rngs(seed))
    arrays = {
        name: array * 20 if array.ndim > 1 and array.dtype == jnp.float32 else array
        for name, array in decoder_to_arrays(decoder).items()
    }
    return LanguageModel(config, decoder_from_arrays(config, arrays), None, "tiny")


def windows(count, length, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, (count, length), dtype=np.int32)


def reference_nll(model, tokens) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model.decoder(jnp.asarray(tokens)), np.float64)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_softmax, tokens[:, 1:, None], -1)[..., 0]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"lm_head_bias": True}])
def test_token_nll_is_the_log_softmax_across_chunks(changes):
    model = make(**changes)
    if model.config.lm_head_bias:
        arrays = decoder_to_arrays(model.decoder) | {"lm_head_bias": jnp.linspace(-2, 2, 61)}
        model = dataclasses.replace(model, decoder=decoder_from_arrays(model.config, arrays))
    tokens = windows(3, 150)
    assert 3 * 149 % CHUNK
    nll = token_nll(model.decoder, model.decoder.hidden_states(jnp.asarray(tokens))[:, :-1], jnp.asarray(tokens)[:, 1:])
    assert nll.dtype == jnp.float32
    expected = reference_nll(model, tokens)
    assert expected.std() > 0.5  # the losses differ, so a mix-up would show
    np.testing.assert_allclose(np.asarray(nll), expected, atol=2e-5)


def test_token_nll_has_the_gradient_of_the_plain_loss():
    model, tokens = make(), jnp.asarray(windows(2, 140))
    hidden = model.decoder.hidden_states(tokens)[:, :-1]

    def plain(h):
        logits = model.decoder.logits(h)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).sum()

    found = jax.grad(lambda h: token_nll(model.decoder, h, tokens[:, 1:]).sum())(hidden)
    np.testing.assert_allclose(np.asarray(found), np.asarray(jax.grad(plain)(hidden)), atol=1e-4)


@pytest.mark.parametrize("batch_size", [0, 1, 2, 3, 5, 9])
def test_perplexity_is_exp_of_the_mean_over_all_tokens(batch_size):
    model, tokens = make(), windows(5, 32)
    done = []
    result = perplexity(model, tokens, batch_size, lambda *progress: done.append(progress))
    mean = reference_nll(model, tokens).mean()
    assert result.mean_nll == pytest.approx(mean, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert (result.evaluated_tokens, result.sequence_length) == (5 * 31, 32)
    assert result.seconds > 0
    assert done[-1] == (5, 5)


@pytest.mark.parametrize(
    ("length", "bands"),
    [
        (2, {"1-1": (0, 1)}),
        (5, {"1-3": (0, 3), "4-4": (3, 4)}),
        (70, {"1-3": (0, 3), "4-15": (3, 15), "16-63": (15, 63), "64-69": (63, 69)}),
    ],
)
def test_losses_by_position_are_means_over_the_tokens_with_so_many_before_them(length, bands):
    model, tokens = make(), windows(3, length)
    found = perplexity(model, tokens, batch_size=2).loss_by_position
    nll = reference_nll(model, tokens).reshape(3, length - 1)
    assert list(found) == list(bands)
    for band, (start, end) in bands.items():
        assert found[band] == pytest.approx(nll[:, start:end].mean(), abs=1e-5)


def test_a_remainder_does_not_recompile():
    model = make()
    before = run_block._cache_size()
    perplexity(model, windows(7, 21), batch_size=3)
    assert run_block._cache_size() - before == len(LAYERS)


def test_bfloat16_agrees_within_its_rounding():
    model = make()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, model.decoder)
    tokens = windows(2, 32)
    found = perplexity(dataclasses.replace(model, decoder=half), tokens).mean_nll
    assert found == pytest.approx(perplexity(model, tokens).mean_nll, rel=0.05)


def test_batches_fit_the_budget_and_are_even():
    config = make().config
    assert automatic_batch(config, 64) > automatic_batch(config, 2048) >= 1
    assert automatic_batch(config, 64, memory_budget=1) == 1
    assert [even_batch(10, most) for most in (1, 4, 6, 10, 99)] == [1, 4, 5, 10, 10]
    assert [even_batch(16, most) for most in (3, 5, 7)] == [2, 4, 4]  # without copies
    assert [even_batch(17, 8), even_batch(3, 8, 2), even_batch(5, 1, 4)] == [6, 4, 4]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("embed_tokens", "embedding"),
        ("layers.1.attention.v_proj", "layer 1, attention"),
        ("layers.0.mlp.down_proj", "layer 0, MLP"),
        ("norm.weight", "final norm"),
        ("lm_head", "head"),
    ],
)
def test_a_nan_is_traced_to_its_layer(path, message):
    model = make()
    arrays = decoder_to_arrays(model.decoder)
    arrays[path] = arrays[path].at[(0,) * arrays[path].ndim].set(jnp.nan)
    model = dataclasses.replace(model, decoder=decoder_from_arrays(model.config, arrays))
    with pytest.raises(RunError, match=message):
        perplexity(model, np.zeros((1, 8), np.int32))


@pytest.mark.parametrize(
    ("tokens", "batch_size", "message"),
    [
        (np.zeros((0, 8), np.int32), 0, "found 0 windows of 8"),
        (np.zeros((2, 1), np.int32), 0, "found 2 windows of 1"),
        (np.full((1, 4), 61, np.int32), 0, "token 61, the model's vocabulary has 61"),
        (np.full((1, 4), -1, np.int32), 0, "token -1"),
        (np.zeros((1, 4), np.int32), -1, "batch_size must be 0"),
    ],
)
def test_bad_input(tokens, batch_size, message):
    with pytest.raises(InputError, match=message):
        perplexity(make(), tokens, batch_size)
