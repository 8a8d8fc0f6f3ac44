"""Windows of tokens, out of a text: to calibrate on, and to measure perplexity on."""

from __future__ import annotations

import random
import re

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from intraslice_jax.calibrate.data import encode
from intraslice_jax.calibrate.documents import JoinedText
from intraslice_jax.config import CalibrationConfig
from intraslice_jax.errors import InputError

_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_CHARACTERS, _MARGIN = 8, 16
"""How many characters per token are encoded at first, and how many tokens more than needed, as the last ones may be
others where the text goes on."""


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, text: JoinedText, tokens: Int[np.ndarray, " tokens"], config: CalibrationConfig
) -> Int[np.ndarray, "samples length"]:
    """The windows that a model is calibrated on, int32 (docs/method.md section 1).

    Args:
        tokenizer: of the model.
        text: the calibration text.
        tokens: all of it, from `encode`.
        config: how many windows, of how many tokens (not None here), and which.

    Raises:
        InputError: the text is shorter than one window, or a number is out of range.
    """
    length = config.sequence_length
    assert length is not None
    windows = sample_windows(tokens, config.samples, length, config.seed)
    if config.sampling == "documents":
        # Every second one, so that those held out, which are the last, are of both kinds.
        begun = beginnings(tokenizer, text, config.samples // 2, length, config.seed)
        windows[1 : 2 * len(begun) : 2] = begun
    return windows


def beginnings(
    tokenizer: PreTrainedTokenizerBase, text: JoinedText, count: int, length: int, seed: int
) -> Int[np.ndarray, "found length"]:
    """Windows that begin where documents begin, after the BOS token if the tokenizer puts one before a text.

    Documents begin where `text` says; if that is in too few places, after every blank line, too. Where few documents
    are followed by enough text there are fewer windows than asked for.

    Args:
        tokenizer: of the model.
        text: where from.
        count: how many windows.
        length: tokens of each.
        seed: of the choice.
    """
    starts = list(text.starts)
    if len(starts) < count:
        starts = sorted({*starts, *(found.end() for found in _BLANK_LINES.finditer(text.text))})
    random.Random(seed).shuffle(starts)
    bos, windows = leading_token(tokenizer), []
    for start in starts:
        if len(windows) == count:
            break
        tokens = _tokens_from(tokenizer, text.text, start, length)
        if bos is not None and tokens[:1].tolist() != [bos]:  # chat templates write it themselves
            tokens = np.concatenate([[bos], tokens])
        if len(tokens) >= length:
            windows.append(tokens[:length])
    return np.asarray(windows, np.int32).reshape(-1, length)


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token that the tokenizer puts before a text, None if it puts none."""
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def _tokens_from(tokenizer: PreTrainedTokenizerBase, text: str, start: int, count: int) -> np.ndarray:
    """At least so many tokens from a position on, or all that there are."""
    size = _CHARACTERS * count
    while True:
        tokens = encode(tokenizer, text[start : start + size])
        if start + size >= len(text):
            return tokens
        if len(tokens) >= count + _MARGIN:
            return tokens[:-_MARGIN]
        size *= 2


def with_bos(windows: Int[np.ndarray, "windows length"], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The same windows with the BOS token in place of their first one, as prompts begin.

    Raises:
        InputError: the tokenizer puts no BOS token before a text.
    """
    bos = leading_token(tokenizer)
    if bos is None:
        raise InputError("the model's tokenizer puts no BOS token before a text; leave out `bos`")
    return np.concatenate([np.full_like(windows[:, :1], bos), windows[:, 1:]], axis=1)


def sample_windows(
    stream: Int[np.ndarray, " tokens"], samples: int, sequence_length: int, seed: int
) -> Int[np.ndarray, "samples length"]:
    """Calibration windows at random positions of the stream, overlaps allowed.

    The positions are those of the field's programs (GPTQ, SparseGPT, Wanda, SliceGPT) for the same seed:
    `random.randint(0, tokens - length - 1)` from one `random.Random(seed)`.

    Raises:
        InputError: the stream is shorter than one window, or a number is out of range.
    """
    if samples < 1:
        raise InputError(f"samples must be at least 1, found {samples}")
    _check_length(stream, sequence_length)
    draw = random.Random(seed)
    last = max(0, len(stream) - sequence_length - 1)  # a stream of exactly one window has one position
    starts = [draw.randint(0, last) for _ in range(samples)]
    return np.stack([stream[start : start + sequence_length] for start in starts]).astype(np.int32)


def consecutive_windows(
    stream: Int[np.ndarray, " tokens"], sequence_length: int, limit: int | None = None
) -> Int[np.ndarray, "windows length"]:
    """Evaluation windows: consecutive, not overlapping, the remainder left out; the first `limit` of them.

    Raises:
        InputError: the stream is shorter than one window, or a number is out of range.
    """
    if limit is not None and limit < 1:
        raise InputError(f"windows must be at least 1, found {limit}; leave it out to take all")
    _check_length(stream, sequence_length)
    windows = len(stream) // sequence_length
    windows = windows if limit is None else min(windows, limit)
    return stream[: windows * sequence_length].reshape(windows, sequence_length).astype(np.int32)


def _check_length(stream: np.ndarray, sequence_length: int) -> None:
    if sequence_length < 2:
        raise InputError(f"sequence_length must be at least 2, found {sequence_length}")
    if len(stream) < sequence_length:
        raise InputError(
            f"the text has {len(stream)} tokens, shorter than one window of {sequence_length}; "
            f"give more text or lower `sequence_length`"
        )
