"""How long a run is said to take, with a clock that the test moves."""

import io
import itertools

import pytest
from rich.console import Console

from intraslice_jax.progress import Timeline, about, run_progress
from intraslice_jax.prune.pipeline import LayerRecord

STAGES = {"ratios": (60, 3.0), "layers": (30, 2.0), "refinement": (42, 5.0), "perplexity": (16, 1.0)}
"""Steps of each stage, and seconds of one: 466 s together."""


class Clock:
    """A clock that is moved by hand, and what is told of a run by it."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time

    def run(self, progress, stages, first=None, slower=1.0, compiling=0.0):
        """Yields the seconds that are really left after every step.

        Args:
            progress: whom to tell.
            stages: as `STAGES`.
            first: step at which the first of them is taken up.
            slower: what every step takes instead of a second.
            compiling: what the first step of a stage takes beside.
        """
        begun = dict.fromkeys(stages, 0) | {next(iter(stages)): first or 0}
        left = sum(slower * (steps - begun[s]) * each + compiling for s, (steps, each) in stages.items())
        for stage, (steps, each) in stages.items():
            progress.tell(stage, begun[stage], steps)
            for done in range(begun[stage], steps):
                took = slower * each + compiling * (done == begun[stage])
                self.time += took
                left -= took
                progress.tell(stage, done + 1, steps)
                yield left


def expected(stages=STAGES, wrong=None):
    return {stage: steps * each * (wrong or {}).get(stage, 1) for stage, (steps, each) in stages.items()}


@pytest.mark.parametrize(
    ("wrong", "slower"),
    [
        ({}, 1.0),  # as expected
        ({}, 4.0),  # a busy machine
        ({"ratios": 0.5}, 1.0),  # the estimate of one stage is off
        ({"layers": 2, "refinement": 1.5}, 1.0),
    ],
)
def test_the_time_left_is_right_within_a_factor_of_two_from_early_on(wrong, slower):
    clock = Clock()
    timeline, checked = Timeline(expected(wrong=wrong), clock), 0
    whole = slower * 466
    for left in clock.run(timeline, STAGES, slower=slower):
        if 0 < left < 0.93 * whole:
            assert left / 2 <= timeline.left() <= 2 * left, (timeline.stage, timeline.done)
            checked += 1
    assert checked > 120
    assert timeline.left() == pytest.approx(0, abs=1e-6)
    assert timeline.elapsed() == pytest.approx(whole)


def test_what_compiles_once_is_not_taken_for_the_pace():
    clock = Clock()
    timeline = Timeline(expected(), clock)
    for left in clock.run(timeline, STAGES, compiling=20.0):
        if left > 40 and timeline.done > 3:  # of the last stage the first step alone takes longer than expected
            assert left / 2 <= timeline.left() <= 2 * left, (timeline.stage, timeline.done)


def test_a_continued_run_counts_what_it_does_itself():
    clock = Clock()
    timeline = Timeline(expected(), clock)
    stages = {stage: STAGES[stage] for stage in ("layers", "refinement")}
    for left in clock.run(timeline, stages, first=24):
        if left:
            assert left / 1.2 - 16 <= timeline.left() - 16 <= 1.2 * left, timeline.done  # perplexity is not told of
    assert timeline.elapsed() == 6 * 2 + 42 * 5


def test_time_passes_between_steps():
    clock = Clock()
    timeline = Timeline({"layers": 100.0}, clock)
    timeline.tell("layers", 0, 10)
    seen = []
    for _ in range(12):
        clock.time += 1
        seen.append((timeline.left(), timeline.fraction()))
    assert seen[0][0] == pytest.approx(99)
    assert seen[-1][0] == pytest.approx(90)  # a step that is late does not make the others faster
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(seen))


def test_without_an_estimate_the_pace_alone_counts():
    clock = Clock()
    timeline = Timeline({}, clock)
    timeline.tell("evaluating", 0, 0)
    assert timeline.left() == 0
    clock.time += 6
    timeline.tell("evaluating", 2, 8)
    assert timeline.left() == pytest.approx(18)


@pytest.mark.parametrize("terminal", [False, True])
def test_every_line_is_whole_at_80_columns(terminal):
    """The widest that there is: 126 layers, 128 heads, hours."""
    written, clock = io.StringIO(), Clock()
    console = Console(file=written, width=80, force_terminal=terminal, color_system=None)
    stages = {"ratios": (12, 2100.0), "layers": (126, 90.0), "token gradients": (10, 2000.0), "refinement": (9, 2000.0)}
    record = LayerRecord(125, (), 128, 8, 128, 128, 53248, 0.123, 0.456, {}, 1.0)
    with run_progress(console, clock) as progress:
        progress.tell("reading", 0, 0)
        progress.expect(expected(stages))
        for _ in clock.run(progress, stages):
            if progress.timeline.stage == "layers":
                progress.on_layer(record)
    lines = [line for part in written.getvalue().split("\n") for line in part.split("\r") if line.strip()]
    text = "\n".join(lines)
    assert "[about 20 h] ratios 7 h, layers 3 h, token gradients 5 h 30 min, refinement 5 h" in text
    assert "128 heads, MLP 53248, errors 0.123, 0.456" in text
    if not terminal:
        assert max(map(len, lines)) <= 80
        assert "[126/126] 128 heads, MLP 53248, errors 0.123, 0.456; 4" in text
        assert sum(line.startswith("[ratios") for line in lines) == 12  # a step takes longer than a minute
        assert lines[-1].startswith("[refinement 9/9] 100 % done, 0 s left")
        return
    for width in (80, 60):  # what a terminal shows is computed anew whenever it is drawn
        drawn = Console(file=io.StringIO(), width=width, record=True)
        drawn.print(progress.display)
        first, second = drawn.export_text().splitlines()
        assert max(len(first), len(second)) <= width
        assert first.startswith("refinement 9/9 ━")
        assert first.endswith("━ 100 % done, 0 s left")
        assert second.startswith("layer 125: 128 heads, MLP 53248, errors 0.123, 0.456")


def test_lines_come_at_quarters_and_after_a_minute():
    written, clock = io.StringIO(), Clock()
    with run_progress(Console(file=written, width=80), clock) as progress:
        for stage, (steps, each) in {"ratios": (60, 0.1), "refinement": (8, 50.0)}.items():
            for _ in clock.run(progress, {stage: (steps, each)}):
                pass
    told = [line.split("]")[0] for line in written.getvalue().splitlines()]
    assert told == [*(f"[ratios {n}/60" for n in (15, 30, 45, 60)), *(f"[refinement {n}/8" for n in (2, 4, 6, 8))]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3570.0, "1 h"), (9e3, "2 h 30 min")]
)
def test_estimates_do_not_look_exact(seconds, text):
    assert about(seconds) == text
