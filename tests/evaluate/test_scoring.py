import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.config import RopeConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.evaluate import scoring
from intraslice_jax.evaluate.scoring import Request, padded_length, score
from intraslice_jax.models.decoder import run_block
from tests.prune.flavours import VOCAB, make, with_arrays


def tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def alone(model, context, continuation):
    """The same from the logits of one unpadded row."""
    whole = [*context, *continuation]
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model.decoder(jnp.asarray([whole[:-1]], jnp.int32)), np.float64)[0, -len(continuation) :]
    log_probs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return log_probs[range(len(continuation)), continuation].sum(), list(logits.argmax(-1)) == list(continuation)


@pytest.mark.parametrize("flavour", ["ragged", "phi"])
def test_scores_are_those_of_each_request_alone(flavour):
    model = make(flavour)
    requests = [Request(tokens(n - k, n), tokens(k, 50 + n)) for n in (6, 20) for k in (1, 2, 5)]
    likeliest = int(np.asarray(model.decoder(jnp.asarray([requests[0].context], jnp.int32)))[0, -1].argmax())
    requests.append(Request(requests[0].context, [likeliest]))
    found = score(model, requests)
    assert found[-1].greedy
    for request, (log_likelihood, greedy) in zip(requests, found, strict=True):
        wanted, wanted_greedy = alone(model, *request)
        assert log_likelihood == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy


def test_requests_with_one_input_share_a_row(monkeypatch):
    seen = []
    kept = scoring._score_batch
    monkeypatch.setattr(scoring, "_score_batch", lambda model, *batch: seen.append(batch) or kept(model, *batch))
    model, context = make(), tokens(9)
    options = [Request(context, [token]) for token in range(4)]
    # The same input again, of which more is scored, and the very same request.
    requests = [*options, Request(context[:5], [*context[5:], 3]), options[0]]
    found = score(model, requests)
    assert [len(rows) for rows, *_ in seen] == [1]
    assert found[5] == found[0]
    for request, result in zip(requests, found, strict=True):
        assert result.log_likelihood == pytest.approx(alone(model, *request)[0], abs=1e-4)


def test_what_is_too_long_loses_the_left_of_its_context():
    model, context = make(), tokens(40)
    full = score(model, [Request(context, [1, 2])], max_length=20)
    cut = score(model, [Request(context[-19:], [1, 2])])
    assert full[0].log_likelihood == pytest.approx(cut[0].log_likelihood, abs=1e-5)


def test_an_empty_continuation_is_certain():
    assert score(make(), [Request([1], []), Request([1], [2])])[0] == (0.0, True)


def test_few_shapes_are_compiled():
    model = make(layers=1)
    rng = np.random.default_rng(0)
    done = []
    before = run_block._cache_size()
    requests = [Request(tokens(n, n), [1]) for n in rng.permutation(range(2, 26)).tolist()]
    score(model, requests, batch_size=4, on_batch=lambda *progress: done.append(progress))
    assert run_block._cache_size() - before == len({padded_length(n, model.config) for n in range(2, 26)}) == 3
    assert done[-1] == (24, 24)
    assert len(done) == 6


def test_lengths_are_rounded_within_the_context_and_the_rope():
    config = make().config
    assert [padded_length(n, config) for n in (1, 16, 17, 25, 33, 49, 130, 200, 256)] == [
        16, 16, 24, 32, 48, 64, 192, 256, 256,
    ]  # fmt: skip
    rope = RopeConfig(rope_type="longrope", parameters=(("original_max_position_embeddings", 40),))
    long = dataclasses.replace(config, rope=rope, max_position_embeddings=60)
    assert [padded_length(n, long) for n in (30, 39, 40, 41, 50)] == [32, 40, 40, 48, 60]


def test_rows_on_both_sides_of_longropes_limit_are_not_mixed():
    factors = (("long_factor", (1.0, 2.0, 3.0, 4.0)), ("short_factor", (1.0, 1.0, 1.1, 1.2)))
    rope = RopeConfig(rope_type="longrope", parameters=(*factors, ("original_max_position_embeddings", 20)))
    model = make(layers=1, rope=rope)
    requests = [Request(tokens(n, n), [3, 1]) for n in (19, 20, 24)]
    for request, (found, _) in zip(requests, score(model, requests, batch_size=8), strict=True):
        assert found == pytest.approx(alone(model, *request)[0], abs=1e-4)


@pytest.mark.parametrize(
    ("request_", "batch_size", "message"),
    [
        (Request([], [1]), 0, "request 0 has an empty context"),
        (Request([1], [VOCAB]), 0, f"token {VOCAB}, the model's vocabulary has {VOCAB}"),
        (Request([1], [1] * 300), 0, "continuation of 300 tokens, the context holds 256"),
        (Request([1], [1]), -1, "batch_size must be 0"),
    ],
)
def test_bad_input(request_, batch_size, message):
    with pytest.raises(InputError, match=message):
        score(make(layers=1), [request_], batch_size)


def test_a_nan_is_traced_to_its_layer():
    model = make(layers=1)
    bad = np.asarray(model.decoder.layers[0].mlp.down_proj[...]).copy()
    bad[0, 0] = np.nan
    with pytest.raises(RunError, match="layer 0, MLP"):
        score(with_arrays(model, layers__0__mlp__down_proj=bad), [Request([1], [2])])
