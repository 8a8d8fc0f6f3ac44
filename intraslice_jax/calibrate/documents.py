"""Files that hold text, read for what they are: plain text, JSON, tables, chats, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import logging
import lzma
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pydantic_core
from transformers import PreTrainedTokenizerBase

from intraslice_jax.errors import InputError, refused

log = logging.getLogger(__name__)

JOIN = "\n\n"
"""What stands between two documents: an empty line."""

Chat = list[dict[str, Any]]
"""Messages as chat templates take them: `{"role": "user", "content": "Hello"}`, and what else they have."""

MAX_TEXT_BYTES = 2 * 2**30
"""Unpacked. Calibration takes some MB, the largest evaluation texts some hundred."""

_DEFAULT_COLUMN = "text"
_CHAT_COLUMNS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT, whose messages are `from` and `value`, names them

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_OTHER_KINDS = {
    b"%PDF-": "a PDF document",
    b"{\\rtf": "an RTF document",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "a SQLite database",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"version https://git-lfs": "a Git LFS pointer in place of the file (git lfs pull)",
}


def _zstandard(file: io.BytesIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


_PACKED: dict[bytes, Callable[[io.BytesIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstandard,
}
_CONTROLS = [chr(c) for c in range(1, 32) if chr(c) not in "\t\n\v\f\r\b\x1b"]


@dataclass(frozen=True)
class Documents:
    """The documents of a text.

    Attributes:
        items: texts, and chats, which become text by the chat template of the model's tokenizer.
        join: what stands between two documents.
    """

    items: Sequence[str | Chat]
    join: str = JOIN

    def rendered(self, tokenizer: PreTrainedTokenizerBase) -> JoinedText:
        """The documents as one text.

        Raises:
            InputError: there are chats, and the tokenizer has no chat template or it does not take them.
        """
        texts = [d if isinstance(d, str) else _through_template(d, tokenizer) for d in self.items]
        starts, position = [], 0
        for text in texts:
            if text.strip():  # data sets of lines have empty ones
                starts.append(position + len(text) - len(text.lstrip()))
            position += len(text) + len(self.join)
        return JoinedText(self.join.join(texts), tuple(starts))


class JoinedText(NamedTuple):
    """Documents as one text.

    Attributes:
        text: all of them.
        starts: where in it each begins, ascending.
    """

    text: str
    starts: tuple[int, ...] = (0,)


def _through_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the text holds chats, and the model's tokenizer has no chat template to write them with; "
            "name a field that holds text (`column`)"
        )
    with refused("the tokenizer's chat template cannot write a chat of the text", "`column` names another field"):
        return str(tokenizer.apply_chat_template(chat, tokenize=False))


def read_files(files: Sequence[str | Path], column: str = _DEFAULT_COLUMN) -> Documents:
    """The documents of files, in their order.

    Plain text (UTF-8, or UTF-16 and UTF-32 with a byte-order mark) is one document. JSON, JSON lines, CSV, TSV and
    Parquet have one in each row. Gzip, bzip2, xz, Zstandard, and zip archives of one file are unpacked. Line ends
    become LF, a byte-order mark is left out.

    Args:
        files: their paths.
        column: where the text of a row is: a string, or a list of messages (`role` and `content`, or `from` and
            `value`). For `text`, rows that have no such field may have `messages` or `conversations`.

    Raises:
        InputError: no file, or one that is missing, a folder, empty, damaged, or not text.
    """
    if not files:
        raise InputError("no text file was given; name at least one")
    return Documents([document for file in files for document in _read_file(Path(file), column)])


def _read_file(path: Path, column: str) -> list[str | Chat]:
    content, suffix = _unpacked(_content(path), path)
    if content.startswith(b"PAR1"):
        return _parquet(content, path, column)
    text = _decoded(content, path)
    if suffix in (".csv", ".tsv"):
        return _table(text, "\t" if suffix == ".tsv" else ",", path, column)
    rows = _json(text, path, suffix in (".json", ".jsonl", ".ndjson"))
    if rows is not None:
        return _documents_of_json(rows, path, column)
    if not text.strip():
        raise InputError(f"text file {path} is empty; give one that holds text")
    return [text]


def _content(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give text files (a data set's folder is read by its name)")
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise _too_large(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"text file {path} does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"text file {path} cannot be read: {error.strerror}") from error


def _too_large(path: Path) -> InputError:
    return InputError(f"text file {path} has more than {MAX_TEXT_BYTES} bytes; cut off a part, some MB are enough")


def _unpacked(content: bytes, path: Path) -> tuple[bytes, str]:
    """What a compressed file holds, and the suffix of what it holds; other files as they are."""
    name = path
    with refused(f"text file {path} cannot be unpacked", "compress or copy it again"):
        for _ in range(3):  # a .gz in a .zip is all that has been seen
            opened = next((open_ for magic, open_ in _PACKED.items() if content.startswith(magic)), None)
            if opened is not None:
                content, name = _all(opened(io.BytesIO(content)), path), name.with_suffix("")
            elif content.startswith(b"PK\x03\x04"):
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
                    if len(names) != 1:
                        raise InputError(f"{path} is an archive of {len(names)} files; unpack it and name the texts")
                    content, name = _all(archive.open(names[0]), path), Path(names[0])
            else:
                break
    return content, name.suffix.lower()


def _all(stream: Any, path: Path) -> bytes:
    parts, size = [], 0
    with stream:
        while part := stream.read(2**20):
            parts.append(part)
            size += len(part)
            if size > MAX_TEXT_BYTES:
                raise _too_large(path)
    return b"".join(parts)


def _decoded(content: bytes, path: Path) -> str:
    """The text of bytes, without a byte-order mark, with LF at the ends of lines."""
    other = next((kind for magic, kind in _OTHER_KINDS.items() if content.startswith(magic)), None)
    if other is not None:
        raise InputError(f"{path} is {other}; give a text file")
    mark, encoding = next(((m, e) for m, e in _MARKS if content.startswith(m)), (b"", "utf-8"))
    if not mark and b"\0" in content:
        raise InputError(
            f"{path} holds a zero byte at {content.index(0)} and is not plain text; give a text file "
            "(UTF-16 is read if it begins with its byte-order mark)"
        )
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        problem = f"text file {path} is not {encoding[:6].upper().rstrip('-')} (byte {at}: 0x{content[at]:02x})"
        if error.reason == "unexpected end of data":
            raise InputError(f"{problem}: cut off within its last character, or of another encoding") from None
        raise InputError(f"{problem}; convert it first, for example: iconv -f latin1 -t utf-8") from None
    controls = sum(map(text.count, _CONTROLS))
    if "\0" in text or controls > len(text) // 100:
        raise InputError(f"{path} is not plain text, {controls} of its {len(text)} characters are control characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(text: str, path: Path, by_name: bool) -> Any:
    """The value of a text that is JSON, or the values of its lines; None if it is not JSON.

    Args:
        text: the text.
        path: for messages.
        by_name: whether the file's name says that it is JSON. If not, it is where it is an object or a list as a
            whole, or where its first line is an object.
    """
    if not by_name and not re.match(r"\s*[\[{]", text):
        return None
    try:
        return pydantic_core.from_json(text)
    except ValueError as error:
        problem = error
    rows, lines = [], [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for n, line in lines:
        try:
            rows.append(pydantic_core.from_json(line))
        except ValueError as error:
            if not rows:
                break
            raise InputError(f"{path}: line {n} cannot be read as JSON ({error}), the lines above can") from None
        if not by_name and not (rows[0] and isinstance(rows[0], dict)):
            return None
    if rows:
        return rows
    if not by_name:
        return None
    raise InputError(
        f"{path} cannot be read as JSON or JSON lines ({problem}); download it again, or rename plain text"
    )


def _documents_of_json(data: Any, path: Path, column: str) -> list[str | Chat]:
    """Of a list of objects or strings, of one object, or of one object of columns."""
    rows = data if isinstance(data, list) else [data]
    fields = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    if fields:
        column = column_of(fields, column, str(path))
        rows = [row.get(column) if isinstance(row, dict) else row for row in rows]
        if isinstance(data, dict) and isinstance(rows[0], list) and _chat(rows[0]) is None:
            rows = rows[0]  # an object of columns
    return documents_of(rows, column, str(path))


def _table(text: str, delimiter: str, path: Path, column: str) -> list[str | Chat]:
    limit = csv.field_size_limit(MAX_TEXT_BYTES)  # the default is 128 KB
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        column = column_of([name for name in rows.fieldnames or () if name], column, str(path))
        return documents_of([row[column] or None for row in rows], column, str(path))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error}); write it again, or rename plain text") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(content: bytes, path: Path, column: str) -> list[str | Chat]:
    import pyarrow
    from pyarrow import parquet

    with refused(f"{path} cannot be read as Parquet", "download it again"):
        table = parquet.ParquetFile(pyarrow.BufferReader(content))
        column = column_of(table.schema_arrow.names, column, str(path))
        values = table.read([column]).column(column).to_pylist()
    return documents_of(values, column, str(path))


def column_of(names: Sequence[str], wanted: str, where: str) -> str:
    """The column that holds the text: the wanted one; where there is no `text`, a column of chats.

    Raises:
        InputError: there is none.
    """
    choice = (wanted, *_CHAT_COLUMNS) if wanted == _DEFAULT_COLUMN else (wanted,)
    found = next((name for name in choice if name in names), None)
    if found is None:
        shown = ", ".join(f"{' '.join(name.split()):.40}" for name in names[:20]) + (", ..." if len(names) > 20 else "")
        raise InputError(f"{where} has no column {wanted!r}; its columns are {shown or 'none'} (`column` names one)")
    return found


def documents_of(values: Iterable[Any], column: str, where: str) -> list[str | Chat]:
    """The documents of a column, without rows that hold none.

    Args:
        values: strings, lists of messages, and None.
        column: its name, for messages.
        where: the file or data set, for messages.

    Raises:
        InputError: a value is of another kind, or there is no text.
    """
    documents, missing = [], 0
    for i, value in enumerate(values):
        document = value if isinstance(value, str) else _chat(value)
        if value is None:
            missing += 1
        elif document is None:
            raise InputError(
                f"{where}: column {column!r} holds {type(value).__name__} values (row {i}), expected text, or a list "
                "of messages with role and content"
            )
        else:
            documents.append(document)
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        raise InputError(f"{where}: column {column!r} holds no text")
    if missing:
        log.warning("%s: %d of %d rows have no %s and are left out", where, missing, missing + len(documents), column)
    return documents


def _chat(value: Any) -> Chat | None:
    """A list of messages with `role` and `content`, or None if it is none."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    chat = []
    for message in value:
        if "role" not in message and "from" in message and "value" in message:
            role = message["from"]
            message = {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": message["value"]}
        if not isinstance(message.get("role"), str) or "content" not in message:
            return None
        chat.append(message)
    return chat
