"""Options that name a text to measure perplexity on, for commands that also take a calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from intraslice_jax.commands._types import Files

if TYPE_CHECKING:
    from intraslice_jax.calibrate.sources import EvaluationSource


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What perplexity is measured on.

    Attributes:
        text: text files to measure perplexity on.
        dataset: instead of files, a data set: `NAME`, `NAME:CONFIG` or `NAME@FOLDER`.
        evaluation_split: which split of the data set; the one the field reports on, `test` mostly, if not given.
        evaluation_column: which column of the data set, or field of a file, holds the text.
        windows: how many evaluation windows from the start of the text; all if not given.
    """

    text: Files = ()
    dataset: str | None = None
    evaluation_split: str | None = None
    evaluation_column: str = "text"
    windows: int | None = None


def read_held_out(options: HeldOut) -> EvaluationSource:
    """The text, every failure as an InputError."""
    from intraslice_jax.calibrate.sources import read_evaluation

    split, column = options.evaluation_split, options.evaluation_column
    return read_evaluation(options.text, options.dataset, split, column, options.windows)
