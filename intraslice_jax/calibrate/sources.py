"""Which text an option names: files or a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from intraslice_jax.calibrate.data import KNOWN, read_dataset
from intraslice_jax.calibrate.documents import Documents, read_files
from intraslice_jax.errors import InputError

TEXT_SUFFIXES = {
    *(".csv", ".json", ".jsonl", ".md", ".ndjson", ".parquet", ".raw", ".text", ".tsv", ".txt", ".utf8"),
    *(".bz2", ".gz", ".xz", ".zip", ".zst"),
}


def read_sources(sources: Sequence[str], split: str, column: str, option: str) -> Documents:
    """The documents of files (in their order), or of one data set `NAME` or `NAME:CONFIG`.

    Args:
        sources: what the user gave.
        split: which split of a data set.
        column: which column of a data set, or field of a file, holds the text.
        option: the option's name, for messages.

    Raises:
        InputError: nothing was given, or something is neither a file nor readable as a data set.
    """
    if not sources:
        raise InputError(f"{option} is missing; give one or more text files, or the name of a data set")
    missing = [source for source in sources if not os.path.isfile(source)]  # pathlib's raises for very long names
    if not missing:
        return read_files(sources, column)
    source = missing[0]
    if len(sources) > 1 or Path(source).suffix.lower() in TEXT_SUFFIXES or source.startswith((".", "/", "~")):
        if os.path.exists(source) and not os.path.isdir(source):
            raise InputError(f"{option}: {source} is no regular file; write what it holds to a text file")
        if not os.path.isdir(source):
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


class EvaluationSource(NamedTuple):
    """`EvaluationText` before the model is there, whose tokenizer says how chats are written.

    Attributes:
        name: what the user called it.
        documents: of the text.
        windows: how many windows from its start the field measures, None for all.
    """

    name: str
    documents: Documents
    windows: int | None

    def rendered(self, tokenizer: PreTrainedTokenizerBase) -> EvaluationText:
        """The text; raises InputError as `Documents.rendered`."""
        return EvaluationText(self.name, self.documents.rendered(tokenizer).text, self.windows)


def read_evaluation(
    files: Sequence[str], dataset: str | None, split: str | None, column: str, limit: int | None
) -> EvaluationSource:
    """What a perplexity is measured on: files, or a data set.

    Args:
        files: what `--text` gave.
        dataset: what `--dataset` gave: `NAME`, `NAME:CONFIG` or `NAME@FOLDER`.
        split: of the data set, None for the one that the field reports on.
        column: of the data set or of files with fields.
        limit: the user's own number of windows, stronger than the field's.

    Raises:
        InputError: both or none were given, or the text cannot be read.
    """
    if bool(files) == bool(dataset):
        raise InputError("give either `text=FILE` or `dataset=NAME`, to say what perplexity is measured on")
    if dataset is None:
        return EvaluationSource(", ".join(Path(file).name for file in files), read_files(files, column), limit)
    recipe = KNOWN.get(dataset.partition("@")[0])
    windows = limit if limit is not None or recipe is None else recipe.evaluation_windows
    return EvaluationSource(dataset.partition("@")[0], _read_named(dataset, split, column), windows)


def _read_named(source: str, split: str | None, column: str) -> Documents:
    """`NAME`, `NAME:CONFIG` or `NAME@FOLDER`."""
    name, local, folder = source.partition("@")
    if local and name in KNOWN:
        return read_dataset(name, None, split, column, folder)
    name, _, config = source.partition(":")
    return read_dataset(name, config or None, split, column)
