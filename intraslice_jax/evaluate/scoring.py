"""Log-likelihoods of continuations, batched by length.

Every request is a context and a continuation in token ids. Requests with the same input share one row (the choices A,
B, C, D of one question need one pass), rows are taken longest first and padded to a few lengths, and the head is
applied only where a continuation is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.config import ModelConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.evaluate.perplexity import automatic_batch
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.finite import first_bad_layer
from intraslice_jax.models.head import token_scores
from intraslice_jax.models.precision import exact_float32
from intraslice_jax.models.rope import longrope_limit

SHORTEST = 16
"""Rows are padded to at least so many tokens."""


class Request(NamedTuple):
    """What is to be scored."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Sum of the continuation's log-probabilities in nats, and whether greedy decoding would yield it."""

    log_likelihood: float
    greedy: bool


@dataclass
class _Row:
    """One input of the model, and which requests read its output."""

    tokens: tuple[int, ...]
    requests: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """Index of the request and its scored tokens, which follow the last of `tokens`' positions."""


def score(
    model: LanguageModel,
    requests: Sequence[Request],
    batch_size: int = 0,
    max_length: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores continuations behind their contexts, in the order of the requests.

    What is too long loses tokens from the left of its context, as in the field's harness. An empty continuation is
    certain: (0, True).

    Args:
        model: dense or pruned; float32 models are computed in full float32.
        requests: token ids; a context has at least one.
        batch_size: rows per step, 0 to choose it from the rows' length.
        max_length: the most input tokens of a row, None for the model's context.
        on_batch: called after each step with the rows done and their total.

    Raises:
        InputError: an empty context, a continuation longer than the model's context, an id outside the vocabulary,
            or a negative batch size.
        RunError: a log-likelihood is not finite.
    """
    if batch_size < 0:
        raise InputError(f"batch_size must be 0 (automatic) or more, found {batch_size}")
    rows = _rows(model.config, requests, max_length or model.config.max_position_embeddings)
    results = [Score(0.0, True)] * len(requests)
    done = 0
    with exact_float32(model.decoder):
        for batch in _batches(rows, model.config, batch_size):
            for index, result in _score_batch(model, *batch):
                results[index] = result
            done += len(batch.rows)
            if on_batch is not None:
                on_batch(done, len(rows))
    return results


def padded_length(length: int, config: ModelConfig) -> int:
    """The length rounded up to a power of two or three quarters of one, within what the model's RoPE allows.

    The frequencies of `longrope` change at a length, and padding must not carry a row across it.
    """
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    limits = [longrope_limit(config.rope, config.max_position_embeddings), config.max_position_embeddings]
    return min([size, *(limit for limit in limits if limit is not None and length <= limit)])


def _rows(config: ModelConfig, requests: Sequence[Request], max_length: int) -> list[_Row]:
    """The distinct inputs, longest first."""
    rows: dict[tuple[int, ...], _Row] = {}
    for index, (context, continuation) in enumerate(requests):
        if not context:
            raise InputError(f"request {index} has an empty context; begin it with a token such as BOS")
        if not continuation:
            continue
        if len(continuation) > max_length:
            raise InputError(
                f"request {index} has a continuation of {len(continuation)} tokens, the context holds {max_length}"
            )
        whole = tuple(map(int, (*context, *continuation)))[-(max_length + 1) :]
        odd = next((token for token in whole if not 0 <= token < config.vocab_size), None)
        if odd is not None:
            raise InputError(
                f"request {index} holds token {odd}, the model's vocabulary has {config.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
        row = rows.setdefault(whole[:-1], _Row(whole[:-1]))
        row.requests.append((index, whole[-len(continuation) :]))
    return sorted(rows.values(), key=lambda row: (-len(row.tokens), row.tokens))


class _Batch(NamedTuple):
    rows: list[_Row]
    size: int
    length: int


def _batches(rows: Sequence[_Row], config: ModelConfig, batch_size: int) -> Iterator[_Batch]:
    """Slices of the sorted rows; automatic sizes are powers of two, so that a few shapes serve every data set."""
    limit = longrope_limit(config.rope, config.max_position_embeddings) or config.max_position_embeddings
    # A batch has one length, so rows on both sides of that limit are not mixed.
    for part in ([r for r in rows if len(r.tokens) > limit], [r for r in rows if len(r.tokens) <= limit]):
        start = 0
        while start < len(part):
            length = padded_length(len(part[start].tokens), config)
            most = batch_size or _power_of_two_below(automatic_batch(config, length))
            size = min(most, _power_of_two_above(len(part) - start))
            yield _Batch(part[start : start + size], size, length)
            start += size


def _power_of_two_below(number: int) -> int:
    """The greatest power of two that is not above a positive number."""
    return 1 << (number.bit_length() - 1)


def _power_of_two_above(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def _score_batch(model: LanguageModel, rows: list[_Row], size: int, length: int) -> Iterator[tuple[int, Score]]:
    tokens = np.zeros((size, length), np.int32)
    where: list[tuple[int, int]] = []
    targets: list[int] = []
    spans: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        for index, scored in row.requests:
            first = len(row.tokens) - len(scored)
            where += [(i, first + k) for k in range(len(scored))]
            targets += scored
            spans.append((index, len(scored)))
    log_probs, greedy = _at(model, tokens, np.asarray(where, np.int32), np.asarray(targets, np.int32))
    start = 0
    for index, count in spans:
        part = slice(start, start + count)
        yield index, Score(float(log_probs[part].sum(dtype=np.float64)), bool(greedy[part].all()))
        start += count


def _at(
    model: LanguageModel,
    tokens: Int[np.ndarray, "batch seq"],
    where: Int[np.ndarray, "scored 2"],
    targets: Int[np.ndarray, " scored"],
) -> tuple[Float[np.ndarray, " scored"], np.ndarray]:
    """Log-probabilities of targets behind (row, position) pairs, and which of them are the likeliest tokens."""
    count = len(targets)
    room = max(SHORTEST, _power_of_two_above(count))
    where = np.concatenate([where, np.zeros((room - count, 2), np.int32)])
    targets = np.concatenate([targets, np.zeros(room - count, np.int32)])
    inputs = jnp.asarray(tokens)
    hidden = model.decoder.hidden_states(inputs)
    chosen: Array = hidden[jnp.asarray(where[:, 0]), jnp.asarray(where[:, 1])]
    log_probs, greedy = (np.asarray(part)[:count] for part in token_scores(model.decoder, chosen, jnp.asarray(targets)))
    if not np.isfinite(log_probs).all():
        raise RunError(f"a log-likelihood is not finite: {first_bad_layer(model.decoder, inputs)}")
    return log_probs, greedy
