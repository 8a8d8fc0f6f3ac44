"""Perplexity on windows of text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

from intraslice_jax.config import ModelConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.finite import first_bad_layer
from intraslice_jax.models.head import token_nll
from intraslice_jax.models.precision import exact_float32
from intraslice_jax.parallel.batches import even_batch
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import mesh_of, put_batch, to_host

POSITIONS = (1, 4, 16, 64, 256)
"""Where the bands of `PerplexityResult.loss_by_position` begin, in tokens before the one that is predicted."""

_MEMORY_BUDGET, _CPU_MEMORY_BUDGET = 2**30, 128 * 2**20  # larger steps do not make a CPU faster


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured.

    Attributes:
        perplexity: exp(mean_nll).
        evaluated_tokens: predicted tokens: all but the first of every window.
        sequence_length: tokens per window; only perplexities of one length compare.
        mean_nll: mean negative log-likelihood in nats over the predicted tokens.
        loss_by_position: the same for tokens early and late in their window, as `1-3`: those after one to three others.
        seconds: wall time, compilation included.
    """

    perplexity: float
    evaluated_tokens: int
    sequence_length: int
    mean_nll: float
    loss_by_position: dict[str, float]
    seconds: float


def perplexity(
    model: LanguageModel,
    windows: Int[np.ndarray, "windows seq"],
    batch_size: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity over windows that do not see each other: exp of the mean loss of tokens 2 to T of each.

    Args:
        model: dense or pruned; float32 models are computed in full float32.
        windows: int32 tokens.
        batch_size: windows per step, 0 to choose it from a memory budget.
        on_batch: called after each step with the windows done and their total.

    Raises:
        InputError: the windows are empty, shorter than two tokens or hold tokens outside the vocabulary.
        RunError: an activation is not finite; the message names the first layer.
    """
    started = time.monotonic()
    count, length = windows.shape
    _check(model.config, windows, batch_size)
    mesh = mesh_of(model.decoder)
    size = even_batch(count, batch_size or ways(mesh) * automatic_batch(model.config, length), ways(mesh))
    total = np.zeros(length - 1)
    with exact_float32(model.decoder):
        for start in range(0, count, size):
            real = min(size, count - start)
            # The last batch is filled up with copies of its first window, so that nothing recompiles.
            rows = np.minimum(np.arange(start, start + size), count - 1)
            tokens = put_batch(windows[rows].astype(np.int32), mesh)
            nll = token_nll(model.decoder, model.decoder.hidden_states(tokens)[:, :-1], tokens[:, 1:])
            batch = to_host(nll)[:real].sum(axis=0, dtype=np.float64)
            if not np.isfinite(batch).all():
                raise RunError(f"the loss is not finite: {first_bad_layer(model.decoder, tokens)}")
            total += batch
            if on_batch is not None:
                on_batch(start + real, count)
    evaluated = count * (length - 1)
    mean = float(total.sum()) / evaluated
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        evaluated_tokens=evaluated,
        sequence_length=length,
        mean_nll=mean,
        loss_by_position=_by_position(total / count),
        seconds=time.monotonic() - started,
    )


def _by_position(losses: Float[np.ndarray, " predicted"]) -> dict[str, float]:
    """Means over bands of positions; the first loss is that of the token after one other."""
    starts = [start for start in POSITIONS if start <= len(losses)]
    bands = zip(starts, [*starts[1:], len(losses) + 1], strict=True)
    return {f"{start}-{end - 1}": float(losses[start - 1 : end - 1].mean()) for start, end in bands}


def automatic_batch(config: ModelConfig, length: int, memory_budget: int | None = None) -> int:
    """How many windows one step takes for its activations to fit the budget in bytes, at least 1."""
    if memory_budget is None:
        memory_budget = _CPU_MEMORY_BUDGET if jax.default_backend() == "cpu" else _MEMORY_BUDGET
    widest = max(3 * layer.intermediate_size for layer in config.layers)
    # Two copies of the scores of one query chunk, as `attend_causally` cuts them.
    scores = max(2 * layer.num_attention_heads for layer in config.layers) * max(128, length // 8)
    per_window = 4 * length * (6 * config.hidden_size + max(widest, scores))
    return max(1, memory_budget // per_window)


def _check(config: ModelConfig, windows: np.ndarray, batch_size: int) -> None:
    count, length = windows.shape
    if count < 1 or length < 2:
        raise InputError(f"perplexity needs at least one window of two tokens, found {count} windows of {length}")
    if batch_size < 0:
        raise InputError(f"batch_size must be 0 (automatic) or more, found {batch_size}")
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        odd = int(windows.min() if windows.min() < 0 else windows.max())
        raise InputError(
            f"the text holds token {odd}, the model's vocabulary has {config.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
