"""How long the parts of a run take, compilation apart.

Functions carry `@stage(NAME)`. That costs nothing until `measured_stages` is active; then every one of them waits for
its results, so that a stage's time is that of its own work.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
from jax import monitoring

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

OUTSIDE = "rest"
"""What no stage claims."""

_COMPILING = ("/jax/core/compile/", "/jax/compilation_cache/cache_retrieval_time_sec")


class StageTimes:
    """Seconds of each stage without those of the stages inside it.

    Attributes:
        wall: seconds by name, in the order of their first start; compilation included.
        compilations: how many programs the compiler made, or read from its cache.
    """

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.compilations = 0
        self._names = [OUTSIDE]
        self._since = time.perf_counter()
        self._compiled: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The time inside belongs to this stage."""
        self._book()
        self._names.append(name)
        try:
            yield
        finally:
            self._book()
            self._names.pop()

    def compiling(self, name: str) -> float:
        """Seconds of a stage that went into tracing and compiling; they are part of its wall time."""
        return _covered(self._compiled.get(name, []))

    def _book(self) -> None:
        now, name = time.perf_counter(), self._names[-1]
        self.wall[name] = self.wall.get(name, 0.0) + now - self._since
        self._since = now

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith(_COMPILING):
            now = time.perf_counter()
            self._compiled.setdefault(self._names[-1], []).append((now - duration_secs, now))
            self.compilations += event.endswith("backend_compile_duration")


_CURRENT: ContextVar[StageTimes | None] = ContextVar("stages", default=None)


@contextmanager
def measured_stages() -> Iterator[StageTimes]:
    """Measures what runs inside, in this thread."""
    times = StageTimes()
    token = _CURRENT.set(times)
    listener = times._on_event
    monitoring.register_event_duration_secs_listener(listener)
    try:
        yield times
    finally:
        monitoring.unregister_event_duration_listener(listener)
        _CURRENT.reset(token)
        times._book()


def stage(name: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Names the stage that a function's time belongs to."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def in_stage(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            times = _CURRENT.get()
            if times is None:
                return function(*args, **kwargs)
            with times.running(name):
                return jax.block_until_ready(function(*args, **kwargs))

        return in_stage

    return decorate


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union: the tracing of one program may hold the compilation of another."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total
