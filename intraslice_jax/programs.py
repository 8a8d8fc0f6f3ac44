"""Compiled programs that only layers of one shape use.

On a CPU each holds 5 to 13 MB. A model that is pruned to another shape in every layer would keep them all to the end of
the run: more than 1 GB for the 30 layers of SmolLM2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from intraslice_jax.config import LayerShape

MOST_SHAPES = 4
"""Distinct layers whose programs are kept for layers to come."""

Function = TypeVar("Function", bound=Callable[..., Any])

_BY_SHAPE: list[Any] = []


def by_shape(function: Function) -> Function:
    """Marks a jitted function whose programs belong to one layer's shape before and after pruning."""
    _BY_SHAPE.append(function)
    return function


class ShapePrograms:
    """Drops these programs once layers of more than `MOST_SHAPES` shapes are done."""

    def __init__(self) -> None:
        self._seen: set[tuple[LayerShape, LayerShape]] = set()

    def done(self, before: LayerShape, after: LayerShape) -> None:
        """A layer is pruned. Programs that later ones of the same shapes need are compiled again, if dropped."""
        self._seen.add((before, after))
        if len(self._seen) > MOST_SHAPES:
            for function in _BY_SHAPE:
                function.clear_cache()
            self._seen.clear()
