"""What a pruning method may ask about the layer at hand: its weights, and moments streamed over the calibration set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.statistics import (
    AttentionMoments,
    GramMoments,
    MapMoments,
    Moments,
    empty_map_moments,
    zeros_like_moments,
)
from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, block_from_arrays, decoder_to_arrays
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.batches import even_batches
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.moments import MomentSum
from intraslice_jax.parallel.placement import local, mesh_of, put_batch, replicated, to_host


@dataclass
class ResidualStream:
    """The calibration set at one layer boundary: the only activations that are kept.

    Attributes:
        batches: inputs of the layer at hand, [batch, seq, hidden] each, split over the mesh's `data`.
        real: how many sequences of each batch count; copies fill up the rest.
        rope: position tables, the same for all batches.
        tokens: how many tokens there are.
        mesh: which the model lies on, None for one device.
    """

    batches: list[Array]
    real: list[int]
    rope: RopeTable
    tokens: int
    mesh: Mesh | None = None

    @classmethod
    def start(cls, model: LanguageModel, windows: np.ndarray, batch_size: int) -> ResidualStream:
        """Embeds the windows, `batch_size` at a time for each part of the mesh's `data`."""
        mesh = mesh_of(model.decoder)
        parts = list(even_batches(len(windows), batch_size, ways(mesh)))
        embedded = [model.decoder.embed(put_batch(windows[rows], mesh)) for rows, _ in parts]
        rope = replicated(model.decoder.rope_for(windows.shape[1]), mesh)
        return cls(embedded, [real for _, real in parts], rope, windows.size, mesh)

    def moments(self, step: Callable[..., Moments], empty: Moments, block: Block, *more: Array) -> Moments:
        """Sums over all sequences of what `step(moments, block, x, rope, *more)` adds for each batch."""
        total = MomentSum(empty, self.mesh)
        more = replicated(more, self.mesh)
        for x, real in zip(self.batches, self.real, strict=True):
            total.add(step, real, block, x, self.rope, *more)
        return total.total()


@dataclass(frozen=True)
class AttentionCalibration:
    """A layer before its attention is pruned.

    Attributes:
        index: the layer's number.
        block: the layer as it is.
        shape: its widths.
        stream: its inputs, coming from the already pruned layers below.
        config: the run's settings.
        model: the model's description.
        parameter_range: the fewest and the most parameters that the attention may keep for the budget of the
            whole model to be met.
    """

    index: int
    block: Block
    shape: LayerShape
    stream: ResidualStream
    config: PruneConfig
    model: ModelConfig
    parameter_range: tuple[int, int]

    @property
    def tokens(self) -> int:
        """How many tokens every moment sums over."""
        return self.stream.tokens

    @functools.cached_property
    def arrays(self) -> dict[str, Array]:
        """The attention's weights by name (`q_proj` [hidden, heads, qk], ...), whole on one device."""
        return local(part(decoder_to_arrays(self.block), "attention"))

    def head_moments(self) -> AttentionMoments:
        """Per-head second moments of the o-projection's input, and query-key scores."""
        empty = statistics.empty_attention_moments(self.shape)
        return check_finite(self.index, "attention", self.stream.moments(statistics.add_attention, empty, self.block))

    def kept_moments(
        self,
        heads: tuple[int, ...],
        query_maps: Float[Array, "kept qk width"],
        key_maps: Float[Array, "kept qk width"],
    ) -> MapMoments:
        """Moments of the attention re-run with some query heads and mapped queries and keys, against the full one.

        Args:
            heads: kept query heads.
            query_maps: of each of them, for its rotated queries.
            key_maps: of each of them, for the rotated keys it reads.
        """
        v = self.shape.v_head_dim
        inputs, targets = len(heads) * v, self.shape.num_attention_heads * v
        moments = self.stream.moments(
            statistics.add_kept_attention,
            empty_map_moments(inputs, targets),
            self.block,
            jnp.asarray(heads),
            query_maps,
            key_maps,
        )
        return check_finite(self.index, "attention", moments)


@dataclass(frozen=True)
class MLPCalibration:
    """A layer whose attention is pruned and whose MLP is not yet.

    Attributes:
        index: the layer's number.
        block: the layer with its new attention.
        moments: of the down-projection's input.
        after_attention: the residual stream behind the new attention, batch by batch.
        sources: the layer's inputs where its MLP reads them (parallel blocks), else None.
        real: how many sequences of each batch count.
        tokens: how many tokens the moments sum over.
        config: the run's settings.
    """

    index: int
    block: Block
    moments: GramMoments
    after_attention: list[Array]
    sources: list[Array | None]
    real: list[int]
    tokens: int
    config: PruneConfig
    num_layers: int

    @classmethod
    def run(
        cls,
        index: int,
        model: ModelConfig,
        shape: LayerShape,
        arrays: Mapping[str, Array],
        stream: ResidualStream,
        config: PruneConfig,
    ) -> MLPCalibration:
        """Runs the new attention over the calibration set and takes the MLP's moments on the way."""
        block = block_from_arrays(model, shape, arrays)
        inner = shape.intermediate_size
        total = MomentSum(zeros_like_moments(GramMoments, gram=(inner, inner), total=(inner,)), stream.mesh)
        after_attention = [
            total.add_and_pass(statistics.attend_and_add_mlp, real, block, x, stream.rope)
            for x, real in zip(stream.batches, stream.real, strict=True)
        ]
        sources = stream.batches if model.parallel_block else [None] * len(after_attention)
        return cls(
            index,
            block,
            check_finite(index, "MLP", total.total()),
            after_attention,
            list(sources),
            stream.real,
            stream.tokens,
            config,
            model.num_layers,
        )

    @functools.cached_property
    def arrays(self) -> dict[str, Array]:
        """The MLP's weights by name (`up_proj` [hidden, inner], ...), whole on one device."""
        return local(part(decoder_to_arrays(self.block), "mlp"))

    def inputs(self) -> Iterator[Float[Array, "batch seq hidden"]]:
        """What the MLP reads, batch by batch, whole on one device."""
        for after, source, real in zip(self.after_attention, self.sources, self.real, strict=True):
            x = local(statistics.mlp_input(self.block, after, source))
            yield x if real == len(x) else x[:real]

    def outputs(self, block: Block) -> list[Array]:
        """The residual stream behind the layer once its MLP is `block`'s. Uses up `after_attention`."""
        return [
            statistics.finish_layer(block, after, source)
            for after, source in zip(self.after_attention, self.sources, strict=True)
        ]


def part(arrays: Mapping[str, Array], module: str) -> dict[str, Array]:
    """The arrays of one module of a block, by their names within it."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def check_weights(arrays: Mapping[str, Array]) -> None:
    """Raises InputError that names the first array with a value that is not finite."""
    good = jax.jit(lambda arrays: {name: jnp.isfinite(array).all() for name, array in arrays.items()})(dict(arrays))
    for name, finite in good.items():
        if not bool(finite):
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(to_host(arrays[name])))[0])
            raise InputError(f"{name} is not finite at {first}: the model is damaged, or overflowed when converted")


def check_finite(layer: int, module: str, moments: Any) -> Any:
    """The moments, or a RunError that names the first entry that is not finite."""
    for name, array in moments._asdict().items():
        if not bool(jnp.isfinite(array).all()):
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
            raise RunError(
                f"layer {layer}, {module}: {name} is not finite at {first}; the weights or activations overflow "
                "(try --dtype float32)"
            )
    return moments
