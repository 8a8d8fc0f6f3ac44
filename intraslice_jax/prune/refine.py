"""A pruned layer learned a little further, towards what the dense model has at the same place (docs/method.md 6.5).

Selection and least squares see one module at a time, and what the layers before it have lost stays lost. Here the small
weights of a whole layer follow the gradient of the distance between its output, on the pruned model's own inputs, and
the dense model's residual stream behind the same layer. Held-out windows decide whether the result stays.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from intraslice_jax.models.decoder import Block, decoder_to_arrays
from intraslice_jax.models.rope import RopeTable

HELD_OUT = 1 / 8
"""Fraction of the calibration windows on which a layer is judged before and after."""


@dataclass(frozen=True)
class RefineSettings:
    """How a layer is learned further.

    Attributes:
        epochs: passes over the training windows.
        learning_rate: Adam's first step size, relative to the root mean square of each weight; it falls to 0 by a
            cosine.
        windows: calibration windows per step.
        seed: order of the steps.
    """

    epochs: int = 2
    learning_rate: float = 0.02
    windows: int = 1
    seed: int = 0


class Refined(NamedTuple):
    """A layer's arrays, and what is to be known of them."""

    arrays: dict[str, Array]
    notes: dict[str, Any]


def refine_block(
    block: Block,
    inputs: Sequence[Float[Array, "_ seq hidden"]],
    targets: Sequence[Float[Array, "_ seq hidden"]],
    real: Sequence[int],
    rope: RopeTable,
    settings: RefineSettings,
) -> Refined:
    """Adam on the projections of a layer, one step per few windows; norms and RoPE pairs stay.

    The loss is the mean over tokens of the squared distance relative to the target's energy: norms in front of every
    module make a token's own size irrelevant, and a few tokens are hundreds of times as large as the others.

    Args:
        block: the pruned layer.
        inputs: the residual stream in front of it, batch by batch, in the pruned model.
        targets: the residual stream behind the same layer of the dense model.
        real: how many sequences of each batch count.
        rope: position tables.
        settings: how far.

    Returns:
        The layer's arrays by path, as they were if held-out windows do not come nearer to the targets.
    """
    steps = [
        (x[rows], y[rows])
        for x, y, count in zip(inputs, targets, real, strict=True)
        for i in range(0, count, settings.windows)
        for rows in [slice(i, min(i + settings.windows, count))]
    ]
    held_out = max(1, round(len(steps) * HELD_OUT))
    arrays = decoder_to_arrays(block)
    if len(steps) <= held_out:
        return Refined(arrays, {"accepted": False, "reason": "one window cannot be split"})
    train, held = steps[:-held_out], steps[-held_out:]
    start = {name: a.astype(jnp.float32) for name, a in arrays.items() if name.endswith("_proj")}
    total = settings.epochs * len(train)
    sizes = {name: jnp.sqrt(jnp.mean(jnp.square(a))) + 1e-12 for name, a in start.items()}
    learned, state = start, _optimiser(settings, total).init(start)
    rng, losses = np.random.default_rng(settings.seed), []
    for _ in range(settings.epochs):
        epoch = []
        for number in rng.permutation(len(train)):
            learned, state, loss = _step(settings, total, block, learned, state, sizes, *train[number], rope)
            epoch.append(loss)
        losses.append(float(np.mean([float(loss) for loss in epoch])))
    before, after = (float(np.mean([float(_loss(w, block, x, y, rope)) for x, y in held])) for w in (start, learned))
    accepted = after < before  # never when it is NaN
    notes = {"accepted": accepted, "held_out_errors": {"before": before, "after": after}, "losses": losses}
    if accepted:
        arrays |= {name: a.astype(arrays[name].dtype) for name, a in learned.items()}
    return Refined(arrays, notes)


def _optimiser(settings: RefineSettings, steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(settings.learning_rate, steps)
    return optax.chain(optax.scale_by_adam(b2=0.95), optax.scale_by_learning_rate(schedule))


@functools.partial(jax.jit, static_argnames=("settings", "steps"), donate_argnames="state")
def _step(
    settings: RefineSettings,
    steps: int,
    block: Block,
    learned: dict[str, Array],
    state: Any,
    sizes: dict[str, Array],
    x: Array,
    target: Array,
    rope: RopeTable,
) -> tuple[dict[str, Array], Any, Array]:
    loss, gradient = jax.value_and_grad(_loss)(learned, block, x, target, rope)
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to its integer step count
        update, state = _optimiser(settings, steps).update(gradient, state)
    step = cast(dict[str, Array], update)
    return {name: weight + sizes[name] * step[name] for name, weight in learned.items()}, state, loss


@jax.jit
def _loss(weights: Mapping[str, Array], block: Block, x: Array, target: Array, rope: RopeTable) -> Array:
    out = with_weights(block, weights)(x, rope).astype(jnp.float32)
    target = target.astype(jnp.float32)
    return jnp.mean(jnp.square(out - target).sum(-1) / jnp.square(target).sum(-1))


def with_weights(block: Block, weights: Mapping[str, Array]) -> Block:
    """The block with some arrays exchanged, in its own dtype."""
    leaves, treedef = jax.tree.flatten(block)
    names = list(decoder_to_arrays(block))
    new = [
        weights[name].astype(leaf.dtype) if name in weights else leaf for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)
