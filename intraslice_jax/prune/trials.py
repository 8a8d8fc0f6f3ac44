"""One module after the other pruned at several ratios, all else dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from intraslice_jax.calibrate.lanes import lanes
from intraslice_jax.config import PruneConfig
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, block_from_arrays, decoder_to_arrays
from intraslice_jax.models.padding import pad_attention, pad_mlp
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import gathered, mesh_of
from intraslice_jax.prune.budget import narrowest
from intraslice_jax.prune.calibration import (
    AttentionCalibration,
    MLPCalibration,
    ResidualStream,
    batch_size,
    replace,
)
from intraslice_jax.prune.methods import create_method


class Variant(NamedTuple):
    """A layer, in the shape of the dense one, of which one module is pruned."""

    kind: int
    """0 for the attention, 1 for the MLP."""
    layer: int
    number: int
    """Of the ratio."""
    block: Block


def variants(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    ratios: Sequence[float],
    first: int = 0,
) -> Iterator[Variant]:
    """Every layer, in order, with one module pruned alone at each of the ratios.

    All have the shape of the dense layer, what is pruned being zero, so that one program runs them.

    Args:
        model: what is pruned.
        windows: int32 calibration tokens.
        config: the method.
        ratios: at which each module is pruned.
        first: the first layer wanted.
    """
    method = create_method(config.method)
    config = dataclasses.replace(config, iterative="never")
    mesh = mesh_of(model.decoder)
    batch = batch_size(model.config, windows.shape, config, ways(mesh), lanes(mesh))
    stream = ResidualStream.start(model, windows, batch)
    whole = (0, model.config.block_parameters())
    for i, block in enumerate(map(gathered, model.decoder.layers)):
        if i < first:
            stream.run(block)
            continue
        shape, arrays = model.config.layers[i], decoder_to_arrays(block)

        before = AttentionCalibration(i, block, shape, stream, config, model.config, whole, tried=True)
        for number, ratio in enumerate(ratios):
            attention = method.prune_attention(before, ratio)
            changed = replace(arrays, "attention", pad_attention(attention.arrays, attention.shape, shape), mesh)
            yield Variant(0, i, number, block_from_arrays(model.config, shape, changed))
        calibration = MLPCalibration.run(i, model.config, shape, arrays, stream, config)
        inner, least = shape.intermediate_size, narrowest(shape.intermediate_size, config.align, 1.0)
        for number, ratio in enumerate(ratios):
            pruned = method.prune_mlp(calibration, max(least, round(inner * (1 - ratio))))
            changed = replace(arrays, "mlp", pad_mlp(pruned.arrays, inner), mesh)
            yield Variant(1, i, number, block_from_arrays(model.config, shape, changed))
        stream.batches = calibration.outputs(block, np.arange(inner))
