"""Continuing prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from intraslice_jax.errors import InputError, RunError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.cache import decode, prefill
from intraslice_jax.models.finite import first_bad_layer
from intraslice_jax.models.precision import exact_float32
from intraslice_jax.models.rope import longrope_limit
from intraslice_jax.models.sampling import Sampling
from intraslice_jax.parallel.placement import to_host


@dataclass(frozen=True)
class GenerationResult:
    """The continuations, without their prompts.

    Attributes:
        tokens: new ids per prompt, the stop token included where one came.
        texts: the same as text, special tokens left out; empty for a model without a tokenizer.
    """

    tokens: list[list[int]]
    texts: list[str]


def generate(
    model: LanguageModel,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int, str], None] | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
) -> GenerationResult:
    """Continues prompts as one batch until each meets a stop token or has `max_new_tokens`.

    Prompts and caches are padded to a few sizes, so that calls of similar length share their compiled programs.
    With `longrope` the cache is computed anew when a row grows past the original context, as Phi-3 does in
    transformers: from there on all keys have the long factors.

    Args:
        model: dense or pruned; float32 models are computed in full float32.
        prompts: texts (encoded with the tokenizer's special tokens) or token ids.
        max_new_tokens: the most tokens to add, None for 64 or what the context leaves if that is less.
        temperature: 0 takes the likeliest token at every step.
        top_k: draw from so many of the likeliest tokens, 0 for all.
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum.
        seed: of the draws; the same seed gives the same text.
        on_token: called with (prompt index, token id, new text) as tokens come. The text is empty while a character
            is incomplete; one that never gets complete comes with the last token.
        finished: asked after each token, with the prompt's index and its new ids, whether that continuation ends.

    Raises:
        InputError: no prompt, an empty one, ids outside the vocabulary, numbers out of range, or a prompt that with
            its continuation exceeds the model's context.
        RunError: a logit is not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    rows = _encode(model, [prompts] if isinstance(prompts, str) else prompts)
    max_new_tokens = _new_tokens(model, rows, max_new_tokens)
    generated: list[list[int]] = [[] for _ in rows]
    stop = stop_tokens(model)
    done = [False] * len(rows)
    prompts_before = [row[-TEXT_BEFORE:] for row in rows]
    stream = None if on_token is None else _Stream(model, on_token, prompts_before)
    slots = bucket(max(map(len, rows)) + max_new_tokens)
    limit = longrope_limit(model.config.rope, model.config.max_position_embeddings)
    with exact_float32(model.decoder):
        logits, caches = _prefill(model, rows, slots)
        for step in range(max_new_tokens):
            chosen = sampling.choose(logits, step)
            _check_finite(model, logits, rows)
            # A row that has ended goes on with the others; what it yields is dropped.
            for i, token in enumerate(to_host(chosen).tolist()):
                rows[i].append(token)
                if not done[i]:
                    generated[i].append(token)
                    done[i] = token in stop or (finished is not None and finished(i, generated[i]))
                    if stream is not None:
                        stream.show(i, generated[i], done[i] or step + 1 == max_new_tokens)
            if all(done) or step + 1 == max_new_tokens:
                break
            if limit is not None and any(len(row) == limit + 1 for row in rows):
                logits, caches = _prefill(model, rows, slots)
            else:
                positions = jnp.asarray([len(row) - 1 for row in rows], jnp.int32)
                logits, caches = decode(model.decoder, chosen, positions, caches)
    return GenerationResult(generated, _texts(model, prompts_before, generated))


def bucket(length: int) -> int:
    """The length rounded up to one of four sizes per power of two, at least 16."""
    grain = max(4, 2 ** (length.bit_length() - 3))
    return max(16, -(-length // grain) * grain)


def _prefill(model: LanguageModel, rows: list[list[int]], slots: int) -> tuple[Array, list]:
    lengths = [len(row) for row in rows]
    tokens = np.zeros((len(rows), min(bucket(max(lengths)), slots)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return prefill(model.decoder, jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32), slots)


def _encode(model: LanguageModel, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
    if not prompts:
        raise InputError("no prompt was given; give at least one")
    rows = []
    for i, prompt in enumerate(prompts):
        ids = prompt
        if isinstance(prompt, str):
            ids = model.require_tokenizer()(prompt, verbose=False)["input_ids"] if prompt else []
        row = [int(token) for token in ids]
        if not row:
            raise InputError(f"prompt {i} is empty; give at least one token to continue")
        odd = [token for token in row if not 0 <= token < model.config.vocab_size]
        if odd:
            raise InputError(
                f"prompt {i} holds token {odd[0]}, the model's vocabulary has {model.config.vocab_size}; "
                "use the tokenizer that belongs to the model"
            )
        rows.append(row)
    return rows


def _new_tokens(model: LanguageModel, rows: list[list[int]], max_new_tokens: int | None) -> int:
    """How many at most, checked against the context."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    limit, longest = model.config.max_position_embeddings, max(map(len, rows))
    if max_new_tokens is None:
        max_new_tokens = max(1, min(USUAL_TOKENS, limit - longest))
    # Dynamic scaling is made for contexts beyond the trained one.
    if longest + max_new_tokens > limit and model.config.rope.rope_type != "dynamic":
        room = limit - longest
        mend = f"lower `max_new_tokens` to {room}" if room > 0 else "shorten the prompt"
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {model.name}, "
            f"{limit} tokens; {mend}"
        )
    return max_new_tokens


def stop_tokens(model: LanguageModel) -> set[int]:
    """Those of the model and of its generation settings (chat models often name more there)."""
    more = model.generation_config.get("eos_token_id")
    return {*model.config.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])}


def _check_finite(model: LanguageModel, logits: Float[Array, "batch vocab"], rows: list[list[int]]) -> None:
    finite = to_host(jnp.isfinite(logits).all(1))
    if not finite.all():
        row = rows[int(np.argmin(finite))]
        raise RunError(f"a logit is not finite: {first_bad_layer(model.decoder, jnp.asarray([row], jnp.int32))}")


USUAL_TOKENS = 64
"""The most that are added where nothing else is asked for."""

TEXT_BEFORE = 8
"""Tokens of a prompt that its continuation is decoded with: SentencePiece drops the space that a text begins with."""


def _texts(model: LanguageModel, before: list[list[int]], generated: list[list[int]]) -> list[str]:
    if model.tokenizer is None:
        return []
    return [_text(model, *tokens) for tokens in zip(before, generated, strict=True)]


def _text(model: LanguageModel, before: list[int], tokens: list[int]) -> str:
    """What the tokens add to the text of those before them."""

    def decoded(tokens: list[int]) -> str:
        return "".join(model.require_tokenizer().decode(tokens, skip_special_tokens=True))

    whole, known = decoded([*before, *tokens]), decoded(before)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, known, strict=False))
    return whole[len(list(same)) :]


class _Stream:
    """Turns the tokens of each row into pieces of text."""

    def __init__(
        self, model: LanguageModel, on_token: Callable[[int, int, str], None], before: list[list[int]]
    ) -> None:
        self.model, self.on_token, self.before = model, on_token, before
        self.shown = [""] * len(before)

    def show(self, row: int, tokens: list[int], last: bool) -> None:
        piece = ""
        if self.model.tokenizer is not None:
            text = _text(self.model, self.before[row], tokens)
            if last or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                piece, self.shown[row] = text[len(self.shown[row]) :], text
        self.on_token(row, tokens[-1], piece)
