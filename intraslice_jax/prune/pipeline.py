"""The loop over layers: calibrate a block, prune it, pass the pruned block's outputs on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from intraslice_jax.config import LayerShape, PruneConfig
from intraslice_jax.environment import StageClock
from intraslice_jax.errors import InputError
from intraslice_jax.model import LanguageModel, on_mesh
from intraslice_jax.models.decoder import block_from_arrays, decoder_from_arrays, decoder_to_arrays
from intraslice_jax.parallel.distributed import agree
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import gathered, mesh_of, put_weights
from intraslice_jax.prune.biases import with_output_biases
from intraslice_jax.prune.budget import LayerRatios, Ledger
from intraslice_jax.prune.calibration import (
    AttentionCalibration,
    MLPCalibration,
    ResidualStream,
    batch_size,
    check_weights,
    replace,
)
from intraslice_jax.prune.estimators import estimate_ratios
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.method import PruningMethod
from intraslice_jax.prune.methods import create_method
from intraslice_jax.prune.shapes import layer_changes
from intraslice_jax.prune.uniform import UniformLayout, plan_uniform_layout


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one layer. Errors are relative squared errors of the module's output on calibration text."""

    layer: int
    kept_heads: tuple[int, ...]
    query_heads: int
    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    intermediate_size: int
    attention_error: float
    mlp_error: float
    notes: dict[str, Any]
    seconds: float


def prune_model(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    on_layer: Callable[[LayerRecord], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    ratios: LayerRatios | None = None,
    mesh: Mesh | None = None,
) -> LanguageModel:
    """A really smaller model (paper algorithm 1 with the fused weights kept; docs/method.md sections 2 and 3).

    Args:
        model: dense, or pruned before.
        windows: int32 calibration tokens.
        config: how much and how.
        on_layer: called after each layer with its record.
        on_batch: called while the ratios are estimated with the sequences done and their number.
        ratios: given, they are used instead of what `config.ratios` estimates.
        mesh: to spread the work over (`intraslice_jax.parallel.mesh`); None leaves the model on the device or the
            mesh that it is on.

    Returns:
        The pruned model, on the same devices; its `report` holds the records and the fractions removed.

    Raises:
        InputError: the windows or the configuration do not fit the model, or a weight is not finite.
        RunError: an activation or a second moment is not finite.
    """
    clock = StageClock()
    method = create_method(config.method)
    _check_windows(model, windows)
    mesh = mesh or mesh_of(model.decoder)
    model = on_mesh(model, mesh)
    check_weights(decoder_to_arrays(model.decoder))
    dense = model.config
    if config.output_biases:
        model = on_mesh(with_output_biases(model), mesh)
    with jax.default_matmul_precision("highest"):
        ratios = ratios or estimate_ratios(model, windows, config, on_batch)
        clock.finish("ratios")
        batch = batch_size(model.config, windows.shape, config, ways(mesh))
        layout = None
        if config.layout == "uniform":
            layout = plan_uniform_layout(model, ResidualStream.start(model, windows, batch), ratios, config)
            method = IntraSlice(layout)
        stream = ResidualStream.start(model, windows, batch)
        blocks, records = _prune_layers(model, stream, method, ratios, config, on_layer, layout)
    arrays = {k: v for k, v in decoder_to_arrays(model.decoder).items() if not k.startswith("layers.")}
    for i, block in enumerate(blocks):
        arrays |= {f"layers.{i}.{name}": array for name, array in block.arrays.items()}
    pruned = model.config.with_layers(tuple(block.shape for block in blocks))
    arrays = arrays if mesh is None else put_weights(arrays, mesh)
    clock.finish("layers")
    report = {
        "sparsity": config.sparsity,
        "method": config.method,
        "removed_block_fraction": 1 - pruned.block_parameters() / dense.block_parameters(),
        "removed_model_fraction": 1 - pruned.total_parameters() / dense.total_parameters(),
        "block_parameters": {"dense": dense.block_parameters(), "pruned": pruned.block_parameters()},
        "total_parameters": {"dense": dense.total_parameters(), "pruned": pruned.total_parameters()},
        "distinct_layer_shapes": pruned.distinct_shapes(),
        "calibration_samples": windows.shape[0],
        "calibration_sequence_length": windows.shape[1],
        "solver_dtype": "float64",
        "ratios": dataclasses.asdict(ratios),
        "layers": [dataclasses.asdict(record) for record in records],
        **layer_changes(dense, pruned),
        "stages": clock.stages,
    }
    return dataclasses.replace(model, config=pruned, decoder=decoder_from_arrays(pruned, arrays), report=report)


class PrunedBlock(NamedTuple):
    """A layer's new arrays and shape."""

    arrays: dict[str, Array]
    shape: LayerShape


def _prune_layers(
    model: LanguageModel,
    stream: ResidualStream,
    method: PruningMethod,
    ratios: LayerRatios,
    config: PruneConfig,
    on_layer: Callable[[LayerRecord], None] | None,
    layout: UniformLayout | None,
) -> tuple[list[PrunedBlock], list[LayerRecord]]:
    ledger = Ledger(model.config, ratios, config.align, config.max_ratio)
    blocks: list[PrunedBlock] = []
    records: list[LayerRecord] = []
    for i, block in enumerate(model.decoder.layers):
        started = time.monotonic()
        block = gathered(block)
        arrays = decoder_to_arrays(block)
        attention = method.prune_attention(
            AttentionCalibration(
                i, block, model.config.layers[i], stream, config, model.config, ledger.attention_range(i)
            ),
            ratios.attention[i],
        )
        agree(f"{attention.shape} {attention.heads}", f"layer {i}, attention")
        ledger.attention_done(i, attention.shape)
        arrays = replace(arrays, "attention", attention.arrays, stream.mesh)

        width = ledger.mlp_width(i) if layout is None else layout.intermediate_size
        calibration = MLPCalibration.run(i, model.config, attention.shape, arrays, stream, config)
        mlp = method.prune_mlp(calibration, width)
        agree(f"{None if mlp.channels is None else list(mlp.channels)}", f"layer {i}, MLP")
        arrays = replace(arrays, "mlp", mlp.arrays, stream.mesh)

        shape = dataclasses.replace(attention.shape, intermediate_size=width)
        stream.batches = calibration.outputs(block_from_arrays(model.config, shape, arrays), mlp.channels)
        # At rest a layer lies in parts, and what calibrated it must not outlive it.
        blocks.append(PrunedBlock(arrays if stream.mesh is None else put_weights(arrays, stream.mesh), shape))
        record = LayerRecord(
            layer=i,
            kept_heads=attention.heads,
            query_heads=shape.num_attention_heads,
            kv_heads=shape.num_key_value_heads,
            qk_head_dim=shape.qk_head_dim,
            v_head_dim=shape.v_head_dim,
            intermediate_size=width,
            attention_error=attention.relative_error,
            mlp_error=mlp.relative_error,
            notes={"attention": attention.notes, "mlp": mlp.notes},
            seconds=time.monotonic() - started,
        )
        records.append(record)
        del block, arrays, attention, calibration, mlp
        if on_layer is not None:
            on_layer(record)
    if layout is None:
        ledger.check()  # a layout was checked as a whole
    return blocks, records


def _check_windows(model: LanguageModel, windows: np.ndarray) -> None:
    samples, seq = windows.shape
    if samples < 1 or seq < 2:
        raise InputError(f"calibration needs at least one window of two tokens, found {samples} of {seq}")
    if samples < jax.process_count():
        raise InputError(
            f"{jax.process_count()} processes cannot share {samples} calibration windows; raise --samples to at least "
            f"{jax.process_count()}, or start fewer processes"
        )
    if seq > model.config.max_position_embeddings:
        raise InputError(
            f"sequence_length {seq} is longer than the model's context of {model.config.max_position_embeddings}"
        )
    for token in (windows.max(), windows.min()):
        if not 0 <= token < model.config.vocab_size:
            raise InputError(f"calibration holds token {token}, the vocabulary has {model.config.vocab_size}")
