"""Iterative PCA: learned mixtures of MLP channels before the nonlinearity (docs/method.md 3.3).

The best-scored channels stay as they are. The other columns of the small MLP are mixtures of the other channels,
z' = act(x W_g Q_b) * (x W_u Q_a), started from the next-best channels and learned in blocks. Each block fits,
together with its own map to the output, what the kept channels and the blocks before it leave of the dense
MLP's output: a target of limited rank, which for a linear MLP would be the leading principal components of that
residual. The mixtures are multiplied into W_u and W_g, so nothing is added to the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from intraslice_jax.models.mlp import inner_activations
from intraslice_jax.prune.compensation import ridge
from intraslice_jax.prune.linalg import solver_precision, to_solver


@dataclass(frozen=True)
class IterativeSettings:
    """How mixtures are learned.

    Attributes:
        mixed_share: fraction of the kept columns that become mixtures.
        blocks: how many blocks they are learned in.
        epochs: passes over the training windows per block.
        learning_rate: Adam's first step size, where a selection column's entry is 1; halved from block to block.
        decay: factor on the step size per pass.
        seed: order of the windows.
    """

    mixed_share: float = 0.5
    blocks: int = 2
    epochs: int = 6
    learning_rate: float = 5e-4
    decay: float = 0.8
    seed: int = 0


class Mixtures(NamedTuple):
    """Learned inner weights.

    Attributes:
        arrays: the small MLP's `up_proj` [hidden, keep] and so on, all but the down-projection.
        losses: share of the residual's energy that is left after every pass, block by block.
    """

    arrays: dict[str, Array]
    losses: list[list[float]]


class _Columns(NamedTuple):
    """What a block learns: a mixing map for each projection, and the map to the output in units of `scale`."""

    mix: dict[str, Float[Array, "others columns"]]
    output: Float[Array, "columns hidden"]


def learn_mixtures(
    arrays: Mapping[str, Array],
    hidden_act: str,
    order: Int[np.ndarray, " inner"],
    keep: int,
    inputs: Float[Array, "windows seq hidden"],
    settings: IterativeSettings,
    damping: float,
) -> Mixtures:
    """Learns the inner weights of a small MLP.

    Args:
        arrays: the dense MLP's weights.
        hidden_act: its activation.
        order: its channels by falling score.
        keep: columns of the small MLP.
        inputs: what the MLP reads on the training windows.
        settings: sizes and step sizes.
        damping: of the ridge regressions between the blocks.
    """
    mixed = min(round(keep * settings.mixed_share), keep - 1)
    fixed, others = np.sort(order[: keep - mixed]), np.sort(order[keep - mixed :])
    starts = np.searchsorted(others, order[keep - mixed : keep])
    dense = {name: array.astype(jnp.float32) for name, array in arrays.items()}
    inner = {name: array for name, array in dense.items() if not name.startswith("down")}
    pool = {name: array[..., others] for name, array in inner.items()}
    small = {name: array[..., fixed] for name, array in inner.items()}

    inputs = inputs.astype(jnp.float32)
    targets = _targets(hidden_act, inner, dense["down_proj"], inputs)
    residual = targets - _fitted(hidden_act, small, inputs, targets, damping)[1]
    rng, losses = np.random.default_rng(settings.seed), []
    for number, columns in enumerate(np.array_split(starts, min(settings.blocks, len(starts)))):
        learned, scale, curve = _learn_block(
            hidden_act, inputs, residual, pool, columns, settings, settings.learning_rate / 2**number, damping, rng
        )
        losses.append(curve)
        block = _mix(pool, learned.mix)
        residual = residual - _contribution(hidden_act, block, learned.output * scale, inputs)
        small = {name: jnp.concatenate([small[name], block[name]], -1) for name in small}
    return Mixtures(small, losses)


def _learn_block(
    hidden_act: str,
    inputs: Array,
    residual: Array,
    pool: dict[str, Array],
    columns: np.ndarray,
    settings: IterativeSettings,
    learning_rate: float,
    damping: float,
    rng: np.random.Generator,
) -> tuple[_Columns, float, list[float]]:
    others = pool["up_proj"].shape[-1]
    selection = jnp.zeros((others, len(columns)), jnp.float32).at[columns, np.arange(len(columns))].set(1.0)
    mix = {_projection(name): selection for name in pool}
    start, _ = _fitted(hidden_act, _mix(pool, mix), inputs, residual, damping)
    # In units of its own size the output map moves as fast, relatively, as the mixing maps.
    scale = float(jnp.sqrt(jnp.mean(jnp.square(start)))) or 1.0
    learned = _Columns(mix, start / scale)
    windows = len(inputs)
    optimiser = optax.adam(optax.exponential_decay(learning_rate, windows, settings.decay, staircase=True))
    state, curve = optimiser.init(learned), []
    energy = jnp.mean(jnp.square(residual))
    for _ in range(settings.epochs):
        shuffled = jnp.asarray(rng.permutation(windows))
        learned, state, loss = _epoch(
            hidden_act, learning_rate, settings.decay, learned, state, pool, scale, energy, inputs, residual, shuffled
        )
        curve.append(float(loss))
    return learned, scale, curve


@functools.partial(jax.jit, static_argnames=("hidden_act", "learning_rate", "decay"))
def _epoch(
    hidden_act: str,
    learning_rate: float,
    decay: float,
    learned: _Columns,
    state: Any,
    pool: dict[str, Array],
    scale: float | Array,
    energy: Array,
    inputs: Array,
    residual: Array,
    order: Array,
) -> tuple[_Columns, Any, Array]:
    """One pass, one Adam step per window; also the mean loss."""
    optimiser = optax.adam(optax.exponential_decay(learning_rate, len(inputs), decay, staircase=True))

    def loss_of(learned: _Columns, x: Array, target: Array) -> Array:
        out = _contribution(hidden_act, _mix(pool, learned.mix), learned.output * scale, x[None])[0]
        return jnp.mean(jnp.square(target - out)) / energy

    def step(carry: tuple[_Columns, Any], window: Array) -> tuple[tuple[_Columns, Any], Array]:
        learned, state = carry
        loss, gradient = jax.value_and_grad(loss_of)(learned, inputs[window], residual[window])
        with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to its integer step count
            update, state = optimiser.update(gradient, state)
        return (cast(_Columns, optax.apply_updates(learned, update)), state), loss

    (learned, state), losses = jax.lax.scan(step, (learned, state), order)
    return learned, state, losses.mean()


def _projection(name: str) -> str:
    """`gate` or `up`: a projection and its bias are mixed by the same map."""
    return name.partition("_")[0]


def _mix(pool: Mapping[str, Array], mix: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array @ mix[_projection(name)] for name, array in pool.items()}


@functools.partial(jax.jit, static_argnames="hidden_act")
def _contribution(hidden_act: str, weights: dict[str, Array], output: Array, x: Array) -> Array:
    return jnp.einsum("btf,fd->btd", inner_activations(hidden_act, weights, x), output)


def _targets(hidden_act: str, weights: dict[str, Array], down: Array, inputs: Array) -> Array:
    """The dense output, window by window, because its inner activations are wide."""
    return jnp.concatenate([_contribution(hidden_act, weights, down, x[None]) for x in inputs])


@functools.partial(jax.jit, static_argnames="hidden_act")
def _moments(hidden_act: str, weights: dict[str, Array], x: Array, target: Array) -> tuple[Array, Array]:
    z = inner_activations(hidden_act, weights, x)
    return jnp.einsum("bti,btj->ij", z, z), jnp.einsum("bti,btd->id", z, target)


def _fitted(
    hidden_act: str, weights: dict[str, Array], inputs: Array, targets: Array, damping: float
) -> tuple[Array, Array]:
    """The ridge map from inner activations to targets, and what it predicts."""
    parts = [_moments(hidden_act, weights, x[None], y[None]) for x, y in zip(inputs, targets, strict=True)]
    gram, cross = (sum(part[i] for part in parts[1:]) + parts[0][i] for i in (0, 1))
    with solver_precision():
        fit = np.asarray(ridge(to_solver(gram), to_solver(cross), damping).weights, np.float32)
    output = jnp.asarray(fit)
    return output, jnp.concatenate([_contribution(hidden_act, weights, output, x[None]) for x in inputs])
