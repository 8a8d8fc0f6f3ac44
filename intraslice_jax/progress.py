"""How far a run is and how long it will still take: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from intraslice_jax.prune.pipeline import LayerRecord

LAYERS = "layers"
"""The stage that prunes them: each has a line of its own."""

TRUST = 2
"""After so many steps of a stage, their pace counts as much as what was expected of it."""

SILENCE = 60.0
"""Seconds after which a stage that moves says so outside a terminal; quarters are told in any case."""


class Timeline:
    """How long the rest of a run takes, from what is expected of its stages and what was seen of them so far.

    Args:
        expected: seconds of each stage, in their order. Stages that are told of without being here take no time
            beyond their own.
        now: the clock, in seconds.
    """

    def __init__(self, expected: Mapping[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._started = now()
        self._fraction = 0.0
        self._finished: dict[str, tuple[float, float]] = {}
        """Of stages that are over: expected and real seconds."""
        self.stage, self.total = "", 0
        self._marks: list[tuple[int, float]] = []
        """Steps done and when, the first being where this run took the stage up."""
        self.expect(expected)

    def expect(self, expected: Mapping[str, float]) -> None:
        """Replaces what is expected of the stages."""
        self.expected = dict(expected)

    def tell(self, stage: str, done: int, total: int) -> None:
        """The first call of a stage says where this run takes it up; a total of 0 is unknown.

        A run that continues another one thus counts only what is left.
        """
        now = self._now()
        if stage != self.stage:
            if self.stage:
                self._finished[self.stage] = (self._share() * self.expected.get(self.stage, 0.0), now - self._began)
            self.stage, self._marks = stage, []
        self.total = total
        self._marks.append((done, now))

    @property
    def done(self) -> int:
        """Steps of the current stage, those of earlier runs included."""
        return self._marks[-1][0] if self._marks else 0

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._now() - self._started

    def left(self) -> float:
        """Seconds that the current stage and the later ones are likely to take."""
        return sum(self.by_stage().values(), 0.0)

    def by_stage(self) -> dict[str, float]:
        """The same for each of them."""
        names = list(self.expected)
        later = names[names.index(self.stage) + 1 :] if self.stage in names else names
        slowness = self._slowness()
        found = {self.stage: self._left_in_stage()} if self.stage else {}
        return found | {
            name: slowness * self.expected[name] for name in later if name not in self._finished and name != self.stage
        }

    def fraction(self) -> float:
        """The part of the run's time that is over; it never falls."""
        elapsed, left = self.elapsed(), self.left()
        self._fraction = max(self._fraction, elapsed / (elapsed + left) if elapsed + left else 0.0)
        return self._fraction

    @property
    def _began(self) -> float:
        return self._marks[0][1]

    def _share(self) -> float:
        """The part of the current stage that is this run's."""
        return (self.total - self._marks[0][0]) / self.total if self.total else 1.0

    def _left_in_stage(self) -> float:
        since = self._now() - self._marks[-1][1]
        if not self.total:
            return max(0.0, self._slowness() * self.expected.get(self.stage, 0.0) - since)
        pace = self._pace()
        return max(0.0, pace * (self.total - self.done) - min(since, pace))

    def _pace(self) -> float:
        """Seconds of a step: what was expected and what was seen, by their weights as logarithms.

        Only the later half of the steps counts: the first ones compile.
        """
        expected = self.expected.get(self.stage, 0.0) * self._slowness(False) / self.total
        steps = self.done - self._marks[0][0]
        if not steps:
            return expected
        half = bisect.bisect_right(self._marks, self.done - steps / 2, key=lambda mark: mark[0])
        first = self._marks[half - 1]
        seen = (self._marks[-1][1] - first[1]) / (self.done - first[0])
        if not (expected and seen):
            return seen
        return math.exp((TRUST * math.log(expected) + steps * math.log(seen)) / (TRUST + steps))

    def _slowness(self, current: bool = True) -> float:
        """Real seconds for an expected one; a tenth of what is expected in all counts as seen to be as expected."""
        prior = 0.1 * sum(self.expected.values())
        expected, real = prior, prior
        for wanted, took in self._finished.values():
            if wanted:
                expected, real = expected + wanted, real + took
        wanted = self.expected.get(self.stage, 0.0)
        if current and wanted and self.total and self._marks:
            part = (self.done - self._marks[0][0]) / self.total
            expected, real = expected + part * wanted, real + part * self.total * self._pace()
        return real / expected if expected else 1.0


class RunProgress:
    """What to call while a run goes on.

    Args:
        console: where to print.
        timeline: of the run.
        display: the bar on a terminal; None prints lines.
    """

    def __init__(self, console: Console, timeline: Timeline, display: _Display | None) -> None:
        self._console, self.timeline, self.display = console, timeline, display
        self._announced = False
        self._quarters, self._printed = 0, timeline.elapsed()

    def expect(self, expected: Mapping[str, float]) -> None:
        """Seconds of the stages, once they can be estimated."""
        self.timeline.expect(expected)

    def tell(self, stage: str, done: int, total: int) -> None:
        """As `Timeline.tell`. The first time that it is about a stage with an estimate, that of the run is printed."""
        timeline = self.timeline
        new = stage != timeline.stage
        timeline.tell(stage, done, total)
        if not self._announced and stage in timeline.expected:
            self._announced = True
            self._print(estimate_line(timeline.by_stage()))
        if self.display is None and total and stage != LAYERS:
            quarters = 4 * done // total
            if not new and (quarters > self._quarters or timeline.elapsed() - self._printed >= SILENCE):
                self._print(f"[{stage} {done}/{total}] {_how_far(timeline)}")
            self._quarters = quarters

    def on_layer(self, record: LayerRecord) -> None:
        """After each layer, when its stage was told of it."""
        if self.display is not None:
            self.display.below = f"layer {record.layer}: {describe(record)}"
        else:
            self._print(f"[{record.layer + 1}/{self.timeline.total}] {describe(record)}; {_how_far(self.timeline)}")

    def _print(self, line: str) -> None:
        self._printed = self.timeline.elapsed()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def run_progress(console: Console | None = None, now: Callable[[], float] = time.monotonic) -> Iterator[RunProgress]:
    """Yields the functions to call; output goes to standard error."""
    console = console or Console(stderr=True)
    timeline = Timeline({}, now)
    if not console.is_terminal:
        yield RunProgress(console, timeline, None)
        return
    display = _Display(timeline)
    with Live(display, console=console, refresh_per_second=4):
        yield RunProgress(console, timeline, display)


@contextmanager
def window_progress(label: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields the function to call with the windows done and their total; shows nothing but on a terminal."""
    console = console or Console(stderr=True)
    timeline = Timeline({})
    timeline.tell(label, 0, 0)
    shown = Live(_Display(timeline), console=console, refresh_per_second=4, transient=True)
    with shown if console.is_terminal else nullcontext():
        yield lambda done, total: timeline.tell(label, done, total)


class _Display:
    """Stage, bar and time left in one line, computed anew whenever it is drawn; and a line below them."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.below = ""

    def __rich__(self) -> RenderableType:
        timeline = self.timeline
        counts = f" {timeline.done}/{timeline.total}" if timeline.total else ""
        known = timeline.total > 0 or timeline.left() > 0
        bar = ProgressBar(1.0, timeline.fraction() if known else 0.0, pulse=not known)
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        grid.add_row(timeline.stage + counts, bar, _how_far(timeline) if known else about(timeline.elapsed()))
        return Group(grid, Text(self.below, style="dim", no_wrap=True, overflow="ellipsis")) if self.below else grid


def _how_far(timeline: Timeline) -> str:
    return f"{100 * timeline.fraction():.0f} % done, {about(timeline.left())} left"


def estimate_line(by_stage: Mapping[str, float]) -> str:
    """`[about 3 min] ratios 1 min, layers 50 s, refinement 1 min`."""
    parts = ", ".join(f"{name} {about(seconds)}" for name, seconds in by_stage.items() if seconds >= 0.5)
    return f"[about {about(sum(by_stage.values()))}] {parts}"


def describe(record: LayerRecord) -> str:
    """What a layer kept, and the relative errors of its modules' outputs."""
    return (
        f"{record.query_heads} heads, MLP {record.intermediate_size}, "
        f"errors {record.attention_error:.3f}, {record.mlp_error:.3f}"
    )


def about(seconds: float) -> str:
    """`7 s`, `3 min` or `2 h 10 min`: as exact as an estimate may look."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    tens = 0 if minutes >= 600 else minutes % 60 // 10 * 10
    return f"{minutes // 60} h {tens} min" if tens else f"{minutes // 60} h"


def duration(seconds: float) -> str:
    """`7 s` or `3 min 07 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
