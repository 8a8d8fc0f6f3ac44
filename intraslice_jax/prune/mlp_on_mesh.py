"""The MLP's compensation with a Gram matrix that no device holds as a whole (docs/method.md 3.1, 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.parallel.linalg import cholesky_solve
from intraslice_jax.parallel.placement import mesh_of, replicated, to_host
from intraslice_jax.prune.linalg import centred
from intraslice_jax.prune.method import PrunedMLP
from intraslice_jax.prune.mlp import rank_energies

_PRODUCT = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def fuse_mlp_on_mesh(
    arrays: Mapping[str, Array], moments: GramMoments, tokens: int, keep: int, damping: float, selection: str
) -> PrunedMLP:
    """`intraslice_jax.prune.mlp.fuse_mlp` by all devices together, in float32 with iterative refinement.

    Args:
        arrays: the module's weights by name, whole on one device.
        moments: of the down-projection's input; rows of `gram` on the devices of a mesh.
        tokens: how many tokens the moments sum over.
        keep: number of channels that stay.
        damping: relative ridge damping.
        selection: as in `intraslice_jax.config.PruneConfig`.

    Raises:
        InputError: the selection needs the whole Gram matrix in one place.
        RunError: the damped Gram matrix is not positive definite.
    """
    mesh = mesh_of(moments.gram)
    if mesh is None:
        raise TypeError("the moments are on one device; use fuse_mlp")
    if selection != "energy":
        raise InputError(
            f"selection {selection} needs the Gram matrix of {len(arrays['down_proj'])} channels on one device, where "
            "it does not fit; use selection energy"
        )
    down = np.asarray(arrays["down_proj"]).astype(np.float32)
    bias = np.asarray(arrays["down_bias"]).astype(np.float32) if "down_bias" in arrays else None
    energies = to_host(_diagonal(moments.gram)).astype(np.float64)
    kept = np.sort(rank_energies(energies, down.astype(np.float64))[:keep])
    stays = np.zeros(len(down), bool)
    stays[kept] = True
    placed = replicated((down, bias, stays), mesh)
    small, shift, error = jax.tree.map(
        to_host, _fold(moments.gram, moments.total, *placed, tokens=tokens, damping=damping, mesh=mesh)
    )
    if not np.isfinite(small).all():
        raise RunError(
            "the MLP's Gram matrix is not positive definite to float32; raise `damping`, or calibrate with more text"
        )
    new = {name: array[..., kept] for name, array in arrays.items() if not name.startswith("down")}
    new["down_proj"] = jnp.asarray(small[kept])
    if bias is not None:
        new["down_bias"] = jnp.asarray(bias + shift)
    return PrunedMLP(new, float(error), kept, {"solver": "cholesky over the mesh, float32"})


@jax.jit
def _diagonal(gram: Array) -> Array:
    return jnp.diagonal(gram)


@functools.partial(jax.jit, static_argnames=("tokens", "damping", "mesh"))
def _fold(
    gram: Float[Array, "inner inner"],
    total: Float[Array, " inner"],
    down: Float[Array, "inner hidden"],
    bias: Float[Array, " hidden"] | None,
    stays: Bool[Array, " inner"],
    *,
    tokens: int,
    damping: float,
    mesh: Mesh,
) -> tuple[Float[Array, "inner hidden"], Float[Array, " hidden"], Float[Array, ""]]:
    """The down-projection with zeros for dropped channels, what its bias gains, and the relative error.

    The system keeps its full size, with rows of the identity for dropped channels: nothing has to change places.
    """
    energy = jnp.sum(down * _PRODUCT(gram, down))
    if bias is not None:
        gram = centred(gram, total, total, tokens)
    mean = jnp.mean(jnp.diagonal(gram), where=stays)
    lost = jnp.where(stays[:, None], 0, down)
    both = stays[:, None] & stays[None]
    system = jnp.where(both, 0.5 * (gram + gram.T), 0) + jnp.diag(jnp.where(stays, damping * mean, 1))
    right = jnp.where(stays[:, None], _PRODUCT(gram, lost), 0)
    gained = cholesky_solve(system, right, mesh)
    missed = lost - gained
    error = jnp.maximum(jnp.sum(missed * _PRODUCT(gram, missed)), 0) / jnp.maximum(energy, 1e-30)
    return down - missed, _PRODUCT(total / tokens, missed), error
