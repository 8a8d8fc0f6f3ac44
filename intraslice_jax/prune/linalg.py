"""The small dense solves: in float64 wherever a backend has it, guarded against indefinite Gram matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Number = float | int | Float[Array, ""]
"""A scalar, perhaps traced."""

Arrays = TypeVar("Arrays")


class Solution(NamedTuple):
    """A least-squares map, and whether Cholesky broke down on the way to it."""

    weights: Float[Array, "inputs targets"]
    indefinite: Bool[Array, ""]


@contextlib.contextmanager
def solver_precision() -> Iterator[None]:
    """Runs the enclosed solves in float64, on the host where the accelerator has no float64."""
    with jax.enable_x64(True), jax.default_device(_solver_device()):
        yield


def _solver_device() -> Any:
    device = jax.local_devices()[0]
    return device if device.platform in ("cpu", "gpu") else jax.local_devices(backend="cpu")[0]


def to_solver(array: Array | np.ndarray) -> Float[Array, "..."]:
    """A copy in the solver's dtype and on its device; call it inside `solver_precision`."""
    device = _solver_device()
    if device.platform != "cpu" and _lies_on(array, device):
        return jnp.array(array, jnp.float64)  # large moments need not go through the host
    return jax.device_put(np.asarray(array).astype(np.float64), device)  # NumPy has no programs to compile


def on_solver(array: Array | np.ndarray) -> Float[Array, "..."]:
    """As it is, on the solver's device, for functions that widen only what they need of it."""
    device = _solver_device()
    return cast(Array, array) if _lies_on(array, device) else jax.device_put(np.asarray(array), device)


def _lies_on(array: Array | np.ndarray, device: Any) -> bool:
    return isinstance(array, jax.Array) and array.devices() == {device}


def widened(arrays: Arrays) -> Arrays:
    """A tree of arrays in the solver's dtype; call it inside a jitted function."""
    return jax.tree.map(lambda array: array.astype(jnp.float64), arrays)


def damped(gram: Float[Array, "n n"], damping: Number) -> Float[Array, "n n"]:
    """Symmetrised, with `damping` times the mean diagonal added to the diagonal (docs/method.md section 1)."""
    return 0.5 * (gram + gram.T) + damping * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram), dtype=gram.dtype)


def each(function: Callable[..., Any], *arrays: Array) -> Any:
    """`jax.vmap(function)(*arrays)` for functions that call LAPACK; on a CPU it takes one item after the other.

    A batched LAPACK call of jaxlib shares its items with the threads of XLA's pool and waits for them on one of these
    threads. As many such calls at once as there are threads (two on two cores) wait for ever.
    """
    if _solver_device().platform == "cpu":
        return jax.lax.map(lambda items: function(*items), arrays)
    return jax.vmap(function)(*arrays)


@jax.jit
def eigh_descending(
    grams: Float[Array, "batch n n"],
) -> tuple[Float[Array, "batch n"], Float[Array, "batch n n"]]:
    """Eigenvalues, clipped at 0, in descending order, with their eigenvectors as columns."""
    values, vectors = each(jnp.linalg.eigh, 0.5 * (grams + grams.swapaxes(1, 2)))
    return jnp.maximum(values[:, ::-1], 0.0), vectors[:, :, ::-1]


@jax.jit
def solve_gram(gram: Float[Array, "n n"], cross: Float[Array, "n m"]) -> Solution:
    """gram^-1 cross for a symmetric positive (semi-)definite Gram matrix.

    Cholesky first; when that breaks down, an eigendecomposition whose eigenvalues are clipped at machine
    precision times the largest.
    """
    weights = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram, lower=True), cross)
    indefinite = ~jnp.isfinite(weights).all()
    return Solution(jax.lax.cond(indefinite, lambda: _eigh_solve(gram, cross), lambda: weights), indefinite)


def solver_name(indefinite: Bool[Array, ""]) -> str:
    """What found a `Solution`, for the record."""
    return "eigh" if bool(indefinite) else "cholesky"


def _eigh_solve(gram: Array, cross: Array) -> Array:
    values, vectors = jnp.linalg.eigh(gram)
    floor = jnp.maximum(values[-1], 0) * len(gram) * jnp.finfo(gram.dtype).eps
    inverse = jnp.where(values > floor, 1 / jnp.where(values > floor, values, 1), 0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))


def inverse_gram(gram: Float[Array, "n n"], damping: Number) -> Float[Array, "n n"]:
    """Inverse of the damped Gram matrix, with a damping of at least 1e-6."""
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    # Channels that never fire must not make it singular, not even all of them.
    return solve_gram(damped(gram, jnp.maximum(damping, 1e-6)) + 1e-30 * identity, identity).weights


def centred(gram: Array, left: Array, right: Array, count: Number) -> Array:
    """Second moment about the mean from the second moment about zero and the sums over `count` tokens."""
    return gram - left[:, None] * right[None, :] / count
