"""The files of a Hugging Face tokenizer, checked before the libraries build something of them."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Required

from pydantic import with_config
from typing_extensions import TypedDict

from intraslice_jax.errors import InputError, refused
from intraslice_jax.reading import Index, read_bytes, read_json

_ADVICE = "copy all of the model's tokenizer files again"


@with_config(extra="allow")
class _AddedToken(TypedDict, total=False):
    content: Required[str]
    lstrip: bool
    normalized: bool
    rstrip: bool
    single_word: bool
    special: bool


class _NamedTemplate(TypedDict):
    name: str
    template: str


_Token = str | _AddedToken | None
_Side = Literal["left", "right"] | None


@with_config(extra="allow")
class _Config(TypedDict, total=False):
    """tokenizer_config.json: what transformers would stumble over. It takes any keys beside these."""

    added_tokens_decoder: dict[str, _AddedToken] | None
    additional_special_tokens: list[_Token] | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    bos_token: _Token
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None
    clean_up_tokenization_spaces: bool | None
    cls_token: _Token
    eos_token: _Token
    extra_special_tokens: list[_Token] | dict[str, _Token] | None
    mask_token: _Token
    model_max_length: int | float | None
    pad_token: _Token
    padding_side: _Side
    sep_token: _Token
    tokenizer_class: str | None
    truncation_side: _Side
    unk_token: _Token


_SCHEMAS: dict[str, Any] = {
    "tokenizer.json": dict[str, Any],  # the rest is checked by the tokenizers library
    "tokenizer_config.json": _Config,
    "special_tokens_map.json": dict[str, _Token | list[_Token]],
    "added_tokens.json": dict[str, Index],
}


def check_tokenizer_files(folder: Path) -> None:
    """Raises InputError for the first file of a folder's tokenizer that is damaged."""
    for name, schema in _SCHEMAS.items():
        if (folder / name).is_file():
            read_json(folder / name, schema, _ADVICE)
    model = folder / "tokenizer.model"
    if model.is_file() and not (folder / "tokenizer.json").is_file():
        _check_sentencepiece(model)


def _check_sentencepiece(path: Path) -> None:
    """Else transformers would take it for a file of the tiktoken library, and ask for that to be installed."""
    import sentencepiece

    content = read_bytes(path, _ADVICE)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        raise InputError(f"{path} is a vocabulary for tiktoken, which says too little; copy tokenizer.json beside it")
    with refused(f"{path} is not a sentencepiece model", _ADVICE):
        sentencepiece.SentencePieceProcessor(model_proto=content)


@contextmanager
def panics_unprinted() -> Iterator[None]:
    """A library in Rust that panics prints so to the process's stderr; what others print comes at the end."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
        printed.seek(0)
        os.write(2, printed.read())
