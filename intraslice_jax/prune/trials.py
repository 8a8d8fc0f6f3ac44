"""One module after the other pruned in several ways, all else as in a given model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from intraslice_jax.calibrate.lanes import lanes
from intraslice_jax.config import LayerShape, PruneConfig
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, block_from_arrays, decoder_to_arrays
from intraslice_jax.models.padding import pad_attention, pad_mlp
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import gathered, mesh_of, put_weights, to_host
from intraslice_jax.parallel.rules import RULES
from intraslice_jax.prune.budget import HeadWidths
from intraslice_jax.prune.calibration import (
    AttentionCalibration,
    MLPCalibration,
    ResidualStream,
    batch_size,
    part,
    replace,
)
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.methods import create_method


class Trials(NamedTuple):
    """How the modules of a layer are pruned: attentions by a ratio or to widths, MLPs to a number of channels."""

    attention: Sequence[float | HeadWidths]
    mlp: Sequence[int]


class Variant(NamedTuple):
    """A layer, in the shape of the dense one, of which one module is pruned."""

    kind: int
    """0 for the attention, 1 for the MLP."""
    layer: int
    number: int
    """Of the trial."""
    heads: HeadWidths | None
    """What the trial wants to keep of the attention, where it says that."""
    shape: LayerShape
    """The dense layer with that module as it really is."""
    block: Block


def variants(
    dense: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    trials: Callable[[int], Trials],
    first: int = 0,
    base: Callable[[int], Block] | None = None,
) -> Iterator[Variant]:
    """Every layer, in order, with one module of the dense model pruned anew and all else of another model.

    All have the shape of the dense layer, what is pruned being zero, so that one program runs them.

    Args:
        dense: what is pruned.
        windows: int32 calibration tokens; they go through the layers of `base`.
        config: the method.
        trials: of each layer.
        first: the first layer wanted.
        base: gives the other model's layers, in the shapes of the dense ones; the dense layers if not given.
    """
    method = create_method(config.method)
    config = dataclasses.replace(config, iterative="never")
    mesh = mesh_of(dense.decoder)
    batch = batch_size(dense.config, windows.shape, config, ways(mesh), lanes(mesh))
    stream = ResidualStream.start(dense, windows, batch)
    whole = (0, dense.config.block_parameters())
    for i, block in enumerate(map(gathered, dense.decoder.layers)):
        other = block if base is None else gathered(base(i))
        if i < first:
            stream.run(other)
            continue
        shape, others, wanted = dense.config.layers[i], decoder_to_arrays(other), trials(i)
        before = AttentionCalibration(i, block, shape, stream, config, dense.config, whole, tried=True)
        for number, how in enumerate(wanted.attention):
            if isinstance(how, HeadWidths):
                heads, attention = how, IntraSlice(heads={i: how}).prune_attention(before, 0.0)
            else:
                heads, attention = None, method.prune_attention(before, how)
            padded = pad_attention(attention.arrays, attention.shape, shape)
            arrays = replace(others, "attention", padded, stream.mesh)
            yield Variant(0, i, number, heads, attention.shape, block_from_arrays(dense.config, shape, arrays))
        # The MLP is the dense one behind the other model's attention.
        arrays = {**others, **{name: a for name, a in decoder_to_arrays(block).items() if name.startswith("mlp.")}}
        calibration = MLPCalibration.run(i, dense.config, shape, arrays, stream, config)
        for number, keep in enumerate(wanted.mlp):
            padded = pad_mlp(method.prune_mlp(calibration, keep).arrays, shape.intermediate_size)
            arrays = replace(others, "mlp", padded, stream.mesh)
            narrow = dataclasses.replace(shape, intermediate_size=keep)
            yield Variant(1, i, number, None, narrow, block_from_arrays(dense.config, shape, arrays))
        same = None if base is not None else np.arange(shape.intermediate_size)
        stream.batches = calibration.outputs(other, same)


def padded_block(pruned: LanguageModel, dense: LanguageModel, index: int) -> Block:
    """A layer of a pruned model in the shape of the dense one, where that lies."""
    narrow, wide = pruned.config.layers[index], dense.config.layers[index]
    arrays = {name: to_host(array) for name, array in decoder_to_arrays(pruned.decoder.layers[index]).items()}
    arrays |= {f"attention.{n}": a for n, a in pad_attention(part(arrays, "attention"), narrow, wide).items()}
    arrays |= {f"mlp.{n}": a for n, a in pad_mlp(part(arrays, "mlp"), wide.intermediate_size).items()}
    mesh = mesh_of(dense.decoder)
    placed = arrays if mesh is None else put_weights(arrays, mesh, RULES.in_use(), quiet=True)
    return block_from_arrays(dense.config, wide, placed)
