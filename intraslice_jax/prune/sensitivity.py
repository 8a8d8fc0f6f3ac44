"""Ratios by what really happens when a module alone is pruned (docs/method.md 6.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.gradients import OnBatch
from intraslice_jax.config import PruneConfig
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, block_from_arrays, decoder_to_arrays, run_block
from intraslice_jax.models.head import Predictions, predictions, token_kl
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import gathered, mesh_of, put_batch, to_host
from intraslice_jax.prune.allocation import allocate_by_curves, allocate_evenly
from intraslice_jax.prune.budget import LayerRatios, narrowest
from intraslice_jax.prune.calibration import AttentionCalibration, MLPCalibration, ResidualStream, batch_size, replace
from intraslice_jax.prune.methods import create_method
from intraslice_jax.prune.resume import RunLog

HELD_OUT = 1 / 8
"""Fraction of the calibration windows on which the divergence is measured."""

JUDGED = 1024
"""Tokens at which predictions are compared, spread evenly over the held-out windows: the head costs more than all
layers of a small model."""

CONTEXT = 512
"""Tokens of a held-out window that are read: all layers behind a module run over them for every measurement."""

MEASURED = "divergences"
"""What a run's log calls the costs of its first layers."""

LEAST_COST = 1e-7
"""Nats per token: below it, divergences are rounding."""


@dataclass(frozen=True)
class KLSensitivity:
    """One module after the other is pruned, all else dense, and the KL divergence is what that costs.

    The divergence is that of the next-token distribution from the dense model's on held-out windows.

    Attributes:
        points: at which multiples of the wanted sparsity each module is pruned, ascending. Between them and beyond, the
            cost is interpolated (`allocation.allocate_by_curves`).
    """

    points: tuple[float, ...] = (1.0,)

    def __call__(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None = None,
    ) -> LayerRatios:
        """Ratios of the least total cost; `on_batch` is told the measurements done and their number."""
        return self.resumed(model, windows, config, on_batch, None)

    def resumed(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None,
        run_log: RunLog | None,
    ) -> LayerRatios:
        """The same, going on behind the layers of which the log has measurements."""
        if config.sparsity == 0:
            return allocate_evenly(model.config, config)
        ratios = tuple(sorted({min(config.sparsity * point, config.max_ratio) for point in self.points}))
        costs = divergences(model, windows, config, ratios, on_batch, run_log)
        return allocate_by_curves(model.config, ratios, costs, config)


def divergences(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    ratios: tuple[float, ...],
    on_batch: OnBatch | None = None,
    run_log: RunLog | None = None,
) -> tuple[Float[np.ndarray, "layers ratios"], Float[np.ndarray, "layers ratios"]]:
    """Mean KL divergence per token, in nats, that pruning each layer's attention, and each layer's MLP, alone gives.

    Args:
        model: dense, or pruned before.
        windows: int32 calibration tokens. The last ones are held out for the divergence, unless there is but one.
        config: the method.
        ratios: at which each module is pruned.
        on_batch: told the measurements done and their number.
        run_log: keeps what was measured, layer by layer.
    """
    held_out = max(1, round(len(windows) * HELD_OUT))
    train = windows[:-held_out] if len(windows) > held_out else windows
    tail = _Tail.start(model, windows[-held_out:])
    costs = np.zeros((2, model.config.num_layers, len(ratios)))
    measured = [] if run_log is None else run_log.get(MEASURED) or []
    for layer, found in enumerate(measured):
        costs[:, layer] = found
    first = len(measured)
    for done, alone in enumerate(_pruned_alone(model, train, config, ratios, first), first * 2 * len(ratios) + 1):
        while alone.layer > tail.layer:
            tail.advance()
        costs[alone.kind, alone.layer, alone.point] = tail.divergence(alone.block)
        if run_log is not None and (alone.kind, alone.point) == (1, len(ratios) - 1):
            measured.append(costs[:, alone.layer].tolist())
            run_log.put(MEASURED, measured)
        if on_batch is not None:
            on_batch(done, costs.size)
    costs = np.maximum(costs, LEAST_COST)
    return costs[0], costs[1]


class _Alone(NamedTuple):
    """A layer of which one module is pruned."""

    kind: int
    """0 for the attention, 1 for the MLP."""
    layer: int
    point: int
    """Which of the ratios."""
    block: Block


def _pruned_alone(
    model: LanguageModel, windows: np.ndarray, config: PruneConfig, ratios: tuple[float, ...], first: int
) -> Iterator[_Alone]:
    """The layers from the first one wanted on; the others are only passed through."""
    method, dense = create_method(config.method), model.config
    config = dataclasses.replace(config, iterative="never")
    rows = ways(mesh_of(model.decoder))
    stream = ResidualStream.start(model, windows, batch_size(dense, windows.shape, config, rows))
    anything = (0, dense.block_parameters())
    for i, block in enumerate(map(gathered, model.decoder.layers)):
        shape, arrays = dense.layers[i], decoder_to_arrays(block)
        before = AttentionCalibration(i, block, shape, stream, config, dense, anything)
        for point, ratio in enumerate(ratios if i >= first else ()):
            attention = method.prune_attention(before, ratio)
            pruned = replace(arrays, "attention", attention.arrays, stream.mesh)
            yield _Alone(0, i, point, block_from_arrays(dense, attention.shape, pruned))

        calibration, inner = MLPCalibration.run(i, dense, shape, arrays, stream, config), shape.intermediate_size
        for point, ratio in enumerate(ratios if i >= first else ()):
            keep = max(narrowest(inner, config.align, 1.0), round(inner * (1 - ratio)))
            pruned = replace(arrays, "mlp", method.prune_mlp(calibration, keep).arrays, stream.mesh)
            narrow = dataclasses.replace(shape, intermediate_size=keep)
            yield _Alone(1, i, point, block_from_arrays(dense, narrow, pruned))
        stream.batches = calibration.outputs(block, np.arange(inner))


@dataclass
class _Tail:
    """The held-out windows at one layer boundary of the dense model, and its predictions."""

    model: LanguageModel
    layer: int
    x: Float[Array, "batch seq hidden"]
    positions: Int[np.ndarray, " judged"]
    predicted: Predictions

    @classmethod
    def start(cls, model: LanguageModel, windows: np.ndarray) -> _Tail:
        windows = windows[:, :CONTEXT]
        tokens = put_batch(windows.astype(np.int32), mesh_of(model.decoder))
        count, seq = windows.shape
        positions = np.unique(np.linspace(0, seq - 1, max(1, min(JUDGED // count, seq))).round().astype(np.int32))
        predicted = predictions(model.decoder, model.decoder.hidden_states(tokens)[:, positions])
        return cls(model, 0, model.decoder.embed(tokens), positions, predicted)

    def advance(self) -> None:
        """Goes on to the next layer."""
        self.x = run_block(gathered(self.model.decoder.layers[self.layer]), self.x, self._rope)
        self.layer += 1

    def divergence(self, block: Block) -> float:
        """Mean divergence when the layer at hand is replaced."""
        decoder, x = self.model.decoder, run_block(block, self.x, self._rope)
        for later in range(self.layer + 1, len(decoder.layers)):
            x = run_block(gathered(decoder.layers[later]), x, self._rope)
        divergence = token_kl(decoder, self.predicted, decoder.norm(x[:, self.positions]))
        return float(to_host(divergence).mean(dtype=np.float64))

    @property
    def _rope(self):
        return self.model.decoder.rope_for(self.x.shape[1])
