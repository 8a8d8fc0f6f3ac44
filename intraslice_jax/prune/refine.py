"""A pruned model learned a little further, towards the dense model's predictions (docs/method.md 6.5).

Selection and least squares see one module at a time, and what the layers before it have lost stays lost. Here the small
weights of all layers follow the gradient of the divergence of the pruned model's next-token distribution from the dense
one's, on the calibration text itself. Held-out windows decide whether the result stays.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.gradients import OnBatch
from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, Decoder, decoder_from_arrays, decoder_to_arrays, run_block
from intraslice_jax.models.head import predictions, token_kl, token_kl_gradient
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.models.streamed import fetch
from intraslice_jax.parallel.batches import even_batches
from intraslice_jax.parallel.distributed import from_first
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import gathered, mesh_of, put_batch, to_host
from intraslice_jax.prune.resume import RunLog
from intraslice_jax.stages import stage

STATE = "refinement"
"""What a run's log calls the state of the learner."""

BYTES_LEARNED = 12
"""Of the state, for every weight that is learned: itself and two moments, float32."""

KEPT_STATES = 4
"""How often in a pass the state is kept at most."""

LEAST_SECONDS = 60.0
"""Between two states: what is learned in less is as soon learned again as written."""

WRITING = 0.1
"""The most that writing states may take of the time between them."""


@dataclass(frozen=True)
class RefineSettings:
    """How a pruned model is learned further.

    Attributes:
        passes: over the training windows, one step per window of every device row.
        learning_rate: Adam's largest step size, relative to the root mean square of each weight; it rises to that in
            `warmup` steps and falls to 0 by a cosine.
        warmup: steps.
        seed: order of the steps.
    """

    passes: int = 2
    learning_rate: float = 5e-4
    warmup: int = 3
    seed: int = 0


class Refined(NamedTuple):
    """A decoder, and what is to be known of it."""

    decoder: Decoder
    notes: dict[str, Any]


class _Batch(NamedTuple):
    """Windows, what the dense model has behind its final norm there, and how many of the rows count."""

    tokens: Int[Array, "batch seq"]
    dense: Float[Array, "batch seq hidden"]
    real: int


@dataclass
class _Layer:
    """One layer on the way: its projections in float32, and what Adam keeps of them."""

    block: Block
    weights: dict[str, Array]
    sizes: dict[str, Array]
    state: Any

    @classmethod
    def start(cls, block: Block, optimiser: optax.GradientTransformation) -> _Layer:
        arrays = {name: a for name, a in decoder_to_arrays(block).items() if name.endswith("_proj")}
        weights = {name: a.astype(jnp.float32) for name, a in arrays.items()}
        sizes = {name: jnp.sqrt(jnp.mean(jnp.square(a))) for name, a in weights.items()}
        return cls(block, weights, sizes, optimiser.init(weights))

    @property
    def learned(self) -> dict[str, Array]:
        """By name, what a step changes, but for Adam's counts of the steps."""
        return {name: a for name, a in _by_name((self.weights, self.state)).items() if not _is_count(a)}

    def take_up(self, stored: Mapping[str, Array], steps: int) -> None:
        """Puts what was learned in so many steps in the place of what there is."""
        tree = (self.weights, self.state)
        leaves = [jnp.asarray(steps, a.dtype) if _is_count(a) else stored[name] for name, a in _by_name(tree).items()]
        self.weights, self.state = jax.tree.unflatten(jax.tree.structure(tree), leaves)

    @property
    def whole(self) -> Block:
        """The layer as it is now, ready for use."""
        return gathered(with_weights(self.block, self.weights))


def _by_name(tree: Any) -> dict[str, Array]:
    """The leaves of a tree in their order, by dotted path."""
    return {
        jax.tree_util.keystr(p, simple=True, separator="."): a for p, a in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_count(array: Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.integer)


@dataclass
class _Progress:
    """How far the learner is.

    Attributes:
        before: the divergence on held-out windows before the first step.
        steps: done.
        losses: of the passes that are done.
        sums: of the steps of the pass at hand.
    """

    before: float
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)


class _Keeper:
    """Keeps the learner's state in the log of a run, as often as that is worth while, and brings it back."""

    def __init__(self, run_log: RunLog | None, steps_of_a_pass: int):
        self._log = run_log
        self._every = max(1, steps_of_a_pass // KEPT_STATES)
        self._since, self._written_in = time.monotonic(), 0.0

    def take_up(self, layers: Sequence[_Layer]) -> _Progress | None:
        """Brings the layers to where they were when the state was kept; None if there is none."""
        kept = None if self._log is None else self._log.get_state(STATE, _Progress)
        if kept is None:
            return None
        arrays, progress = kept
        for i, layer in enumerate(layers):  # one at a time: the devices have room for one state only
            prefix = f"{i}."
            wanted = {prefix + k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in layer.learned.items()}
            stored = fetch(arrays, wanted, mesh_of(layer.weights))
            layer.take_up({path.removeprefix(prefix): array for path, array in stored.items()}, progress.steps)
        return progress

    def keep(self, layers: Sequence[_Layer], progress: _Progress) -> None:
        """After every step; writes a state at some of them."""
        if self._log is None or progress.steps % self._every or not self._due():
            return
        started = time.monotonic()
        arrays = {f"{i}.{name}": array for i, layer in enumerate(layers) for name, array in layer.learned.items()}
        self._log.put_state(STATE, progress.steps, arrays, dataclasses.asdict(progress))
        self._since = time.monotonic()
        self._written_in = self._since - started

    def _due(self) -> bool:
        """The first process's clock is that of all."""
        learning = time.monotonic() - self._since
        return bool(from_first(np.int32(learning >= max(LEAST_SECONDS, self._written_in / WRITING))))


@stage("refinement")
def refine(
    dense: LanguageModel,
    decoder: Decoder,
    windows: Int[np.ndarray, "samples seq"],
    settings: RefineSettings,
    on_batch: OnBatch | None = None,
    run_log: RunLog | None = None,
) -> Refined:
    """Adam on the projections of all layers; norms, biases, embedding, head and RoPE pairs stay.

    The loss is the KL divergence of the next-token distribution from the dense model's, averaged over all tokens. The
    residual stream at the layer boundaries is kept for a step, and each layer's forward pass is computed again.

    Args:
        dense: the model that was pruned.
        decoder: the pruned one, on the same devices.
        windows: int32 calibration tokens; the last eighth is held out.
        settings: how far.
        on_batch: told the windows done and their number, over all passes, before the first step and after each.
        run_log: keeps what is learned now and then; what it holds already is not learned again.

    Returns:
        The learned decoder, or the given one if the divergence on held-out windows does not fall.
    """
    held_out = held_out_count(len(windows))
    if len(windows) <= held_out:
        return Refined(decoder, {"accepted": False, "reason": "one window cannot be split"})
    train, held = (_batches(dense, part) for part in (windows[:-held_out], windows[-held_out:]))
    steps = settings.passes * len(train)
    optimiser = _optimiser(settings, steps)
    layers = [_Layer.start(block, optimiser) for block in decoder.layers]
    rope = decoder.rope_for(windows.shape[1])
    keeper = _Keeper(run_log, len(train))
    progress = keeper.take_up(layers) or _Progress(_divergence(decoder, layers, held, rope))
    order = _order(settings, len(train))
    count = len(windows) - held_out
    done = sum(train[number].real for number in order[: progress.steps])
    if on_batch is not None:
        on_batch(done, settings.passes * count)
    for number in order[progress.steps :]:
        progress.sums.append(_step(decoder, layers, train[number], rope, settings, steps))
        progress.steps += 1
        if progress.steps % len(train) == 0:
            progress.losses.append(float(np.sum(progress.sums) / count))
            progress.sums = []
        keeper.keep(layers, progress)
        done += train[number].real
        if on_batch is not None:
            on_batch(done, settings.passes * count)
    before, after = progress.before, _divergence(decoder, layers, held, rope)
    accepted = after < before  # never when it is NaN
    notes = {"accepted": accepted, "held_out_divergence": {"before": before, "after": after}, "losses": progress.losses}
    if not accepted:
        return Refined(decoder, notes)
    arrays = decoder_to_arrays(decoder)
    for i, layer in enumerate(layers):
        for name, array in layer.weights.items():
            arrays[f"layers.{i}.{name}"] = array.astype(arrays[f"layers.{i}.{name}"].dtype)
    return Refined(decoder_from_arrays(decoder.config, arrays), notes)


def _order(settings: RefineSettings, batches: int) -> list[int]:
    """The batch of every step."""
    rng = np.random.default_rng(settings.seed)
    return [int(number) for _ in range(settings.passes) for number in rng.permutation(batches)]


def _batches(dense: LanguageModel, windows: np.ndarray) -> list[_Batch]:
    mesh = mesh_of(dense.decoder)
    found = []
    for rows, real in even_batches(len(windows), 1, ways(mesh)):
        tokens = put_batch(windows[rows].astype(np.int32), mesh)
        found.append(_Batch(tokens, dense.decoder.hidden_states(tokens), real))
    return found


def _divergence(decoder: Decoder, layers: Sequence[_Layer], batches: Sequence[_Batch], rope: RopeTable) -> float:
    """Mean over the tokens of the real windows, in nats."""
    sums, windows = 0.0, 0
    for batch in batches:
        x = decoder.embed(batch.tokens)
        for layer in layers:
            x = run_block(layer.whole, x, rope)
        kl = to_host(token_kl(decoder, predictions(decoder, batch.dense), decoder.norm(x)))[: batch.real]
        sums, windows = sums + float(kl.mean(1, dtype=np.float64).sum()), windows + batch.real
    return sums / windows


def _step(
    decoder: Decoder,
    layers: Sequence[_Layer],
    batch: _Batch,
    rope: RopeTable,
    settings: RefineSettings,
    steps: int,
) -> float:
    """One step of all layers; the divergence before it, summed over the real windows."""
    x, boundaries = decoder.embed(batch.tokens), []
    for layer in layers:
        boundaries.append(x)
        x = run_block(layer.whole, x, rope)
    normed, pullback = jax.vjp(decoder.norm, x)
    kl, gradient = token_kl_gradient(decoder, batch.dense, normed)
    counts = jnp.arange(len(gradient)) < batch.real
    (cotangent,) = pullback(jnp.where(counts[:, None, None], gradient / (batch.real * x.shape[1]), 0).astype(x.dtype))
    for layer in reversed(layers):
        gradients, cotangent = _backward(layer.whole, boundaries.pop(), rope, cotangent)
        # Back to where the weights lie, before anything of their size is made of them. What lies there stays as it is:
        # put there explicitly, it would make the next step compile every program again.
        for name, weight in layer.weights.items():
            if gradients[name].sharding != weight.sharding:
                gradients[name] = jax.device_put(gradients[name], weight.sharding)
        layer.weights, layer.state = _update(settings, steps, layer.weights, layer.state, layer.sizes, gradients)
    return float(to_host(kl)[: batch.real].mean(1, dtype=np.float64).sum())


@functools.partial(jax.jit, donate_argnames="cotangent")
def _backward(block: Block, x: Array, rope: RopeTable, cotangent: Array) -> tuple[dict[str, Array], Array]:
    """Gradients with respect to a layer's projections, float32, and to its input."""

    def run(weights: dict[str, Array], x: Array) -> Array:
        return with_weights(block, weights)(x, rope)

    arrays = {name: a for name, a in decoder_to_arrays(block).items() if name.endswith("_proj")}
    _, pullback = jax.vjp(run, {name: a.astype(jnp.float32) for name, a in arrays.items()}, x)
    return pullback(cotangent)


@functools.partial(jax.jit, static_argnames=("settings", "steps"), donate_argnames="state")
def _update(
    settings: RefineSettings,
    steps: int,
    weights: dict[str, Array],
    state: Any,
    sizes: dict[str, Array],
    gradients: dict[str, Array],
) -> tuple[dict[str, Array], Any]:
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to its integer step count
        update, state = _optimiser(settings, steps).update(gradients, state)
    step = cast(dict[str, Array], update)
    return {name: weight + sizes[name] * step[name] for name, weight in weights.items()}, state


def _optimiser(settings: RefineSettings, steps: int) -> optax.GradientTransformation:
    warmup = min(settings.warmup, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(
        settings.learning_rate / (warmup + 1), settings.learning_rate, warmup, steps
    )
    return optax.chain(optax.scale_by_adam(b2=0.95), optax.scale_by_learning_rate(schedule))


def with_weights(block: Block, weights: Mapping[str, Array]) -> Block:
    """The block with some arrays exchanged, in its own dtype."""
    leaves, treedef = jax.tree.flatten(block)
    names = list(decoder_to_arrays(block))
    new = [
        weights[name].astype(leaf.dtype) if name in weights else leaf for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)
