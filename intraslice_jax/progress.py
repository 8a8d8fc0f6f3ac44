"""How far a run is: a bar on a terminal; elsewhere one line per layer, and nothing for evaluation windows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from intraslice_jax.prune.pipeline import LayerRecord


class PruneProgress(NamedTuple):
    """What to call while a model is pruned."""

    on_layer: Callable[[LayerRecord], None]
    """After each layer."""
    on_batch: Callable[[int, int], None]
    """With the steps done and their number, before the first layer (ratios) and after the last (refinement)."""


@contextmanager
def prune_progress(layers: int, console: Console | None = None) -> Iterator[PruneProgress]:
    """Yields the functions to call; output goes to standard error."""
    console = console or Console(stderr=True)
    clock = _Clock(layers)
    if not console.is_terminal:

        def line(record: LayerRecord) -> None:
            print(clock.line(record), file=sys.stderr, flush=True)

        def batch_line(done: int, total: int) -> None:
            if done * 4 // total > (done - 1) * 4 // total:  # a line at every quarter
                print(f"{clock.stage}: {done} of {total}", file=sys.stderr, flush=True)

        yield PruneProgress(line, batch_line)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remaining]}"),
        TextColumn("{task.fields[shape]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, left: str = "", shape: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, remaining="", shape="")
            progress.update(tasks[stage], completed=done, remaining=left, shape=shape)

        def show_layer(record: LayerRecord) -> None:
            left = clock.remaining(record.layer + 1)
            show("pruning", record.layer + 1, layers, f"{duration(left)} left", describe(record))

        yield PruneProgress(show_layer, lambda done, total: show(clock.stage, done, total))


@contextmanager
def window_progress(label: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields the function to call with the windows done and their total."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remaining]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, remaining="")
        started = time.monotonic()

        def show(done: int, total: int) -> None:
            left = (time.monotonic() - started) / done * (total - done)
            progress.update(task, completed=done, total=total, remaining=f"{duration(left)} left")

        yield show


def describe(record: LayerRecord) -> str:
    """What a layer kept, and the relative errors of its modules' outputs."""
    return (
        f"layer {record.layer}: {record.query_heads} heads ({record.kv_heads} KV), widths "
        f"{record.qk_head_dim}/{record.v_head_dim}, MLP {record.intermediate_size}; "
        f"errors {record.attention_error:.3f}, {record.mlp_error:.3f}"
    )


def duration(seconds: float) -> str:
    """`7 s` or `3 min 07 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class _Clock:
    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._started = time.monotonic()
        self._seen = 0
        """Layers of this run: a continued one begins later."""

    @property
    def stage(self) -> str:
        """What is done between the layers' records."""
        return "refining" if self._seen else "measuring sensitivity"

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def remaining(self, done: int) -> float:
        self._seen += 1
        return self.elapsed() / self._seen * (self._layers - done)

    def line(self, record: LayerRecord) -> str:
        done = record.layer + 1
        times = f"{duration(self.elapsed())} elapsed, {duration(self.remaining(done))} left"
        return f"[{done}/{self._layers}] {describe(record)}; {times}"
