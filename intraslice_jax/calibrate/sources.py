"""Which text an option names: files or a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from intraslice_jax.calibrate.data import read_dataset, read_text
from intraslice_jax.errors import InputError

_TEXT_SUFFIXES = {".csv", ".json", ".jsonl", ".md", ".parquet", ".raw", ".text", ".txt", ".utf8"}


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
    if len(sources) > 1 or Path(source).suffix.lower() in _TEXT_SUFFIXES or source.startswith((".", "/", "~")):
        if not Path(source).is_dir():
            raise InputError(f"{option}: {source} does not exist; give a text file or the name of a data set")
        if len(sources) > 1:
            raise InputError(f"{option}: {source} is a folder; give text files, or a single data set")
    name, _, config = source.partition(":")
    return read_dataset(name, config or None, split, column)
