"""Perplexity before and after pruning, as reports hold it."""

from __future__ import annotations

from typing import Any

from intraslice_jax import api
from intraslice_jax.calibrate.data import text_hash
from intraslice_jax.calibrate.sources import EvaluationText
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.model import LanguageModel
from intraslice_jax.progress import window_progress


def measure_both(
    dense: LanguageModel, pruned: LanguageModel, source: EvaluationText, sequence_length: int
) -> dict[str, Any]:
    """Measures two models on the same windows of a text.

    Raises:
        InputError: the text has fewer tokens than one window, or the window exceeds the context.
        RunError: a loss is not finite.
    """
    windows = api.text_windows(dense, source.text, sequence_length, source.windows)
    values = []
    for label, model in (("dense", dense), ("pruned", pruned)):
        with window_progress(label) as on_batch:
            values.append(perplexity(model, windows, on_batch=on_batch))
    return {
        "dense_perplexity": values[0].perplexity,
        "pruned_perplexity": values[1].perplexity,
        "evaluated_tokens": values[1].evaluated_tokens,
        "sequence_length": sequence_length,
        "text_sha256": text_hash(source.text),
    }
