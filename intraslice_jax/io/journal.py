"""The journal of a pruning run: all that an interrupted run needs to go on, beside the output.

    OUT.journal/
        run.json           what the run is of (`identity.run_identity`)
        NAME.json          facts, such as the ratios
        NAME/              sums that grow during a pass over the text: arrays.safetensors, entry.json, SHA256SUMS
        layers/00007/      a pruned layer: state/ (Orbax), entry.json, SHA256SUMS
        streams/00007/     likewise the residual stream behind it; the latest two are kept
        NAME/00007/        likewise what is learned of all layers, after so many steps; the latest one is kept

Everything appears under its name only when it is complete and on the disk, and is checked by digest before it is used.
An entry.json says which part of which run it is, so that none stands for another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp
from pydantic import Field, StringConstraints
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from typing_extensions import TypedDict

from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io.atomic import flush, flush_one, write_bytes
from intraslice_jax.io.digests import damage, write_digests
from intraslice_jax.io.lock import Lock
from intraslice_jax.io.streaming import StreamedArrays, frugal, not_empty, settled, write_failure, write_streamed
from intraslice_jax.parallel.distributed import from_first, is_first, shared_folder
from intraslice_jax.reading import Index, Schema, check, read_json

log = logging.getLogger(__name__)

T = TypeVar("T")

VERSION = 2
KEPT_STREAMS = 2
ANEW = "remove the folder of the journal to start anew"

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Sealed(TypedDict):
    """A NAME.json."""

    content: Any
    sha256: Digest


class Described(TypedDict):
    """An array of an entry."""

    shape: Annotated[tuple[Index, ...], Field(max_length=64)]  # NumPy has no more dimensions
    dtype: Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "uint32", "bool"]


class Entry(TypedDict):
    """An entry.json.

    Attributes:
        part: where in the journal it is, such as layers/00007.
        run: seal of the run.json beside which it was written.
        arrays: all of them, those of size zero included.
        facts: what `RunLog` calls so.
    """

    part: str
    run: Digest
    arrays: dict[str, Described]
    facts: Any


class Journal:
    """Keeps the state of one run in a folder; see `prune.resume.RunLog`.

    One process writes layers and states in the background, in order; several write together, and wait.

    Args:
        folder: the journal's; all hosts must see it.
        anew: forget what is there.
    """

    def __init__(self, folder: str | Path, anew: bool = False):
        self._folder, self._anew = Path(folder), anew
        self._run: dict[str, Any] | None = None
        self._layers_done = 0
        self._lock = Lock(self._folder / "lock", self._folder)
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    @property
    def layers_done(self) -> int:
        return self._layers_done

    def begin(self, run: Mapping[str, Any]) -> None:
        """Finds out where to go on. Nothing is written before there is something to keep.

        Args:
            run: JSON-serialisable facts, nested by name, that the interrupted run must share.

        Raises:
            InputError: the journal is of another run, in use or damaged beyond the state before the last.
        """
        self._run = dict(run)
        if is_first() and self._folder.exists():
            if not self._folder.is_dir():
                raise InputError(f"{self._folder} is not a folder; move it away, or choose another output")
            self._lock.take()
            if self._anew:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._lock.release()
            else:
                self._layers_done = self._check()
        self._layers_done = int(from_first(np.int32(self._layers_done)))
        if self._layers_done:
            log.warning("%s: going on behind layer %d", self._folder, self._layers_done - 1)

    def get(self, name: str, schema: Schema[T]) -> T | None:
        """A fact.

        Raises:
            InputError: it is damaged.
        """
        path = self._folder / f"{name}.json"
        return check(_read_sealed(path), schema, str(path)) if path.exists() else None

    def put(self, name: str, fact: Any) -> None:
        """Keeps a fact."""
        if is_first():
            self._create()
            self._write_sealed(name, fact)

    def get_arrays(self, name: str, schema: Schema[T]) -> tuple[dict[str, np.ndarray], T] | None:
        """The latest arrays and their facts; what is damaged is left out, with a warning."""
        if not (self._folder / name).is_dir():
            return None
        problem = self._problem(name)
        if problem is None:
            try:
                described, facts = self._read(name, schema)
                arrays = load_file(self._folder / name / "arrays.safetensors")
                if described == {key: _abstract(array) for key, array in arrays.items()}:
                    return arrays, facts
                problem = f"{self._folder / name} holds other arrays than it should"
            except (InputError, SafetensorError, OSError) as error:
                problem = f"{self._folder / name} is damaged ({error})"
        log.warning("%s; that pass over the text begins again", problem)
        return None

    def put_arrays(self, name: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Keeps arrays that all processes have; the first writes them.

        Raises:
            RunError: they cannot be written.
        """
        if is_first():
            self._create()

        def write(work: Path) -> None:
            if is_first():
                save_file(dict(arrays), work / "arrays.safetensors")

        self._write_entry(name, write, arrays, facts)

    def drop_arrays(self, name: str) -> None:
        """Forgets them."""
        if is_first():
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def get_state(self, name: str, schema: Schema[T]) -> tuple[Mapping[str, np.ndarray], T] | None:
        """The latest state; one that is damaged is left out, with a warning."""
        step = int(from_first(np.int32(self._sound_state(name) if is_first() else -1)))
        if step < 0:
            return None
        log.warning("%s: going on behind step %d of the %s", self._folder, step, name)
        return self._stored(_part(name, step), schema)

    def put_state(self, name: str, step: int, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Keeps a state instead of those before it, array by array, and waits until it is on the disk.

        Raises:
            RunError: it cannot be written.
        """
        self.flush()

        def write(work: Path) -> None:
            abstract = {key: jax.ShapeDtypeStruct(a.shape, a.dtype) for key, a in arrays.items()}
            write_streamed(work.absolute() / "state", arrays.items(), abstract)

        def keep() -> None:
            if is_first():
                self._create()
            self._write_entry(_part(name, step), write, arrays, facts)
            if is_first():
                self._drop_before(name, step)

        if jax.process_count() > 1:
            keep()
        else:  # a signal then ends the run, but not the writing
            self._in_background(keep)
            self.flush()

    def layer(self, index: int, schema: Schema[T]) -> tuple[Mapping[str, np.ndarray], T]:
        """A finished layer."""
        self.flush()
        return self._stored(_part("layers", index), schema)

    def stream(self, like: Sequence[Array], schema: Schema[T]) -> tuple[list[Array], T]:
        """The stream behind the last finished layer, on the devices of `like`.

        Raises:
            InputError: it is of other shapes, or damaged.
        """
        part = _part("streams", self._layers_done - 1)
        described, facts = self._read(part, schema)
        wanted = {_name(i): jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for i, a in enumerate(like)}
        if described != {name: _abstract(a) for name, a in wanted.items()}:
            raise InputError(f"{self._folder / part} is of another stream than this run's; {ANEW}")
        found = dict(zip(wanted, like, strict=True))  # those of size zero are what they should be
        if not_empty(wanted):
            try:
                with settled():
                    found |= ocp.load(str(self._folder.absolute() / part / "state"), not_empty(wanted))
            except Exception as error:  # Orbax raises many kinds
                text = " ".join(str(error).split())[:200]
                raise InputError(f"{self._folder / part} cannot be read ({text}); {ANEW}") from error
        return [found[name] for name in wanted], facts

    def layer_done(
        self,
        index: int,
        arrays: Mapping[str, Array],
        facts: Mapping[str, Any],
        stream: Sequence[Array],
        stream_facts: Mapping[str, Any],
    ) -> None:
        """Keeps a layer and the stream behind it.

        Raises:
            RunError: this or the layer before cannot be written.
        """
        self.flush()
        named: dict[str, Any] = {_name(i): batch for i, batch in enumerate(stream)}
        if jax.process_count() > 1:
            self._write_layer(index, dict(arrays), facts, named, stream_facts)
            return
        # Taken to the host before this returns: the arrays may be given to a compiled function for good.
        host, named = ({k: np.asarray(a) for k, a in tree.items()} for tree in (arrays, named))
        self._in_background(self._write_layer, index, host, facts, named, stream_facts)

    def flush(self) -> None:
        """Waits until the last layer is on the disk.

        Raises:
            RunError: it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for what is being written, whatever becomes of it, and lets other runs use the folder."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.exception() is not None:
            log.warning("%s", pending.exception())
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
        self._lock.release()

    def remove(self) -> None:
        """Removes the folder, once its output is there."""
        self.close()
        if is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _in_background(self, write: Callable[..., None], *arguments: Any) -> None:
        self._writer = self._writer or ThreadPoolExecutor(1, "journal")
        self._pending = self._writer.submit(write, *arguments)

    def _create(self) -> None:
        if (self._folder / "run.json").exists():
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(self._folder, error) from error
        self._lock.take()
        self._write_sealed("run", self._identity())

    def _identity(self) -> dict[str, Any]:
        return {"version": VERSION, **(self._run or {})}

    def _write_sealed(self, name: str, content: Any) -> None:
        path = self._folder / f"{name}.json"
        try:
            write_bytes(path, json.dumps({"content": content, "sha256": _seal(content)}, indent=2).encode())
            flush_one(path)
            flush_one(self._folder)
        except (OSError, InputError, RunError) as error:
            raise self._unwritable(path, error) from error

    def _write_layer(
        self,
        index: int,
        arrays: Mapping[str, Any],
        facts: Mapping[str, Any],
        stream: Mapping[str, Any],
        stream_facts: Mapping[str, Any],
    ) -> None:
        if is_first():
            self._create()
        # In this order: a stream is of use only with all layers before it.
        self._write_entry(_part("layers", index), _orbax(arrays), arrays, facts)
        self._write_entry(_part("streams", index), _orbax(stream), stream, stream_facts)
        if is_first():
            self._drop_before("streams", index - KEPT_STREAMS + 1)

    def _write_entry(
        self, part: str, write: Callable[[Path], None], arrays: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        path = self._folder / part
        entry = {
            "part": part,
            "run": _seal(self._identity()),
            "arrays": {name: _abstract(array) for name, array in arrays.items()},
            "facts": facts,
        }
        try:
            with shared_folder(path, overwrite=True) as work:
                write(work)
                if is_first():
                    (work / "entry.json").write_text(json.dumps(entry))
                    write_digests(work, ".")
                    flush(work)
            if is_first():
                flush_one(path.parent)
        except Exception as error:  # Orbax raises many kinds
            raise self._unwritable(path, error) from error

    def _unwritable(self, path: Path, error: BaseException) -> RunError:
        said = error if isinstance(error, InputError | RunError) else write_failure(path, error)
        return RunError(f"{said}; what {self._folder} held before is intact")

    def _read(self, part: str, schema: Schema[T]) -> tuple[dict[str, Described], T]:
        """The arrays of an entry, described, and its facts.

        Raises:
            InputError: it is damaged, or another part or of another run.
        """
        path = self._folder / part / "entry.json"
        entry = read_json(path, Entry, ANEW)
        if (entry["part"], entry["run"]) != (part, _seal(self._identity())):
            found = f"{part} of another run" if entry["part"] == part else entry["part"][:60]
            raise InputError(f"{path} was written for {found}; {ANEW}")
        return entry["arrays"], check(entry["facts"], schema, f"{path}: facts")

    def _stored(self, part: str, schema: Schema[T]) -> tuple[StreamedArrays, T]:
        described, facts = self._read(part, schema)
        state = str(self._folder.absolute() / part / "state")
        return StreamedArrays(
            state, {k: jax.ShapeDtypeStruct(a["shape"], jnp.dtype(a["dtype"])) for k, a in described.items()}
        ), facts

    def _problem(self, part: str) -> str | None:
        """What is wrong with an entry, in words; None if it is as it was written."""
        path = self._folder / part
        if not path.is_dir():
            return f"{path} is missing"
        problem = damage(path, ".")
        if problem is not None:
            return f"{path} is damaged ({problem})"
        try:
            self._read(part, dict[str, Any])
        except InputError as error:
            return str(error).removesuffix(f"; {ANEW}")
        return None

    def _check(self) -> int:
        """How many layers can be relied on; only the first process calls it."""
        self._compare(self._identity(), _read_sealed(self._folder / "run.json"))
        for left in self._folder.glob("*/.*"):  # of a killed run
            shutil.rmtree(left, ignore_errors=True)
        streams = sorted(self._numbers("streams"), reverse=True)
        problems: list[str] = []
        sound = 0
        for last in streams:
            problem = self._problem(_part("streams", last))
            while problem is None and sound <= last:
                problem = self._problem(_part("layers", sound))
                sound += problem is None
            if problem is None:
                for other in problems:
                    log.warning("%s; the state before it is used", other)
                return last + 1
            problems.append(problem)
        if problems or len(self._numbers("layers")) > 1:
            what = problems[0] if problems else f"{self._folder / 'streams'} is missing"
            raise InputError(f"{what}, and there is no other state to go on from; {ANEW}")
        return 0

    def _sound_state(self, name: str) -> int:
        """The step of the latest state that can be relied on, -1 if there is none."""
        for step in sorted(self._numbers(name), reverse=True):
            problem = self._problem(_part(name, step))
            if problem is None:
                return step
            log.warning("%s; what was learned since the state before it is learned again", problem)
        return -1

    def _drop_before(self, part: str, index: int) -> None:
        for old in self._numbers(part):
            if old < index:
                shutil.rmtree(self._folder / _part(part, old), ignore_errors=True)

    def _numbers(self, part: str) -> list[int]:
        return [int(path.name) for path in (self._folder / part).glob("*") if re.fullmatch(r"[0-9]{5,9}", path.name)]

    def _compare(self, expected: Mapping[str, Any], found: Any) -> None:
        want, have = dict(_flat(expected)), dict(_flat(found))
        for name in (*want, *have):
            if (name in want) != (name in have) or want[name] != have[name]:
                raise InputError(
                    f"{self._folder} is of another run: {name[:100]} was {str(have.get(name, 'absent'))[:100]}, now it "
                    f"is {str(want.get(name, 'absent'))[:100]}; give the same options, or {ANEW}"
                )


def _name(index: int) -> str:
    return f"{index:05d}"


def _part(kind: str, index: int) -> str:
    return f"{kind}/{_name(index)}"


def _abstract(array: Any) -> Described:
    return {"shape": tuple(array.shape), "dtype": jnp.dtype(array.dtype).name}  # pyright: ignore[reportReturnType]


def _orbax(arrays: Mapping[str, Any]) -> Callable[[Path], None]:
    """What writes these arrays into an entry."""

    def write(work: Path) -> None:
        if not_empty(arrays):
            with frugal(), settled():
                ocp.save(str(work.absolute() / "state"), not_empty(arrays))

    return write


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_sealed(path: Path) -> Any:
    try:
        data = read_json(path, Sealed)
        if data["sha256"] == _seal(data["content"]):
            return data["content"]
    except ValueError:  # whatever is wrong with it
        pass
    raise InputError(f"{path} is missing or damaged, so the run cannot be continued; {ANEW}")


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves by dotted path."""
    if not isinstance(tree, Mapping):
        return [(prefix, tree)]
    return [leaf for key in tree for leaf in _flat(tree[key], f"{prefix}.{key}" if prefix else str(key))]
