"""Times of calls that take turns, and how fast this machine multiplies matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def in_turn(calls: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of calls that run A B A B ..., so that what else the machine does meets all of them alike.

    Args:
        calls: each does its work and returns the seconds of its parts. A first round, in which programs compile, is
            not counted.
        repeats: how often each is counted.

    Returns:
        For every call the seconds of each part, round by round.
    """
    for call in calls.values():
        call()
    rounds = [{name: call() for name, call in calls.items()} for _ in range(repeats)]
    return {name: {part: [found[name][part] for found in rounds] for part in rounds[0][name]} for name in calls}


def seconds_of(work: Callable[[], Any]) -> float:
    """How long a call and all that it started take."""
    started = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - started


class MatmulRate:
    """Samples of this machine's float32 matmul rate at the shapes of a model's projections and moments.

    Args:
        tokens: rows of a batch.
        hidden: width of the residual stream.
        inner: width of an MLP.
    """

    def __init__(self, tokens: int, hidden: int, inner: int) -> None:
        self.samples: list[float] = []
        self._x = jnp.ones((tokens, hidden), jnp.float32)
        self._up = jnp.ones((hidden, inner), jnp.float32)
        self._z = jnp.ones((tokens, inner), jnp.float32)
        self._flops = 2 * tokens * inner * (hidden + inner)
        jax.block_until_ready(self._products())

    def sample(self) -> None:
        """Measures once more."""
        self.samples.append(self._flops / seconds_of(self._products))

    @property
    def median(self) -> float:
        """Floating-point operations per second."""
        return statistics.median(self.samples)

    def _products(self) -> tuple[jax.Array, jax.Array]:
        return _project_and_gram(self._x, self._up, self._z)


@jax.jit
def _project_and_gram(x: jax.Array, up: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    return product(x, up), product(z.T, z)
