import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.statistics import GramMoments, MapMoments, zeros_like_moments
from intraslice_jax.models.decoder import decoder_to_arrays
from tests.prune import reference
from tests.prune.flavours import FLAVOURS, make

BATCHES, BATCH, SEQ, HIDDEN = 3, 2, 24, 16
EVERY_LAYER = [(flavour, 0) for flavour in FLAVOURS] + [("ragged", 1)]


def batches(seq=SEQ, seed=5, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal((BATCHES, BATCH, seq, HIDDEN))
    return [jnp.asarray(batch, dtype) for batch in x]


def both(flavour, layer):
    model = make(flavour)
    arrays = decoder_to_arrays(model.decoder)
    return model, model.decoder.layers[layer], reference.Model(model.config, arrays).layers[layer]


def together(xs):
    return np.concatenate(xs).astype(np.float64)


def flat(y):
    return y.reshape(y.shape[0] * y.shape[1], -1)


def close(actual, expected, tolerance=3e-5):
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def empty_map(inputs, targets):
    square, shapes = (targets, targets), {"gram": (inputs, inputs), "cross": (inputs, targets)}
    return zeros_like_moments(MapMoments, **shapes, target_gram=square, input_sum=(inputs,), target_sum=(targets,))


def empty_gram(channels):
    return zeros_like_moments(GramMoments, gram=(channels, channels), total=(channels,))


def add_attention(moments, block, x, rope):
    attention = block.attention
    rotary = 2 * attention.rope_pairs.shape[-1]
    return statistics.add_attention(moments, statistics.mix(block, x, rope), attention.query_to_kv, rotary)


# 140 tokens: more than the attention takes in one piece.
@pytest.mark.parametrize(("flavour", "layer", "seq"), [(*case, SEQ) for case in EVERY_LAYER] + [("window", 0, 140)])
def test_attention_moments(flavour, layer, seq):
    model, block, expected = both(flavour, layer)
    moments, xs = statistics.empty_attention_moments(model.config.layers[layer]), batches(seq)
    for x in xs:
        moments = add_attention(moments, block, x, model.decoder.rope_for(seq))
    q, k, v = expected.queries_keys_values(together(xs))
    y = expected.attend(q, k, v)
    close(moments.head_gram, np.einsum("bthv,bthw->hvw", y, y))
    close(moments.pair_scores, np.abs(q * k).sum((0, 1)))
    rotary, to_kv = model.config.layers[layer].rotary_dim, np.asarray(model.config.layers[layer].query_to_kv)
    k = k[:, :, [list(to_kv).index(kv) for kv in range(to_kv[-1] + 1)]]  # k comes per query head
    for gram, part in (
        (moments.rotary_query_gram, q[..., :rotary]),
        (moments.rotary_key_gram, k[..., :rotary]),
        (moments.rest_query_gram, q[..., rotary:]),
        (moments.rest_key_gram, k[..., rotary:]),
    ):
        if part.size:
            close(gram, np.einsum("bthv,bthw->hvw", part, part))
    close(moments.rotary_key_sum, k[..., :rotary].sum((0, 1)))


@pytest.mark.parametrize(("flavour", "layer"), EVERY_LAYER)
def test_moments_of_the_attention_run_again_with_what_is_kept(flavour, layer):
    model, block, expected = both(flavour, layer)
    shape = model.config.layers[layer]
    n, v, half = shape.num_attention_heads, shape.v_head_dim, shape.rotary_dim // 2
    heads = [h for h in range(n) if h != 1]
    projections = expected.dense()
    channels = {}
    for kv in range(shape.num_key_value_heads):
        pairs = [p for p in range(half) if p != kv % half]
        channels[kv] = [*pairs, *(p + half for p in pairs)]
        selection = np.eye(shape.qk_head_dim)[:, channels[kv]]
        projections.qk[kv] = selection @ selection.T
    maps = jnp.asarray([np.eye(shape.qk_head_dim)[:, channels[shape.query_to_kv[h]]] for h in heads], jnp.float32)
    moments, xs = empty_map(len(heads) * v, n * v), batches()
    for x in xs:
        mixed = statistics.mix(block, x, model.decoder.rope_for(SEQ))
        kv = jnp.asarray([shape.query_to_kv[h] for h in heads])
        moments, again = statistics.add_kept_attention(
            moments, mixed, jnp.asarray(heads), kv, maps, maps, block.attention.scale, shape.sliding_window
        )
    full = flat(expected.mixed(together(xs), expected.dense()))
    kept = flat(expected.mixed(together(xs), projections)).reshape(-1, n, v)[:, heads].reshape(len(full), -1)
    assert np.abs(kept - full.reshape(-1, n, v)[:, heads].reshape(len(full), -1)).max() > 0.01
    np.testing.assert_allclose(flat(again), kept[-len(flat(again)) :], atol=1e-5)
    close(moments.gram, kept.T @ kept)
    close(moments.cross, kept.T @ full)
    close(moments.target_gram, full.T @ full)
    close(moments.input_sum, kept.sum(0))
    close(moments.target_sum, full.sum(0))


@pytest.mark.parametrize(("flavour", "layer"), [("gqa", 0), ("ragged", 1), ("biases", 0), ("phi", 0)])
def test_mlp_moments_and_the_way_to_the_next_layer(flavour, layer):
    model, block, expected = both(flavour, layer)
    rope, parallel = model.decoder.rope_for(SEQ), model.config.parallel_block
    moments, xs = empty_gram(model.config.layers[layer].intermediate_size), batches()
    after, out, mlp_inputs, zs = [], [], [], []
    for x in xs:
        moments, behind, z = statistics.attend_and_add_mlp(moments, block, x, rope)
        zs.append(np.asarray(z))
        after.append(np.asarray(behind))
        source = x if parallel else None
        mlp_inputs.append(np.asarray(statistics.mlp_input(block, behind, source)))
        out.append(np.asarray(statistics.finish_layer(block, behind, source)))
    x, dense = together(xs), expected.dense()
    expected_after = x + expected.attention(x, dense)
    z = flat(expected.inner(x, expected_after))
    close(moments.gram, z.T @ z)
    close(moments.total, z.sum(0))
    close(np.concatenate(after), expected_after)
    close(flat(np.concatenate(zs)), z)
    close(np.concatenate(out), expected.run(x, dense))
    normed = expected.norm("input_norm", x) if parallel else expected.norm("post_norm", expected_after)
    close(np.concatenate(mlp_inputs), normed)


def test_sums_are_float32_where_the_model_is_bfloat16():
    model = make("gqa", dtype=jnp.bfloat16)
    block, rope, shape = model.decoder.layers[0], model.decoder.rope_for(SEQ), model.config.layers[0]
    xs = batches(dtype=jnp.bfloat16)
    first, last = statistics.empty_attention_moments(shape), empty_gram(shape.intermediate_size)
    ys, zs = [], []
    for x in xs:
        first = add_attention(first, block, x, rope)
        last, after, _ = statistics.attend_and_add_mlp(last, block, x, rope)
        y, z = jax.jit(_taps)(block, x, rope)
        assert after.dtype == y.dtype == z.dtype == jnp.bfloat16
        ys.append(np.asarray(y, np.float64))
        zs.append(np.asarray(z, np.float64))
    y, z = np.concatenate(ys), flat(np.concatenate(zs))
    # Rounding of single activations may differ between two programs; a bfloat16 sum would be off by 1e-2.
    close(first.head_gram, np.einsum("bthv,bthw->hvw", y, y), 2e-3)
    close(last.gram, z.T @ z, 2e-3)


def _taps(block, x, rope):
    y = block.attention.mix(block.input_norm(x), rope)
    return y, block.mlp.inner(block.mlp_input(x, x + block.attention.output(y)))


def test_an_accumulator_is_used_up():
    model = make("gqa")
    moments = statistics.empty_attention_moments(model.config.layers[0])
    add_attention(moments, model.decoder.layers[0], batches()[0], model.decoder.rope_for(SEQ))
    assert moments.head_gram.is_deleted()


def test_traced_once_per_distinct_shape():
    model = make("gqa", layers=4)
    # A width of its own, so that no other test has compiled the same.
    seq, x = 19, batches(19)[0]
    before = statistics.add_attention._cache_size(), statistics.attend_and_add_mlp._cache_size()
    for block, shape in zip(model.decoder.layers, model.config.layers, strict=True):
        rope = model.decoder.rope_for(seq)
        for _ in range(2):
            add_attention(statistics.empty_attention_moments(shape), block, x, rope)
            statistics.attend_and_add_mlp(empty_gram(shape.intermediate_size), block, x, rope)
    assert statistics.add_attention._cache_size() == before[0] + 1
    assert statistics.attend_and_add_mlp._cache_size() == before[1] + 1


@pytest.mark.parametrize("channels", [64, 256, 300, 512])
def test_large_gram_matrices_are_computed_by_halves(channels):
    y = np.random.default_rng(0).standard_normal((50, channels)).astype(np.float32)
    gram = np.asarray(jax.jit(statistics._gram)(jnp.asarray(y)))
    close(gram, y.T @ y)
    if channels > 64:
        np.testing.assert_array_equal(gram, gram.T)
