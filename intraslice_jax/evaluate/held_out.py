"""Perplexity before and after pruning, as reports hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from intraslice_jax.calibrate.data import text_hash
from intraslice_jax.calibrate.sources import EvaluationText
from intraslice_jax.evaluate.perplexity import PerplexityResult, perplexity
from intraslice_jax.model import LanguageModel


def measure_both(
    dense: LanguageModel,
    pruned: LanguageModel,
    source: EvaluationText,
    windows: Int[np.ndarray, "windows seq"],
    on_batch: Callable[[int, int], None],
) -> dict[str, Any]:
    """Measures two models on the same windows of a text.

    Args:
        dense: the model before.
        pruned: the model after.
        source: the text.
        windows: int32 tokens of it.
        on_batch: told the windows done and their number, of both models together.

    Raises:
        RunError: a loss is not finite.
    """
    count = len(windows)
    on_batch(0, 2 * count)
    values = [
        perplexity(model, windows, on_batch=lambda done, _, before=before: on_batch(before + done, 2 * count))
        for model, before in ((dense, 0), (pruned, count))
    ]
    return {**before_and_after(*values), "text_sha256": text_hash(source.text)}


def before_and_after(dense: PerplexityResult, pruned: PerplexityResult) -> dict[str, Any]:
    """What reports hold of the perplexities of both models on the same windows."""
    return {
        "dense_perplexity": dense.perplexity,
        "pruned_perplexity": pruned.perplexity,
        "dense_loss_by_position": dense.loss_by_position,
        "pruned_loss_by_position": pruned.loss_by_position,
        "evaluated_tokens": pruned.evaluated_tokens,
        "sequence_length": pruned.sequence_length,
    }
