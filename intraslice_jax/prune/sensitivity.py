"""Ratios by what really happens when a module alone is pruned (docs/method.md 6.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.gradients import OnBatch
from intraslice_jax.config import PruneConfig
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, block_from_arrays, decoder_to_arrays, run_block
from intraslice_jax.models.head import token_kl
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import gathered, mesh_of, put_batch, to_host
from intraslice_jax.prune.allocation import allocate_by_cost
from intraslice_jax.prune.budget import LayerRatios, narrowest
from intraslice_jax.prune.calibration import AttentionCalibration, MLPCalibration, ResidualStream, batch_size, replace
from intraslice_jax.prune.methods import create_method

HELD_OUT = 1 / 16
"""Fraction of the calibration windows on which the divergence is measured."""

LEAST_COST = 1e-7
"""Nats per token: below it, divergences are rounding."""


@dataclass(frozen=True)
class KLSensitivity:
    """One module after the other is pruned at the wanted sparsity, all else dense.

    The KL divergence to the dense model's next-token distribution on held-out windows, taken to grow with the square
    of the ratio, is what the module's pruning costs.
    """

    def __call__(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None = None,
    ) -> LayerRatios:
        """Ratios of the least total cost; `on_batch` is told the modules done and their number."""
        attention, mlp = divergences(model, windows, config, on_batch)
        return allocate_by_cost(model.config, (attention, mlp), config)


def divergences(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    on_batch: OnBatch | None = None,
) -> tuple[Float[np.ndarray, " layers"], Float[np.ndarray, " layers"]]:
    """Mean KL divergence per token, in nats, that pruning each layer's attention, and each layer's MLP, alone gives.

    Args:
        model: dense, or pruned before.
        windows: int32 calibration tokens. The last ones are held out for the divergence, unless there is but one.
        config: the method, and the sparsity that each module is pruned at.
        on_batch: told the modules done and their number.
    """
    held_out = max(1, round(len(windows) * HELD_OUT))
    train = windows[:-held_out] if len(windows) > held_out else windows
    tail = _Tail.start(model, windows[-held_out:])
    costs = np.zeros((2, model.config.num_layers))
    for done, (kind, layer, block) in enumerate(_pruned_alone(model, train, config)):
        if kind == 0 and layer:
            tail.advance()
        costs[kind, layer] = tail.divergence(block)
        if on_batch is not None:
            on_batch(done + 1, costs.size)
    costs = np.maximum(costs, LEAST_COST)
    return costs[0], costs[1]


def _pruned_alone(model: LanguageModel, windows: np.ndarray, config: PruneConfig) -> Iterator[tuple[int, int, Block]]:
    """(0 for attention or 1 for MLP, layer, the layer with only that module pruned)."""
    method, dense = create_method(config.method), model.config
    config = dataclasses.replace(config, iterative="never")
    rows = ways(mesh_of(model.decoder))
    stream = ResidualStream.start(model, windows, batch_size(dense, windows.shape, config, rows))
    anything = (0, dense.block_parameters())
    for i, block in enumerate(map(gathered, model.decoder.layers)):
        shape, arrays = dense.layers[i], decoder_to_arrays(block)
        attention = method.prune_attention(
            AttentionCalibration(i, block, shape, stream, config, dense, anything), config.sparsity
        )
        yield (
            0,
            i,
            block_from_arrays(dense, attention.shape, replace(arrays, "attention", attention.arrays, stream.mesh)),
        )

        calibration = MLPCalibration.run(i, dense, shape, arrays, stream, config)
        inner = shape.intermediate_size
        keep = max(narrowest(inner, config.align, 1.0), round(inner * (1 - config.sparsity)))
        mlp = method.prune_mlp(calibration, keep)
        yield (
            1,
            i,
            block_from_arrays(
                dense,
                dataclasses.replace(shape, intermediate_size=keep),
                replace(arrays, "mlp", mlp.arrays, stream.mesh),
            ),
        )
        stream.batches = calibration.outputs(block, np.arange(inner))


@dataclass
class _Tail:
    """The held-out windows at one layer boundary of the dense model, and its predictions."""

    model: LanguageModel
    layer: int
    x: Float[Array, "batch seq hidden"]
    final: Float[Array, "batch seq hidden"]

    @classmethod
    def start(cls, model: LanguageModel, windows: np.ndarray) -> _Tail:
        tokens = put_batch(windows.astype(np.int32), mesh_of(model.decoder))
        return cls(model, 0, model.decoder.embed(tokens), model.decoder.hidden_states(tokens))

    def advance(self) -> None:
        """Goes on to the next layer."""
        self.x = run_block(gathered(self.model.decoder.layers[self.layer]), self.x, self._rope)
        self.layer += 1

    def divergence(self, block: Block) -> float:
        """Mean divergence when the layer at hand is replaced."""
        decoder, x = self.model.decoder, run_block(block, self.x, self._rope)
        for later in range(self.layer + 1, len(decoder.layers)):
            x = run_block(gathered(decoder.layers[later]), x, self._rope)
        divergence = token_kl(decoder, self.final, decoder.norm(x))
        return float(to_host(divergence).mean(dtype=np.float64))

    @property
    def _rope(self):
        return self.model.decoder.rope_for(self.x.shape[1])
