"""Damaged and hostile files: valid examples, changed at random, must be read or refused in one line, and soon.

Each module beside this one names its formats in a function `targets()`. `test_fuzz.py` tries some of each in seconds;
`python -m tests.fuzz.run --count 20000` tries as many as wanted and prints a table.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from intraslice_jax.errors import InputError

Mutation = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A format, one of the ways in which its files are read, and how to damage them.

    Attributes:
        name: the format, as the table counts it.
        example: writes a valid example below an empty folder and returns the file in it that is damaged.
        read: what a user does with the folder's content; given the folder.
        mutations: ways to damage the file, one of which is drawn each time.
    """

    name: str
    example: Callable[[Path], Path]
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...]


@dataclass
class Outcome:
    """What happened to the files of a format.

    Attributes:
        counts: how many were `read`, `refused` (an InputError of one line), `failed` or `hung`.
        failures: of each kind of failure one example: the damaged content and the traceback.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, tuple[bytes, str]] = field(default_factory=dict)


class _Hang(BaseException):
    """The time for one file is over."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(target: Target, folder: Path, count: int, seed: int = 0, seconds: float = 20.0) -> Outcome:
    """Reads `count` damaged copies of the target's example.

    Args:
        target: the format.
        folder: an empty folder for the example.
        count: how many copies.
        seed: which copies.
        seconds: for one copy, after which it counts as hung.
    """
    file = target.example(folder)
    original = file.read_bytes()
    target.read(folder)  # the example itself is valid
    outcome = Outcome()
    for case in range(count):
        rng = random.Random(f"{target.name} {seed} {case}")
        content = rng.choice(target.mutations)(rng, original)
        file.write_bytes(content)
        try:
            with _at_most(seconds):
                target.read(folder)
            kind = "read"
        except InputError as error:
            kind = "refused"
            if "\n" in str(error).strip() or len(str(error)) > 2000:
                kind = "failed"
                outcome.failures["a refusal of several lines"] = content, str(error)
        except _Hang:
            kind = "hung"
            outcome.failures["hang"] = content, traceback.format_exc()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is no Exception
            kind = "failed"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            outcome.failures[f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"] = (
                content,
                traceback.format_exc(),
            )
        outcome.counts[kind] += 1
    file.write_bytes(original)
    return outcome


HOSTILE = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", " ", "64", "x" * 300, "\u0000", "é", "../../etc", "🦙", [], [[]], {}, [None], ["a"], [1, 2],
    {"a": 1}, [0] * 1000,
)  # fmt: skip
"""Values that stand where others are expected."""


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """One to three values of a JSON document replaced, left out, moved, or nested thousands deep."""
    data = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(_paths(data))
        if not path:
            data = rng.choice((data, *copy.deepcopy(HOSTILE)))
            continue
        parent = data
        for step in path[:-1]:
            parent = parent[step]
        action = rng.random()
        if action < 0.65:
            parent[path[-1]] = copy.deepcopy(rng.choice(HOSTILE))  # it may be damaged in its turn
        elif action < 0.8:
            del parent[path[-1]]
        elif action < 0.9 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "0", path[-1] * 2))] = parent[path[-1]]
        else:
            values = [_at(data, other) for other in _paths(data)]
            parent[path[-1]] = json.loads(json.dumps(rng.choice(values)))
    text = json.dumps(data)
    if rng.random() < 0.03:
        depth = rng.choice((50, 500, 5_000, 100_000))
        text = text.replace("null", "[" * depth + "]" * depth, 1) if "null" in text else "[" * depth + "]" * depth
    return text.encode("utf-8", "surrogatepass")


def _paths(data: object, prefix: tuple = ()) -> list[tuple]:
    """Where values are; of long lists the first few."""
    found = [prefix]
    if isinstance(data, dict):
        for key in data:
            found += _paths(data[key], (*prefix, key))
    elif isinstance(data, list):
        for i in range(min(len(data), 4)):
            found += _paths(data[i], (*prefix, i))
    return found


def _at(data, path: tuple):
    for step in path:
        data = data[step]
    return data


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed, left out, repeated or put in; the file cut off, emptied, or turned into another kind."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        action = rng.randrange(7)
        if action == 0:
            data[at : at + length] = rng.randbytes(length)
        elif action == 1:
            data[at : at + length] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * length
        elif action == 2:
            del data[at : at + length]
        elif action == 3:
            data[at:at] = data[at : at + length]
        elif action == 4:
            data[at:at] = rng.choice((b"[", b"{", b'"', b"\n", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"-", b"9" * 40))
        elif action == 5 and rng.random() < 0.3:
            del data[at:]
        elif action == 6 and rng.random() < 0.1:
            data = bytearray(
                rng.choice((b"", b"\x00" * 100, b"PK\x03\x04", b"\x1f\x8b\x08", b"version https://git-lfs"))
            )
    return bytes(data)
