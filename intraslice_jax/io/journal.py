"""The journal of a pruning run: all that an interrupted run needs to go on, beside the output.

    OUT.journal/
        run.json           what the run is of (`identity.run_identity`)
        NAME.json          facts, such as the ratios
        NAME/              sums that grow during a pass over the text: arrays.safetensors, facts.json, SHA256SUMS
        layers/00007/      a pruned layer: state/ (Orbax), facts.json, SHA256SUMS
        streams/00007/     likewise the residual stream behind it; the latest two are kept
        NAME/00007/        likewise what is learned of all layers, after so many steps; the latest one is kept

Everything appears under its name only when it is complete and on the disk, and is checked by digest before it is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io.atomic import flush, flush_one, write_bytes
from intraslice_jax.io.digests import damage, write_digests
from intraslice_jax.io.streaming import StreamedArrays, frugal, write_streamed
from intraslice_jax.parallel.distributed import from_first, is_first, shared_folder

log = logging.getLogger(__name__)

VERSION = 1
KEPT_STREAMS = 2


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
        self._lock: IO[str] | None = None
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
        if is_first():
            if self._anew:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._layers_done = self._check() if self._folder.exists() else 0
        self._layers_done = int(from_first(np.int32(self._layers_done)))
        if self._layers_done:
            log.warning("%s: going on behind layer %d", self._folder, self._layers_done - 1)

    def get(self, name: str) -> Any:
        """A fact.

        Raises:
            InputError: it is damaged.
        """
        path = self._folder / f"{name}.json"
        return _read_sealed(path) if path.exists() else None

    def put(self, name: str, fact: Any) -> None:
        """Keeps a fact."""
        if is_first():
            self._create()
            self._write_sealed(name, fact)

    def get_arrays(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The latest arrays and their facts; what is damaged is left out, with a warning."""
        entry = self._folder / name
        if not entry.is_dir():
            return None
        problem = _damage(entry)
        if problem is not None:
            log.warning("%s; that pass over the text begins again", problem)
            return None
        return load_file(entry / "arrays.safetensors"), _facts(entry)

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

        self._write_entry(self._folder / name, write, facts)

    def drop_arrays(self, name: str) -> None:
        """Forgets them."""
        if is_first():
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def get_state(self, name: str) -> tuple[Mapping[str, np.ndarray], dict[str, Any]] | None:
        """The latest state; one that is damaged is left out, with a warning."""
        step = int(from_first(np.int32(self._sound_state(name) if is_first() else -1)))
        if step < 0:
            return None
        log.warning("%s: going on behind step %d of the %s", self._folder, step, name)
        entry = self._entry(name, step)
        return _stored(entry), _facts(entry)

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
            self._write_entry(self._entry(name, step), write, facts)
            if is_first():
                self._drop_before(name, step)

        if jax.process_count() > 1:
            keep()
        else:  # a signal then ends the run, but not the writing
            self._in_background(keep)
            self.flush()

    def layer(self, index: int) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
        """A finished layer."""
        self.flush()
        entry = self._entry("layers", index)
        return _stored(entry), _facts(entry)

    def stream(self, like: Sequence[Array]) -> tuple[list[Array], dict[str, Any]]:
        """The stream behind the last finished layer, on the devices of `like`."""
        entry = self._entry("streams", self._layers_done - 1)
        wanted = {_name(i): jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for i, a in enumerate(like)}
        found = ocp.load(str(entry.absolute() / "state"), wanted) if wanted else {}
        return [found[name] for name in wanted], _facts(entry)

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
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Removes the folder, once its output is there."""
        self.close()
        if is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _entry(self, kind: str, index: int) -> Path:
        return self._folder / kind / _name(index)

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
        self._take_lock()
        self._write_sealed("run", {"version": VERSION, **(self._run or {})})

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        self._lock = open(self._folder / "lock", "w")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self._folder} is in use by another run; wait for it, or choose another output"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); make sure that no other run uses it", self._folder, error)

    def _write_sealed(self, name: str, content: Any) -> None:
        path = self._folder / f"{name}.json"
        try:
            write_bytes(path, json.dumps({"content": content, "sha256": _seal(content)}, indent=2).encode())
            flush_one(path)
            flush_one(self._folder)
        except OSError as error:
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
        self._write_entry(self._entry("layers", index), _orbax(arrays), facts)
        self._write_entry(self._entry("streams", index), _orbax(stream), stream_facts)
        if is_first():
            self._drop_before("streams", index - KEPT_STREAMS + 1)

    def _write_entry(self, entry: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
        try:
            with shared_folder(entry, overwrite=True) as work:
                write(work)
                if is_first():
                    (work / "facts.json").write_text(json.dumps(facts))
                    write_digests(work, ".")
                    flush(work)
            if is_first():
                flush_one(entry.parent)
        except Exception as error:  # Orbax raises many kinds
            raise self._unwritable(entry, error) from error

    def _unwritable(self, path: Path, error: BaseException) -> RunError:
        text = str(error)
        # tensorstore says it in the middle of a long message.
        found = "no space left on device" if "space left" in text else " ".join(text.split())[:300]
        return RunError(f"{path} cannot be written: {found}; what {self._folder} held before is intact")

    def _check(self) -> int:
        """How many layers can be relied on, and takes the lock; only the first process calls it."""
        run = _read_sealed(self._folder / "run.json")
        self._take_lock()
        self._compare({"version": VERSION, **(self._run or {})}, run)
        for left in self._folder.glob("*/.*"):  # of a killed run
            shutil.rmtree(left, ignore_errors=True)
        streams = sorted(self._numbers("streams"), reverse=True)
        problems: list[str] = []
        sound = 0
        for last in streams:
            problem = _damage(self._entry("streams", last))
            while problem is None and sound <= last:
                problem = _damage(self._entry("layers", sound))
                sound += problem is None
            if problem is None:
                for other in problems:
                    log.warning("%s; the state before it is used", other)
                return last + 1
            problems.append(problem)
        if problems or len(self._numbers("layers")) > 1:
            what = problems[0] if problems else f"{self._folder / 'streams'} is missing"
            raise InputError(f"{what}, and there is no other state to go on from; start anew with --overwrite")
        return 0

    def _sound_state(self, name: str) -> int:
        """The step of the latest state that can be relied on, -1 if there is none."""
        for step in sorted(self._numbers(name), reverse=True):
            problem = _damage(self._entry(name, step))
            if problem is None:
                return step
            log.warning("%s; what was learned since the state before it is learned again", problem)
        return -1

    def _drop_before(self, part: str, index: int) -> None:
        for old in self._numbers(part):
            if old < index:
                shutil.rmtree(self._entry(part, old), ignore_errors=True)

    def _numbers(self, part: str) -> list[int]:
        return [int(path.name) for path in (self._folder / part).glob("[0-9]*")]

    def _compare(self, expected: Mapping[str, Any], found: Any) -> None:
        want, have = dict(_flat(expected)), dict(_flat(found))
        for name in (*want, *have):
            if (name in want) != (name in have) or want[name] != have[name]:
                raise InputError(
                    f"{self._folder} is of another run: {name} was {have.get(name, 'absent')}, now it is "
                    f"{want.get(name, 'absent')}; give the same options, or start anew with --overwrite"
                )


def _name(index: int) -> str:
    return f"{index:05d}"


def _orbax(arrays: Mapping[str, Any]) -> Callable[[Path], None]:
    """What writes these arrays into an entry."""

    def write(work: Path) -> None:
        if arrays:
            with frugal():
                ocp.save(str(work.absolute() / "state"), dict(arrays))

    return write


def _stored(entry: Path) -> StreamedArrays:
    state = str(entry.absolute() / "state")
    found: Mapping[str, Any] = ocp.metadata(state).metadata
    return StreamedArrays(state, {k: jax.ShapeDtypeStruct(tuple(a.shape), a.dtype) for k, a in found.items()})


def _facts(entry: Path) -> dict[str, Any]:
    return json.loads((entry / "facts.json").read_text())


def _damage(entry: Path) -> str | None:
    if not entry.is_dir():
        return f"{entry} is missing"
    problem = damage(entry, ".")
    return None if problem is None else f"{entry} is damaged ({problem})"


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_sealed(path: Path) -> Any:
    try:
        data = json.loads(path.read_text())
        if data["sha256"] == _seal(data["content"]):
            return data["content"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is missing or damaged, so the run cannot be continued; start anew with --overwrite")


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves by dotted path."""
    if not isinstance(tree, Mapping):
        return [(prefix, tree)]
    return [leaf for key in tree for leaf in _flat(tree[key], f"{prefix}.{key}" if prefix else str(key))]
