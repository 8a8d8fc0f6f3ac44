"""The loop over layers: calibrate a block, prune it, pass the pruned block's outputs on."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int
from typing_extensions import TypedDict

from intraslice_jax.calibrate.gradients import OnBatch, token_gradients
from intraslice_jax.calibrate.lanes import lanes
from intraslice_jax.calibrate.token_weights import token_weights
from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.environment import StageClock
from intraslice_jax.errors import InputError
from intraslice_jax.io.memory import return_freed_blocks
from intraslice_jax.model import LanguageModel, on_mesh
from intraslice_jax.models.decoder import Decoder, block_from_arrays, decoder_from_arrays, decoder_to_arrays
from intraslice_jax.models.streamed import LayeredArrays, StreamedDecoder
from intraslice_jax.parallel.distributed import agree
from intraslice_jax.parallel.mesh import is_shared, ways
from intraslice_jax.parallel.placement import LocalParts, gathered, mesh_of, put_weights, to_host
from intraslice_jax.parallel.rules import RULES
from intraslice_jax.programs import ShapePrograms
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
from intraslice_jax.prune.drift import check_dense_targets, held_out_windows
from intraslice_jax.prune.estimators import FromFile, Uniform, estimate_ratios, find_estimator
from intraslice_jax.prune.intraslice import IntraSlice
from intraslice_jax.prune.method import PruningMethod
from intraslice_jax.prune.methods import create_method
from intraslice_jax.prune.refine import RefineSettings, refine
from intraslice_jax.prune.resume import RunLog
from intraslice_jax.prune.shapes import layer_changes
from intraslice_jax.prune.uniform import UniformLayout, plan_uniform_layout, unlike
from intraslice_jax.reading import Finite

OnStage = Callable[[str, int, int], None]
"""Told the stage, its steps done and their number."""

TOKEN_GRADIENTS = "token_gradients"
"""What a run's log calls their squared norms."""


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


class LayerFacts(TypedDict):
    """What a log keeps of a layer beside its arrays."""

    shape: LayerShape
    record: LayerRecord


class StreamFacts(TypedDict):
    """What a log keeps beside the stream behind a layer: `Ledger.owed`."""

    owed: Finite


def prune_model(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    on_layer: Callable[[LayerRecord], None] | None = None,
    on_stage: OnStage | None = None,
    ratios: LayerRatios | None = None,
    mesh: Mesh | None = None,
    run_log: RunLog | None = None,
) -> LanguageModel:
    """A really smaller model (paper algorithm 1 with the fused weights kept; docs/method.md sections 2 and 3).

    Args:
        model: dense, or pruned before.
        windows: int32 calibration tokens.
        config: how much and how.
        on_layer: called after each layer with its record.
        on_stage: called with the name of a stage (`ratios`, `token gradients`, `layers`, `refinement`), its steps done
            and their number: when the stage is taken up, with what an earlier run did of it, and after each step.
        ratios: given, they are used instead of what `config.ratios` estimates.
        mesh: to spread the work over (`intraslice_jax.parallel.mesh`); None leaves the model on the device or the
            mesh that it is on.
        run_log: keeps every finished layer, and what long stages have come to; what it holds of this run already is
            not done again.

    Returns:
        The pruned model, on the same devices; its `report` holds the records and the fractions removed. The layers
        of a `StreamedDecoder` come from `run_log`, or are in host memory where there is none.

    Raises:
        InputError: the windows or the configuration do not fit the model, or a weight is not finite.
        RunError: an activation or a second moment is not finite.
    """
    clock = StageClock()
    method = create_method(config.method)
    _check_windows(model, windows)
    if config.refine and isinstance(model.decoder, StreamedDecoder):
        raise InputError("refine learns all layers at once, which must be on the devices; give refine=0")
    estimator = find_estimator(config.ratios)
    if config.layout == "uniform" and ratios is None and not isinstance(estimator, Uniform | FromFile):
        raise unlike(config)
    mesh = mesh or mesh_of(model.decoder)
    check_dense_targets(model.config, len(windows), config, mesh)
    model = on_mesh(model, mesh)
    check_weights(decoder_to_arrays(model.decoder))
    dense = model.config
    if config.output_biases:
        model = on_mesh(with_output_biases(model), mesh)
    with jax.default_matmul_precision("highest"):
        ratios = ratios or _ratios(model, windows, config, _told(on_stage, "ratios"), run_log)
        clock.finish("ratios")
        if ratios.heads:
            if not isinstance(method, IntraSlice):
                raise InputError(f"only method intraslice takes widths of heads, found method {config.method}")
            method = IntraSlice(heads=dict(enumerate(ratios.heads)))
        samples, seq = windows.shape
        held_out = held_out_windows(samples, config)
        # A batch is either held out or not.
        batch = batch_size(model.config, (math.gcd(samples, held_out), seq), config, ways(mesh), lanes(mesh))
        weights = _token_weights(model, windows, config, _told(on_stage, "token gradients"), run_log)
        if weights is not None:
            clock.finish("token gradients")
        layout = None
        if config.layout == "uniform":
            layout = _layout(model, ResidualStream.start(model, windows, batch, weights), ratios, config, run_log)
            method = IntraSlice(layout)
        stream = ResidualStream.start(model, windows, batch, weights, held_out)
        watch = _Watch(on_layer, _told(on_stage, "layers"))
        blocks, records = _prune_layers(model, stream, method, ratios, config, watch, layout, run_log)
    pruned = model.config.with_layers(tuple(block.shape for block in blocks))
    decoder = _assembled(model.decoder, pruned, [block.arrays for block in blocks], mesh)
    clock.finish("layers")
    refinement = {}
    if config.refine and pruned != dense:
        with jax.default_matmul_precision("highest"):
            told = _told(on_stage, "refinement")
            decoder, refinement = refine(model, decoder, windows, RefineSettings(config.refine), told, run_log)
        clock.finish("refinement")
    report = {
        "sparsity": ratios.sparsity(dense) if isinstance(estimator, FromFile) else config.target_sparsity,
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
        **({"refinement": refinement} if refinement else {}),
        **layer_changes(dense, pruned),
        "stages": clock.stages,
    }
    return dataclasses.replace(model, config=pruned, decoder=decoder, report=report)


class _Watch(NamedTuple):
    """Who is told about the layers."""

    on_layer: Callable[[LayerRecord], None] | None
    on_batch: OnBatch | None


def _told(on_stage: OnStage | None, stage: str) -> OnBatch | None:
    return None if on_stage is None else functools.partial(on_stage, stage)


class PrunedBlock(NamedTuple):
    """A layer's new arrays and shape; the arrays are NumPy's where layers are streamed."""

    arrays: Mapping[str, Any]
    shape: LayerShape


def _ratios(
    model: LanguageModel,
    windows: np.ndarray,
    config: PruneConfig,
    on_batch: OnBatch | None,
    run_log: RunLog | None,
) -> LayerRatios:
    """Those that the log holds; else estimates them, and keeps them there if that took a pass over the text."""
    if run_log is not None and (kept := run_log.get("ratios", LayerRatios)) is not None:
        return kept
    found = estimate_ratios(model, windows, config, on_batch, run_log)
    if run_log is not None and not isinstance(find_estimator(config.ratios), Uniform | FromFile):
        run_log.put("ratios", dataclasses.asdict(found))
    return found


def _token_weights(
    model: LanguageModel,
    windows: np.ndarray,
    config: PruneConfig,
    on_batch: OnBatch | None,
    run_log: RunLog | None,
) -> np.ndarray | None:
    """How much every token counts in each layer's moments, by gradients of the log or new ones that are kept there.

    None for all alike, and for the baselines, which have no such setting.
    """
    if config.loss_weight == 0 or config.method != PruneConfig.method:
        return None
    kept = None if run_log is None else run_log.get_arrays(TOKEN_GRADIENTS, dict[str, Any])
    if kept is not None:
        return token_weights(kept[0]["squares"], config.loss_weight)
    found = token_gradients(
        model, windows, batch_size=config.batch_size, memory_budget=config.memory_budget, on_batch=on_batch
    )
    if run_log is not None:
        run_log.put_arrays(TOKEN_GRADIENTS, {"squares": found}, {})
    return token_weights(found, config.loss_weight)


def _layout(
    model: LanguageModel, stream: ResidualStream, ratios: LayerRatios, config: PruneConfig, run_log: RunLog | None
) -> UniformLayout:
    """That of the log, or a new one that is kept there."""
    if run_log is not None and (kept := run_log.get("layout", UniformLayout)) is not None:
        return kept
    found = plan_uniform_layout(model, stream, ratios, config)
    if run_log is not None:
        run_log.put("layout", dataclasses.asdict(found))
    return found


def _assembled(old: Decoder, config: ModelConfig, layers: Sequence[Mapping[str, Any]], mesh: Mesh | None) -> Decoder:
    """The old decoder with new layers, streamed if the old one was."""
    if isinstance(old, StreamedDecoder):
        return StreamedDecoder(config, LayeredArrays(old.arrays, layers), mesh)
    arrays = {k: v for k, v in decoder_to_arrays(old).items() if not k.startswith("layers.")}
    for i, layer in enumerate(layers):
        arrays |= {f"layers.{i}.{name}": array for name, array in layer.items()}
    return decoder_from_arrays(config, arrays if mesh is None else put_weights(arrays, mesh))


def _prune_layers(
    model: LanguageModel,
    stream: ResidualStream,
    method: PruningMethod,
    ratios: LayerRatios,
    config: PruneConfig,
    watch: _Watch,
    layout: UniformLayout | None,
    run_log: RunLog | None,
) -> tuple[list[PrunedBlock], list[LayerRecord]]:
    ledger = Ledger(model.config, ratios, config.align, config.max_ratio)
    streamed = isinstance(model.decoder, StreamedDecoder)
    blocks: list[PrunedBlock] = []
    records: list[LayerRecord] = []
    programs = ShapePrograms()
    if run_log is not None and run_log.layers_done:
        blocks, records = _finished(run_log, stream, ledger, streamed)
    count = model.config.num_layers
    if watch.on_batch is not None:
        watch.on_batch(len(blocks), count)
    for i in range(len(blocks), count):
        started = time.monotonic()
        if streamed:
            return_freed_blocks()  # of the layer before, or of what estimated the ratios
        block = gathered(model.decoder.layers[i])
        arrays = decoder_to_arrays(block)
        if streamed:
            check_weights(arrays, f"layers.{i}.")
        if stream.dense is not None:
            stream.dense.attend(block, stream.rope)
        attention = method.prune_attention(
            AttentionCalibration(
                i, block, model.config.layers[i], stream, config, model.config, ledger.attention_range(i)
            ),
            ratios.attention[i],
        )
        agree(f"{attention.shape} {attention.heads}", f"layer {i}, attention")
        ledger.attention_done(i, attention.shape)
        arrays = replace(arrays, "attention", attention.arrays, stream.mesh)

        if stream.dense is not None:
            stream.dense.finish(block)
        width = ledger.mlp_width(i) if layout is None else layout.intermediate_size
        calibration = MLPCalibration.run(i, model.config, attention.shape, arrays, stream, config, attention.behind)
        mlp = method.prune_mlp(calibration, width)
        agree(f"{None if mlp.channels is None else list(mlp.channels)}", f"layer {i}, MLP")
        arrays = replace(arrays, "mlp", mlp.arrays, stream.mesh)

        shape = dataclasses.replace(attention.shape, intermediate_size=width)
        small = block_from_arrays(model.config, shape, arrays)
        stream.batches = calibration.outputs(small, mlp.channels)
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
        if run_log is not None:
            facts = {"shape": dataclasses.asdict(shape), "record": dataclasses.asdict(record)}
            behind = _streams(stream) if i + 1 < model.config.num_layers else []
            run_log.layer_done(i, arrays, facts, behind, {"owed": ledger.owed})
        if streamed:  # the log gives them back when they are wanted
            arrays = _in_host_memory(arrays, stream.mesh) if run_log is None else {}
        elif stream.mesh is not None:
            arrays = put_weights(arrays, stream.mesh)  # at rest a layer lies in parts
        blocks.append(PrunedBlock(arrays, shape))
        # What calibrated a layer must not outlive it.
        del block, small, arrays, attention, calibration, mlp
        programs.done(model.config.layers[i], shape)
        if watch.on_batch is not None:
            watch.on_batch(i + 1, count)
        if watch.on_layer is not None:
            watch.on_layer(record)
    if layout is None:
        ledger.check()  # a layout was checked as a whole
    if run_log is not None:
        run_log.flush()
        if streamed:
            blocks = [PrunedBlock(run_log.layer(i, LayerFacts)[0], block.shape) for i, block in enumerate(blocks)]
    return blocks, records


def _in_host_memory(arrays: Mapping[str, Array], mesh: Mesh | None) -> Mapping[str, np.ndarray]:
    """A layer's arrays; of several processes each has the parts that it will put on its devices."""
    if is_shared(mesh):
        return LocalParts.of(put_weights(arrays, mesh, quiet=True))
    return {name: to_host(array) for name, array in arrays.items()}


def _finished(
    run_log: RunLog, stream: ResidualStream, ledger: Ledger, streamed: bool
) -> tuple[list[PrunedBlock], list[LayerRecord]]:
    """The layers of the log; brings the stream and the ledger to where they were behind the last of them."""
    blocks: list[PrunedBlock] = []
    records: list[LayerRecord] = []
    for i in range(run_log.layers_done):
        arrays, facts = run_log.layer(i, LayerFacts)
        if not streamed:
            whole = {name: arrays[name] for name in arrays}
            mesh = stream.mesh
            arrays = (
                {name: jnp.asarray(array) for name, array in whole.items()}
                if mesh is None
                else put_weights(whole, mesh, RULES.in_use(), quiet=True)
            )
        blocks.append(PrunedBlock(arrays, facts["shape"]))
        records.append(facts["record"])
    more = run_log.layers_done < len(ledger)
    both, facts = run_log.stream(_streams(stream) if more else [], StreamFacts)
    if stream.dense is not None:
        stream.dense.batches = both[len(stream.batches) :]
    stream.batches = both[: len(stream.batches)]
    ledger.owed = facts["owed"]
    return blocks, records


def _streams(stream: ResidualStream) -> list[Array]:
    """What a run that goes on behind a layer needs: the pruned model's batches, then the dense one's if it has them."""
    return stream.batches if stream.dense is None else [*stream.batches, *stream.dense.batches]


def _check_windows(model: LanguageModel, windows: np.ndarray) -> None:
    samples, seq = windows.shape
    if samples < 1 or seq < 2:
        raise InputError(f"calibration needs at least one window of two tokens, found {samples} of {seq}")
    if samples < jax.process_count():
        raise InputError(
            f"{jax.process_count()} processes cannot share {samples} calibration windows; raise `samples` to at least "
            f"{jax.process_count()}, or start fewer processes"
        )
    if seq > model.config.max_position_embeddings:
        raise InputError(
            f"sequence_length {seq} is longer than the model's context of {model.config.max_position_embeddings}"
        )
    for token in (windows.max(), windows.min()):
        if not 0 <= token < model.config.vocab_size:
            raise InputError(f"calibration holds token {token}, the vocabulary has {model.config.vocab_size}")
