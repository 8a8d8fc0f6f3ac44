"""Which form an export takes, by what was asked for and by the output's name. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from intraslice_jax.errors import InputError

Format = Literal["hf", "padded", "gguf"]


def format_of(path: str | Path, given: Format | None) -> Format:
    """The format asked for, else that of the output's name: `gguf` for a file .gguf, `hf` for any other.

    Raises:
        InputError: the two contradict each other.
    """
    is_gguf = Path(path).suffix.lower() == ".gguf"
    if given is None:
        return "gguf" if is_gguf else "hf"
    if given == "gguf" and not is_gguf:
        raise InputError(f"`format=gguf` writes a file: expected a name that ends in .gguf, found {path}")
    if given != "gguf" and is_gguf:
        raise InputError(
            f"`format={given}` writes a folder, found the name of a GGUF file, {path}; give another name, or leave "
            "`format` out"
        )
    return given
