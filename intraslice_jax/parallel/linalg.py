"""Solves with a symmetric positive definite matrix that is too large for one device.

The matrix lies on all devices of a mesh, row block by row block. The factorisation is the right-looking blocked
Cholesky algorithm (Golub and Van Loan, Matrix Computations, section 4.2), one panel of columns at a time: the device
that holds the diagonal block sends it round, every device makes its rows of the panel, the panel is sent round, and
every device updates the rows that it holds.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

ROWS = "rows"
"""The one axis of a mesh whose devices share the rows of a matrix."""

_PRODUCT = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def row_mesh(mesh: Mesh) -> Mesh:
    """The devices of any mesh in one row."""
    return Mesh(mesh.devices.reshape(-1), (ROWS,))


def padded_size(size: int, ways: int, block: int) -> tuple[int, int]:
    """The next size that divides into `ways` row blocks of whole panels, and the panel's width."""
    block = min(block, math.ceil(size / ways))
    return math.ceil(size / (ways * block)) * ways * block, block


def fits_one_device(size: int, memory: int | None = None) -> bool:
    """Whether the float64 solve of a module with `size` channels fits half of a device's memory.

    It holds the Gram matrix, the kept part of it, its factor, the cross moments and the map: 5 matrices at most.

    Args:
        size: channels.
        memory: bytes, None for those of the device that solves (`intraslice_jax.prune.linalg.solver_precision`).
    """
    return 5 * 8 * size**2 <= (_solver_memory() if memory is None else memory) // 2


def _solver_memory() -> int:
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.partial(jax.jit, static_argnames=("mesh", "block", "refine"))
def cholesky_solve(
    matrix: Float[Array, "n n"], right: Float[Array, "n m"], mesh: Mesh, block: int = 256, refine: int = 1
) -> Float[Array, "n m"]:
    """matrix^-1 right for a symmetric positive definite matrix, by all devices of a mesh together.

    Args:
        matrix: float32 or float64.
        right: right-hand sides in the same dtype.
        mesh: with any axes.
        block: width of a panel.
        refine: steps of iterative refinement, which win back what the rounding of the factor lost.

    Returns:
        The solution; it holds NaN if the matrix is not positive definite.
    """
    size, rows = len(matrix), row_mesh(mesh)
    padded, block = padded_size(size, rows.size, block)
    pad = padded - size
    split = NamedSharding(rows, PartitionSpec(ROWS))
    # The rows that are added are those of the identity, and leave the solution as it is.
    added = jnp.diag((jnp.arange(padded) >= size).astype(matrix.dtype))
    matrix = jax.lax.with_sharding_constraint(jnp.pad(matrix, ((0, pad), (0, pad))) + added, split)
    right = jax.lax.with_sharding_constraint(jnp.pad(right, ((0, pad), (0, 0))), split)

    def by_rows(function: Callable[..., Array]) -> Callable[..., Array]:
        return jax.shard_map(
            functools.partial(function, block), mesh=rows, in_specs=PartitionSpec(ROWS), out_specs=PartitionSpec(ROWS),
            check_vma=False,
        )  # fmt: skip

    factor = by_rows(_factor)(matrix)
    solution = by_rows(_substitute)(factor, right)
    for _ in range(refine):
        solution = solution + by_rows(_substitute)(factor, right - by_rows(_multiply)(matrix, solution))
    return solution[:size]


def _factor(block: int, own: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
    """This device's rows of the Cholesky factor."""

    def panel(k: Array, own: Array) -> Array:
        numbers, start = _numbers(own), k * block
        corner = jnp.linalg.cholesky(_rows(_columns(own, start, block), start, block))
        below = (numbers >= start + block)[:, None]
        made = jax.lax.linalg.triangular_solve(
            corner, _columns(own, start, block), left_side=False, lower=True, transpose_a=True
        )
        made = jnp.where(below, made, 0)
        own = own - _PRODUCT(made, jax.lax.all_gather(made, ROWS, tiled=True).T)
        within = jnp.clip(numbers - start, 0, block - 1)
        inside = ((numbers >= start) & (numbers < start + block))[:, None]
        made = jnp.where(inside, corner[within], made)
        return jax.lax.dynamic_update_slice_in_dim(own, made, start, 1)

    return jax.lax.fori_loop(0, own.shape[1] // block, panel, own)


def _substitute(block: int, factor: Float[Array, "rows n"], own: Float[Array, "rows m"]) -> Float[Array, "rows m"]:
    """This device's rows of the solution, forwards with the factor and backwards with its transpose."""
    numbers, panels = _numbers(factor), factor.shape[1] // block

    def below(start: Array) -> Array:
        return jnp.where((numbers >= start + block)[:, None], _columns(factor, start, block), 0)

    def corner(start: Array) -> Array:
        return _rows(_columns(factor, start, block), start, block)

    def replace(own: Array, new: Array, start: Array) -> Array:
        inside = ((numbers >= start) & (numbers < start + block))[:, None]
        return jnp.where(inside, new[jnp.clip(numbers - start, 0, block - 1)], own)

    def forwards(k: Array, own: Array) -> Array:
        start = k * block
        known = _rows(own, start, block)
        solved = jax.scipy.linalg.solve_triangular(corner(start), known, lower=True)
        return replace(own - _PRODUCT(below(start), solved), solved, start)

    def backwards(k: Array, own: Array) -> Array:
        start = (panels - 1 - k) * block
        known = _rows(own, start, block) - jax.lax.psum(_PRODUCT(below(start).T, own), ROWS)
        solved = jax.scipy.linalg.solve_triangular(corner(start), known, lower=True, trans=1)
        return replace(own, solved, start)

    return jax.lax.fori_loop(0, panels, backwards, jax.lax.fori_loop(0, panels, forwards, own))


def _multiply(block: int, own: Float[Array, "rows n"], right: Float[Array, "rows m"]) -> Float[Array, "rows m"]:
    """This device's rows of a product, whose right factor is sent round panel by panel."""

    def add(k: Array, total: Array) -> Array:
        return total + _PRODUCT(_columns(own, k * block, block), _rows(right, k * block, block))

    return jax.lax.fori_loop(0, own.shape[1] // block, add, jnp.zeros_like(right))


def _numbers(own: Array) -> Int[Array, " rows"]:
    """The numbers of this device's rows."""
    return jax.lax.axis_index(ROWS) * len(own) + jnp.arange(len(own))


def _columns(own: Array, start: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(own, start, count, 1)


def _rows(own: Array, start: Array, count: int) -> Array:
    """Rows that lie on one device, from any device."""
    offset = start - jax.lax.axis_index(ROWS) * len(own)
    here = (offset >= 0) & (offset < len(own))
    mine = jax.lax.dynamic_slice_in_dim(own, jnp.clip(offset, 0, len(own) - count), count, 0)
    return jax.lax.psum(jnp.where(here, mine, 0), ROWS)
