"""What the loop over layers asks of whoever keeps its state, so that it can go on after it was stopped."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Array

from intraslice_jax.reading import Schema

T = TypeVar("T")


class Resumable(abc.ABC):
    """What judges a model in a pass over the text and goes on where it was: called alone, it begins."""

    def __call__(self, model: Any, windows: np.ndarray, config: Any, on_batch: Any = None) -> Any:
        return self.resumed(model, windows, config, on_batch, None)

    @abc.abstractmethod
    def resumed(self, model: Any, windows: np.ndarray, config: Any, on_batch: Any, run_log: RunLog | None) -> Any:
        """`__call__`, going on with what the log has."""


@runtime_checkable
class RunLog(Protocol):
    """Keeps the finished layers, the residual stream behind the last of them, and small facts.

    Facts are JSON-serialisable, and checked against a schema (`reading.check`) when they come back. With several
    processes all of them make the same calls.
    """

    @property
    def layers_done(self) -> int:
        """How many layers were finished when this run began; it goes on with the next."""
        ...

    def get(self, name: str, schema: Schema[T]) -> T | None:
        """The fact of that name, None if there is none."""
        ...

    def put(self, name: str, fact: Any) -> None:
        """Keeps a fact."""
        ...

    def get_arrays(self, name: str, schema: Schema[T]) -> tuple[dict[str, np.ndarray], T] | None:
        """The latest arrays of that name and their facts, None if there are none."""
        ...

    def put_arrays(self, name: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Keeps arrays that all processes have, and facts, instead of those that had the name."""
        ...

    def drop_arrays(self, name: str) -> None:
        """Forgets them."""
        ...

    def get_state(self, name: str, schema: Schema[T]) -> tuple[Mapping[str, np.ndarray], T] | None:
        """The latest state of that name: arrays, each read when it is asked for, and facts; None if there is none."""
        ...

    def put_state(self, name: str, step: int, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Keeps a state as large as the model, wherever its arrays lie, instead of those of that name and fewer steps.

        It returns when all is safe.
        """
        ...

    def layer(self, index: int, schema: Schema[T]) -> tuple[Mapping[str, np.ndarray], T]:
        """A finished layer: arrays by name, each read when it is asked for, and facts."""
        ...

    def stream(self, like: Sequence[Array], schema: Schema[T]) -> tuple[list[Array], T]:
        """The stream behind the last finished layer, with the shapes and on the devices of `like`, and facts."""
        ...

    def layer_done(
        self,
        index: int,
        arrays: Mapping[str, Array],
        facts: Mapping[str, Any],
        stream: Sequence[Array],
        stream_facts: Mapping[str, Any],
    ) -> None:
        """Keeps a layer and what lies behind it; it may return before they are safe."""
        ...

    def flush(self) -> None:
        """Returns when all is safe."""
        ...
