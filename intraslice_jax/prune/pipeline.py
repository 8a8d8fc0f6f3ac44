"""The loop over layers: calibrate a block, prune it, pass the pruned block's outputs on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.statistics import AttentionMoments, GramMoments, MapMoments, zeros_like_moments
from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, block_from_arrays, decoder_from_arrays, decoder_to_arrays
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.prune.attention import (
    AttentionPlan,
    HeadEnergies,
    PrunedAttention,
    plan_heads,
    prune_attention,
    select_pairs,
)
from intraslice_jax.prune.budget import LayerRatios, Ledger, uniform_ratios
from intraslice_jax.prune.linalg import solver_precision
from intraslice_jax.prune.mlp import PrunedMLP, prune_mlp


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
    attention_solver: str
    mlp_solver: str
    seconds: float


def prune_model(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    config: PruneConfig,
    on_layer: Callable[[LayerRecord], None] | None = None,
) -> LanguageModel:
    """A really smaller model (paper algorithm 1 with the fused weights kept; ALGORITHM sections 2 and 3).

    Args:
        model: dense, or pruned before.
        windows: int32 calibration tokens.
        config: how much and how.
        on_layer: called after each layer with its record.

    Returns:
        The pruned model; its `report` holds the records and the fractions removed.

    Raises:
        InputError: the windows or the configuration do not fit the model.
        RunError: an activation or a second moment is not finite.
    """
    started = time.monotonic()
    _check_windows(model, windows)
    ratios = uniform_ratios(model.config, config.sparsity)
    with jax.default_matmul_precision("highest"):
        stream = ResidualStream.start(model, windows, _batch_size(model.config, windows.shape, config))
        blocks, records = _prune_layers(model, stream, ratios, config, on_layer)
    arrays = {k: v for k, v in decoder_to_arrays(model.decoder).items() if not k.startswith("layers.")}
    for i, block in enumerate(blocks):
        arrays |= {f"layers.{i}.{name}": array for name, array in block.arrays.items()}
    pruned = model.config.with_layers(tuple(block.shape for block in blocks))
    report = {
        "sparsity": config.sparsity,
        "removed_block_fraction": 1 - pruned.block_parameters() / model.config.block_parameters(),
        "removed_model_fraction": 1 - pruned.total_parameters() / model.config.total_parameters(),
        "block_parameters": {"dense": model.config.block_parameters(), "pruned": pruned.block_parameters()},
        "total_parameters": {"dense": model.config.total_parameters(), "pruned": pruned.total_parameters()},
        "distinct_layer_shapes": pruned.distinct_shapes(),
        "calibration_samples": windows.shape[0],
        "calibration_sequence_length": windows.shape[1],
        "solver_dtype": "float64",
        "ratios": dataclasses.asdict(ratios),
        "layers": [dataclasses.asdict(record) for record in records],
        "prune_seconds": time.monotonic() - started,
    }
    return dataclasses.replace(model, config=pruned, decoder=decoder_from_arrays(pruned, arrays), report=report)


class PrunedBlock(NamedTuple):
    """A layer's new arrays and shape."""

    arrays: dict[str, Array]
    shape: LayerShape


@dataclass
class ResidualStream:
    """The calibration set at one layer boundary: the only activations that are kept.

    Attributes:
        batches: inputs of the layer at hand, [batch, seq, hidden] each.
        rope: position tables, the same for all batches.
        tokens: how many tokens there are.
    """

    batches: list[Array]
    rope: RopeTable
    tokens: int

    @classmethod
    def start(cls, model: LanguageModel, windows: np.ndarray, batch_size: int) -> ResidualStream:
        """Embeds the windows."""
        parts = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        embedded = [model.decoder.embed(jnp.asarray(part)) for part in parts]
        return cls(embedded, model.decoder.rope_for(windows.shape[1]), windows.size)


def _prune_layers(
    model: LanguageModel,
    stream: ResidualStream,
    ratios: LayerRatios,
    config: PruneConfig,
    on_layer: Callable[[LayerRecord], None] | None,
) -> tuple[list[PrunedBlock], list[LayerRecord]]:
    ledger = Ledger(model.config, ratios, config.align)
    blocks: list[PrunedBlock] = []
    records: list[LayerRecord] = []
    for i, block in enumerate(model.decoder.layers):
        started = time.monotonic()
        shape, arrays = model.config.layers[i], decoder_to_arrays(block)
        attention, plan = _attention_step(i, block, shape, stream, ratios.attention[i], config)
        ledger.attention_done(i, attention.shape)
        arrays = _replace(arrays, "attention", attention.arrays)
        width = ledger.mlp_width(i)
        mlp, after_attention = _mlp_step(i, model.config, attention.shape, arrays, stream, width, config)
        arrays = _replace(arrays, "mlp", mlp.arrays)
        shape = dataclasses.replace(attention.shape, intermediate_size=width)
        pruned = block_from_arrays(model.config, shape, arrays)
        sources = stream.batches if model.config.parallel_block else [None] * len(after_attention)
        stream.batches = [
            statistics.finish_layer(pruned, x, source) for x, source in zip(after_attention, sources, strict=True)
        ]
        blocks.append(PrunedBlock(arrays, shape))
        record = LayerRecord(
            layer=i,
            kept_heads=plan.heads,
            query_heads=shape.num_attention_heads,
            kv_heads=shape.num_key_value_heads,
            qk_head_dim=shape.qk_head_dim,
            v_head_dim=shape.v_head_dim,
            intermediate_size=width,
            attention_error=attention.relative_error,
            mlp_error=mlp.relative_error,
            attention_solver=attention.method,
            mlp_solver=mlp.method,
            seconds=time.monotonic() - started,
        )
        records.append(record)
        if on_layer is not None:
            on_layer(record)
    ledger.check(tolerance=0.005)
    return blocks, records


def _attention_step(
    layer: int, block: Block, shape: LayerShape, stream: ResidualStream, ratio: float, config: PruneConfig
) -> tuple[PrunedAttention, AttentionPlan]:
    heads, v, qk = shape.num_attention_heads, shape.v_head_dim, shape.qk_head_dim
    first = zeros_like_moments(AttentionMoments, head_gram=(heads, v, v), pair_scores=(heads, qk))
    for x in stream.batches:
        first = statistics.add_attention(first, block, x, stream.rope)
    _check_finite(layer, "attention", first)
    arrays = _part(decoder_to_arrays(block), "attention")
    channels_in = heads * v
    with solver_precision():
        energies = HeadEnergies(arrays["o_proj"], first.head_gram)
        kept, width = plan_heads(energies, channels_in - round(channels_in * ratio))
    plan = AttentionPlan(tuple(int(h) for h in kept), tuple(shape.query_to_kv[h] for h in kept), min(width, qk), width)
    channels = select_pairs(np.asarray(first.pair_scores), plan, shape.rotary_dim)

    inputs = len(plan.heads) * v
    second = zeros_like_moments(
        MapMoments,
        gram=(inputs, inputs),
        cross=(inputs, channels_in),
        target_gram=(channels_in, channels_in),
        input_sum=(inputs,),
        target_sum=(channels_in,),
    )
    index, per_head = jnp.asarray(plan.heads), jnp.asarray(channels[list(plan.local_query_to_kv)])
    for x in stream.batches:
        second = statistics.add_kept_attention(second, block, x, stream.rope, index, per_head)
    _check_finite(layer, "attention", second)
    with solver_precision():
        pruned = prune_attention(arrays, shape, plan, channels, second, stream.tokens, config.damping)
    return pruned, plan


def _mlp_step(
    layer: int,
    model: ModelConfig,
    shape: LayerShape,
    arrays: Mapping[str, Array],
    stream: ResidualStream,
    width: int,
    config: PruneConfig,
) -> tuple[PrunedMLP, list[Array]]:
    """Prunes the MLP behind the already pruned attention; also returns the stream behind that attention."""
    inner = shape.intermediate_size
    block = block_from_arrays(model, shape, arrays)
    moments = zeros_like_moments(GramMoments, gram=(inner, inner), total=(inner,))
    after_attention = []
    for x in stream.batches:
        moments, after = statistics.attend_and_add_mlp(moments, block, x, stream.rope)
        after_attention.append(after)
    _check_finite(layer, "MLP", moments)
    with solver_precision():
        mlp = prune_mlp(_part(arrays, "mlp"), moments, stream.tokens, width, config.damping)
    return mlp, after_attention


def _part(arrays: Mapping[str, Array], module: str) -> dict[str, Array]:
    prefix = f"{module}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _replace(arrays: Mapping[str, Array], module: str, new: Mapping[str, Array]) -> dict[str, Array]:
    """The block's arrays with one module's exchanged, in the dtypes they had."""
    cast = {
        f"{module}.{name}": jnp.asarray(np.asarray(array), arrays[f"{module}.{name}"].dtype)
        for name, array in new.items()
    }
    return {**arrays, **cast}


def _check_windows(model: LanguageModel, windows: np.ndarray) -> None:
    samples, seq = windows.shape
    if samples < 1 or seq < 2:
        raise InputError(f"calibration needs at least one window of two tokens, found {samples} of {seq}")
    if seq > model.config.max_position_embeddings:
        raise InputError(
            f"sequence_length {seq} is longer than the model's context of {model.config.max_position_embeddings}"
        )
    if windows.max() >= model.config.vocab_size or windows.min() < 0:
        raise InputError(f"calibration holds token {windows.max()}, the vocabulary has {model.config.vocab_size}")


def _batch_size(model: ModelConfig, shape: tuple[int, ...], config: PruneConfig) -> int:
    """The largest divisor of the number of windows whose activations fit the memory budget."""
    samples, seq = shape
    wanted = config.batch_size
    if not wanted:
        widest = max(model.layers, key=lambda layer: layer.intermediate_size)
        per_token = 8 * model.hidden_size + 4 * widest.intermediate_size
        scores = 2 * widest.num_attention_heads * max(128, seq // 8)
        wanted = config.memory_budget // (4 * seq * (per_token + scores))
    return max(size for size in range(1, max(1, min(wanted, samples)) + 1) if samples % size == 0)


def _check_finite(layer: int, module: str, moments: Any) -> None:
    for name, array in moments._asdict().items():
        if not bool(jnp.isfinite(array).all()):
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
            raise RunError(
                f"layer {layer}, {module}: {name} is not finite at {first}; the weights or activations overflow "
                "(try --dtype float32)"
            )
