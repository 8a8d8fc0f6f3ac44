"""Which text an option names: files or a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from intraslice_jax.calibrate.data import KNOWN, read_dataset, read_text
from intraslice_jax.errors import InputError

TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".md", ".parquet", ".raw", ".text", ".txt", ".utf8"}


def read_sources(sources: Sequence[str], split: str, column: str, option: str) -> str:
    """The text of files (joined in their order), or of one data set `NAME` or `NAME:CONFIG`.

    Args:
        sources: what the user gave.
        split: which split of a data set.
        column: which column of a data set holds the text.
        option: the option's name, for messages.

    Raises:
        InputError: nothing was given, or something is neither a file nor readable as a data set.
    """
    if not sources:
        raise InputError(f"{option} is missing; give one or more text files, or the name of a data set")
    missing = [source for source in sources if not Path(source).is_file()]
    if not missing:
        return read_text([Path(source) for source in sources])
    source = missing[0]
    if len(sources) > 1 or Path(source).suffix.lower() in TEXT_SUFFIXES or source.startswith((".", "/", "~")):
        if not Path(source).is_dir():
            raise InputError(f"{option}: {source} does not exist; give a text file or the name of a data set")
        if len(sources) > 1:
            raise InputError(f"{option}: {source} is a folder; give text files, or a single data set")
    return _read_named(source, split, column)


class EvaluationText(NamedTuple):
    """A text to measure on.

    Attributes:
        name: what the user called it.
        text: the text.
        windows: how many windows from its start the field measures, None for all.
    """

    name: str
    text: str
    windows: int | None


def read_evaluation(
    files: Sequence[str], dataset: str | None, split: str | None, column: str, limit: int | None
) -> EvaluationText:
    """The text of files, or of a data set, that a perplexity is measured on.

    Args:
        files: what `--text` gave.
        dataset: what `--dataset` gave: `NAME`, `NAME:CONFIG` or `NAME@FOLDER`.
        split: of the data set, None for the one that the field reports on.
        column: of the data set.
        limit: the user's own number of windows, stronger than the field's.

    Raises:
        InputError: both or none were given, or the text cannot be read.
    """
    if bool(files) == bool(dataset):
        raise InputError("give either `text=FILE` or `dataset=NAME`, to say what perplexity is measured on")
    if dataset is None:
        return EvaluationText(", ".join(Path(file).name for file in files), read_text(files), limit)
    recipe = KNOWN.get(dataset.partition("@")[0])
    windows = limit if limit is not None or recipe is None else recipe.evaluation_windows
    return EvaluationText(dataset.partition("@")[0], _read_named(dataset, split, column), windows)


def _read_named(source: str, split: str | None, column: str) -> str:
    """`NAME`, `NAME:CONFIG` or `NAME@FOLDER`."""
    name, local, folder = source.partition("@")
    if local and name in KNOWN:
        return read_dataset(name, None, split, column, folder)
    name, _, config = source.partition(":")
    return read_dataset(name, config or None, split, column)
