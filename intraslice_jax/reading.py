"""Files that somebody else may have written: parsed within bounds, then checked against the schema of their format.

A schema is any type that pydantic validates: a dataclass, a `TypedDict`, a list of annotated numbers. A file is
described once, by its schema, and nothing is built or allocated before all of it was checked.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import pydantic
import pydantic_core
from pydantic import Field

from intraslice_jax.errors import InputError

T = TypeVar("T")

if TYPE_CHECKING:
    Schema = type[T]
else:
    # What checks calls in the tests does not take `dict[str, int]` for a type.
    Schema = Annotated[Any, T]

MAX_DOCUMENT_BYTES = 256 * 2**20
"""Larger than any description of a model or a run; a tokenizer's is some 20 MB."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A number of things, of which there is at least one: a width, a number of heads, a window."""

Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A position or a token id."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is neither infinite nor a NaN."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""


def read_json(path: Path, schema: Schema[T], advice: str = "download it again") -> T:
    """A JSON file, checked.

    Args:
        path: the file, UTF-8.
        schema: what it must hold.
        advice: how to mend a damaged file, for the message.

    Raises:
        InputError: the file is missing, too large, not JSON, nested too deeply, or does not fit the schema.
    """
    return check(parse_json(read_bytes(path, advice), str(path), advice), schema, str(path))


def read_bytes(path: Path, advice: str = "download it again") -> bytes:
    """A whole file of at most `MAX_DOCUMENT_BYTES`.

    Raises:
        InputError: it is missing, unreadable or larger.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is not a file; {advice}")  # reading a pipe would wait for ever
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise InputError(f"{path} has {size} bytes, expected at most {MAX_DOCUMENT_BYTES}; {advice}")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {advice}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; {advice}") from error


def parse_json(content: bytes | str, where: str, advice: str = "download it again") -> Any:
    """What JSON text holds: objects, lists, numbers. A byte-order mark is ignored.

    Args:
        content: the text, or its UTF-8 bytes.
        where: the file, for messages.
        advice: how to mend it.

    Raises:
        InputError: it is not JSON, or nested hundreds deep.
    """
    mark = b"\xef\xbb\xbf" if isinstance(content, bytes) else "\ufeff"
    try:
        return pydantic_core.from_json(content.removeprefix(mark))  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise InputError(f"{where} cannot be read as JSON ({error}); {advice}") from error


def check(data: Any, schema: Schema[T], where: str) -> T:
    """Data of a parsed file as the schema's type; lists become tuples where it says so, nothing else is converted.

    Args:
        data: objects, lists, numbers.
        schema: what they must be.
        where: the file or option, for messages; "" where the caller names it.

    Raises:
        InputError: the first thing that does not fit, with what was found and expected.
    """
    try:
        return _adapter(schema).validate_json(pydantic_core.to_json(data, inf_nan_mode="constants"), strict=True)
    except pydantic.ValidationError as error:
        raise InputError(_first_problem(error, where)) from error
    except (ValueError, RecursionError) as error:  # what JSON cannot express, from YAML: a date, a cycle
        raise InputError(f"{where or 'it'} holds what JSON cannot express ({' '.join(str(error).split())})") from error


@functools.cache
def _adapter(schema: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(schema)


def _first_problem(error: pydantic.ValidationError, where: str) -> str:
    """`FILE: layers.0.qk_head_dim must be a valid integer, found '64'`."""
    problem = error.errors(include_url=False)[0]
    # pydantic also says which kind of a union it tried: `constrained-int`, `list[constrained-int]`. Keys of the file,
    # which are part of the place, may hold anything.
    name = ".".join(str(part) for part in problem["loc"] if not re.search(r"constrained-|\[", str(part)))
    name = "".join(c if c.isprintable() else "?" for c in name[:200])
    subject = ": ".join(part for part in (where, name) if part)
    if problem["type"] == "missing":
        return f"{subject} is missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{subject} is unknown"
    if problem["type"] == "value_error":
        return f"{subject}: {problem['ctx']['error']}"  # pyright: ignore[reportTypedDictNotRequiredAccess]
    found = "nothing" if problem["input"] is None else repr(problem["input"])
    found = found if len(found) <= 60 else f"{found[:60]}..."
    expected = problem["msg"].replace("Input should", "must", 1)
    for theirs, ours in _WORDS.items():
        expected = expected.replace(theirs, ours)
    expected = expected[:1].lower() + expected[1:]
    joined = " " if expected.startswith("must") else ": "
    return f"{subject}{joined}{expected}, found {found}"


_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid array": "a list",
    "a valid dictionary": "an object",
    "be greater than or equal to": "be at least",
    "be less than or equal to": "be at most",
    "be greater than": "be above",
    "be less than": "be below",
}
"""pydantic's words, and those of our other messages."""
