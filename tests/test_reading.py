"""Foreign files: what they must hold, said in one line where they do not."""

import os
from dataclasses import dataclass
from typing import NotRequired

import pytest
from typing_extensions import TypedDict

from intraslice_jax import reading
from intraslice_jax.errors import InputError
from intraslice_jax.reading import Count, Positive, check, parse_json, read_json


class Header(TypedDict):
    width: Count
    scale: NotRequired[Positive]


@dataclass(frozen=True)
class Shape:
    sizes: tuple[int, ...]

    def __post_init__(self):
        if sum(self.sizes) > 10:
            raise InputError(f"sizes add up to {sum(self.sizes)}, expected at most 10")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"width": "64"}, "f: width must be a whole number, found '64'"),
        ({"width": True}, "f: width must be a whole number, found True"),
        ({"width": 0}, "f: width must be at least 1, found 0"),
        ({"width": float("inf")}, "f: width must be a whole number, found inf"),
        ({"width": 1, "scale": float("nan")}, "f: scale must be a finite number, found nan"),
        ({}, "f: width is missing"),
        ([], r"f must be an object, found \[\]"),
        ({"width": {1, 2}}, r"f: width must be a whole number, found \[1, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        check(data, Header, "f")


def test_a_number_of_400_digits_is_shortened():
    with pytest.raises(InputError, match=r"at most 2147483647, found 1000*\.\.\.$"):
        check({"width": 10**400}, Header, "f")


def test_lists_become_tuples_and_the_classes_own_checks_speak():
    assert check({"sizes": [1, 2]}, Shape, "f") == Shape((1, 2))
    with pytest.raises(InputError, match=r"^f: sizes add up to 11, expected at most 10$"):
        check({"sizes": [5, 6]}, Shape, "f")


def test_what_json_cannot_express_is_refused():
    cycle = []
    cycle.append(cycle)
    for data in (cycle, {"width": b"\xff"}):
        with pytest.raises(InputError, match=r"^f"):
            check(data, Header, "f")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, b"\xff", "", '{"a": }'])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(InputError, match=r"^f cannot be read as JSON"):
        parse_json(text, "f")


def test_a_byte_order_mark_is_ignored():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "f") == parse_json('\ufeff{"a": 1}', "f") == {"a": 1}


def test_files(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    path.write_text('{"width": 3}')
    assert read_json(path, Header) == {"width": 3}
    with pytest.raises(InputError, match="is missing; download it again"):
        read_json(tmp_path / "g.json", Header)
    with pytest.raises(InputError, match="cannot be read: Is a directory; write it again"):
        read_json(tmp_path, Header, "write it again")
    with pytest.raises(InputError, match="File name too long"):
        read_json(tmp_path / ("x" * 300), Header)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a file"):  # reading one would wait for ever
        read_json(tmp_path / "pipe", Header)
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 5)
    with pytest.raises(InputError, match="has 12 bytes, expected at most 5"):
        read_json(path, Header)
