"""What a pruning method may ask about the layer at hand: its weights, and moments streamed over the calibration set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.lanes import in_lanes
from intraslice_jax.calibrate.statistics import (
    AttentionMoments,
    DriftMoments,
    GramMoments,
    MapMoments,
    Mixed,
    empty_map_moments,
    zeros_like_moments,
)
from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.attention import Attention
from intraslice_jax.models.decoder import Block, block_from_arrays, decoder_to_arrays, run_block
from intraslice_jax.models.mlp import MLP
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.batches import even_batches
from intraslice_jax.parallel.distributed import from_first
from intraslice_jax.parallel.linalg import fits_one_device
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.moments import Moments, MomentSum
from intraslice_jax.parallel.placement import local, mesh_of, put_batch, put_weights, replicated, to_host
from intraslice_jax.parallel.rules import RULES
from intraslice_jax.prune.drift import DenseStream, Drift, SplitSum
from intraslice_jax.stages import stage

Weights = TypeVar("Weights", Array, np.ndarray)
Result = TypeVar("Result")


@dataclass
class ResidualStream:
    """The calibration set at one layer boundary: the only activations that are kept.

    Attributes:
        batches: inputs of the layer at hand, [batch, seq, hidden] each, split over the mesh's `data`.
        real: how many sequences of each batch count; copies fill up the rest.
        rope: position tables, the same for all batches.
        tokens: how many tokens there are.
        rows: which windows each batch holds.
        mesh: which the model lies on, None for one device.
        weights: how much every token counts in the moments of each layer, on average 1; None for all alike.
        dense: the same set in the dense model, where modules are corrected towards it, else None.
        held_out: how many batches, the last ones, hold the windows on which these corrections are judged.
    """

    batches: list[Array]
    real: list[int]
    rope: RopeTable
    tokens: int
    rows: list[Int[np.ndarray, " _"]]
    mesh: Mesh | None = None
    weights: Float[np.ndarray, "layers samples seq"] | None = None
    dense: DenseStream | None = None
    held_out: int = 0

    @classmethod
    def start(
        cls,
        model: LanguageModel,
        windows: np.ndarray,
        batch_size: int,
        weights: Float[np.ndarray, "layers samples seq"] | None = None,
        held_out: int = 0,
    ) -> ResidualStream:
        """Embeds the windows, `batch_size` at a time for each part of the mesh's `data`.

        Args:
            model: whose embedding it is.
            windows: int32 tokens.
            batch_size: of each device row.
            weights: of the tokens, None for all alike.
            held_out: so many windows, the last ones, come in batches of their own, and the stream of the dense model
                is carried along; 0 for neither.
        """
        mesh = mesh_of(model.decoder)
        first = len(windows) - held_out
        apart = [(first + rows, real) for rows, real in even_batches(held_out, batch_size, ways(mesh))]
        parts = [*even_batches(first, batch_size, ways(mesh)), *apart]
        embedded = [model.decoder.embed(put_batch(windows[rows], mesh)) for rows, _ in parts]
        rope = replicated(model.decoder.rope_for(windows.shape[1]), mesh)
        rows, real = [rows for rows, _ in parts], [real for _, real in parts]
        dense = DenseStream(list(embedded)) if held_out else None
        return cls(embedded, real, rope, windows.size, rows, mesh, weights, dense, len(apart))

    def each_batch(self, work: Callable[[int], Result]) -> list[Result]:
        """`work` of each batch's number, in order; see `in_lanes`. Sums that it adds to are to be awaited, too."""
        return in_lanes(work, range(len(self.batches)), self.mesh)

    def run(self, block: Block) -> None:
        """Goes on behind a layer."""
        self.batches = self.each_batch(lambda i: run_block(block, self.batches[i], self.rope))

    def moment_sum(self, empty: Callable[[], Moments]) -> SplitSum[Moments]:
        """A sum over the batches, those held out apart; `empty` makes zeros."""
        return SplitSum(empty, self.mesh, len(self.batches), self.held_out)

    def drift_sum(self, inputs: int) -> SplitSum[DriftMoments] | None:
        """Likewise of the drift from the dense model, if that is carried along."""
        if self.dense is None:
            return None
        hidden = self.batches[0].shape[-1]
        return self.moment_sum(lambda: statistics.empty_drift_moments(inputs, hidden))

    def weights_of(self, layer: int, batch: int) -> Float[Array, "batch seq"] | None:
        """How much each token of a batch counts in a layer's moments, on the devices that hold the batch."""
        if self.weights is None:
            return None
        return put_batch(self.weights[layer][self.rows[batch]], self.mesh)


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
        tried: pruned in several ways for comparison: what is computed once stays, and the stream behind is not wanted.
    """

    index: int
    block: Block
    shape: LayerShape
    stream: ResidualStream
    config: PruneConfig
    model: ModelConfig
    parameter_range: tuple[int, int]
    tried: bool = False
    _kept: dict[int, Mixed] = field(default_factory=dict)
    _again: dict[int, Array] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens every moment sums over."""
        return self.stream.tokens

    @functools.cached_property
    def arrays(self) -> dict[str, Array]:
        """The attention's weights by name (`q_proj` [hidden, heads, qk], ...), whole on one device."""
        return local(part(decoder_to_arrays(self.block), "attention"))

    @functools.cached_property
    @stage("attention moments")
    def head_moments(self) -> AttentionMoments:
        """Per-head second moments of the o-projection's input, and query-key scores."""
        empty = functools.partial(statistics.empty_attention_moments, self.shape)
        total = SplitSum(empty, self.stream.mesh, len(self.stream.batches))

        def add(i: int) -> MomentSum[AttentionMoments]:
            total.of(i).add(
                statistics.add_attention,
                self.stream.real[i],
                0,
                self._mixed(i),
                query_to_kv=self.shape.query_to_kv,
                rotary_dim=self.shape.rotary_dim,
                joint_pairs=self.config.pair_selection == "logits",
            )
            return total.of(i)

        self.stream.each_batch(add)
        return check_finite(self.index, "attention", total.totals()[0])

    def _mixed(self, batch: int) -> Mixed:
        """What the attention computes on a batch; remembered if that of all fits the memory budget."""
        if batch in self._kept:
            return self._kept[batch]
        mixed = statistics.mix(self.block, self.stream.batches[batch], self.stream.rope)
        mixed = mixed._replace(weights=self.stream.weights_of(self.index, batch))
        if fits(self.config, self.stream, mixed):
            self._kept[batch] = mixed
        return mixed

    @stage("attention re-run")
    def kept_moments(
        self,
        heads: tuple[int, ...],
        query_maps: Float[Array, "kept qk width"],
        key_maps: Float[Array, "kept qk width"],
    ) -> tuple[MapMoments, Drift | None]:
        """Moments of the attention re-run with some query heads and mapped queries and keys, against the full one.

        Also those of its drift from the dense model, where the dense stream is carried along.

        Args:
            heads: kept query heads.
            query_maps: of each of them, for its rotated queries.
            key_maps: of each of them, for the rotated keys it reads.
        """
        v = self.shape.v_head_dim
        inputs, targets = len(heads) * v, self.shape.num_attention_heads * v
        attention, kv = self.block.attention, [self.shape.query_to_kv[h] for h in heads]
        total, drifts = (
            self.stream.moment_sum(lambda: empty_map_moments(inputs, targets)),
            self.stream.drift_sum(inputs),
        )
        rows = jax.device_put((np.asarray(heads, np.int32), np.asarray(kv, np.int32)))
        kept = replicated((*rows, query_maps, key_maps), self.stream.mesh)

        def add(i: int) -> MomentSum[MapMoments]:
            mixed = self._mixed(i)
            (again,) = total.of(i).add_and_pass(
                statistics.add_kept_attention,
                self.stream.real[i],
                0,
                mixed,
                *kept,
                scale=attention.scale,
                sliding_window=attention.sliding_window,
            )
            add_drift(drifts, self.stream, i, attention, (mixed.y, again), self.stream.batches[i], mixed.weights)
            if not self.tried and fits(self.config, self.stream, again):
                self._again[i] = again
            return total.of(i)

        self.stream.each_batch(add)
        whole, held = total.totals()
        return check_finite(self.index, "attention", whole), drift_of(drifts, held)

    @stage("outputs")
    def after_attention(
        self, output: Float[Array, "kept v hidden"], bias: Float[Array, " hidden"] | None
    ) -> list[Array] | None:
        """The residual stream behind an attention whose y' `kept_moments` has just seen, batch by batch.

        None where y' was not kept, and for weights of less than float32: the new weights as they are stored would
        give something else.

        Args:
            output: from y' to the residual stream.
            bias: of the o-projection.
        """
        if not self._again or self.stream.mesh is not None or self.arrays["o_proj"].dtype != jnp.float32:
            return None
        behind = self.stream.each_batch(
            lambda i: statistics.leave_attention(self.stream.batches[i], self._again[i], output, bias)
        )
        self._again.clear()
        self._kept.clear()
        return behind


@dataclass(frozen=True)
class MLPCalibration:
    """A layer whose attention is pruned and whose MLP is not yet.

    Attributes:
        index: the layer's number.
        block: the layer with its new attention.
        moments: of the down-projection's input.
        after_attention: the residual stream behind the new attention, batch by batch.
        sources: the layer's inputs where its MLP reads them (parallel blocks), else None.
        inner_activations: the down-projection's input, batch by batch, or nothing if it does not fit the budget.
        real: how many sequences of each batch count.
        tokens: how many tokens the moments sum over.
        config: the run's settings.
        num_layers: of the model.
        mesh: which the model lies on, None for one device.
        drift: moments of the down-projection's input against the module's drift from the dense model, if that is
            carried along.
    """

    index: int
    block: Block
    moments: GramMoments
    after_attention: list[Array]
    sources: list[Array | None]
    inner_activations: list[Array]
    real: list[int]
    tokens: int
    config: PruneConfig
    num_layers: int
    mesh: Mesh | None = None
    drift: Drift | None = None

    @classmethod
    @stage("MLP moments")
    def run(
        cls,
        index: int,
        model: ModelConfig,
        shape: LayerShape,
        arrays: Mapping[str, Array],
        stream: ResidualStream,
        config: PruneConfig,
        behind: list[Array] | None = None,
    ) -> MLPCalibration:
        """Runs the new attention over the calibration set and takes the MLP's moments on the way.

        `behind` is the residual stream behind the new attention, where that is known already.
        """
        block = block_from_arrays(model, shape, arrays)
        inner = shape.intermediate_size
        total = stream.moment_sum(lambda: zeros_like_moments(GramMoments, gram=(inner, inner), total=(inner,)))
        drifts = stream.drift_sum(inner)
        norm = block.input_norm if block.post_norm is None else block.post_norm

        def add(i: int) -> tuple[Array, Array | None]:
            x, real, weights = stream.batches[i], stream.real[i], stream.weights_of(index, i)
            if behind is None:
                after, z = total.of(i).add_and_pass(
                    statistics.attend_and_add_mlp, real, (1, 3), block, x, stream.rope, weights
                )
            else:
                after, read = behind[i], x if model.parallel_block else behind[i]
                (z,) = total.of(i).add_and_pass(statistics.add_mlp, real, (2, 3), norm, block.mlp, read, weights)
            add_drift(drifts, stream, i, block.mlp, (z, z), after, weights)
            return after, z if fits(config, stream, z) else None

        after_attention, inner_activations = map(list, zip(*stream.each_batch(add), strict=True))
        sources = stream.batches if model.parallel_block else [None] * len(after_attention)
        whole, held = total.totals(split=stream.mesh is not None and not fits_one_device(inner))
        return cls(
            index,
            block,
            check_finite(index, "MLP", whole),
            after_attention,
            list(sources),
            [z for z in inner_activations if z is not None],
            stream.real,
            stream.tokens,
            config,
            model.num_layers,
            stream.mesh,
            drift_of(drifts, held),
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

    @stage("outputs")
    def outputs(self, block: Block, channels: Int[np.ndarray, " kept"] | None) -> list[Array]:
        """The residual stream behind the layer once its MLP is `block`'s. Uses up `after_attention`.

        Args:
            block: the layer as it now is.
            channels: which of the old MLP's inner activations the new one has, None if it has its own.
        """
        if channels is not None and self.inner_activations:
            kept = jax.device_put(channels)

            def finish(i: int) -> Array:
                return statistics.finish_selected(block.mlp, self.after_attention[i], self.inner_activations[i], kept)
        else:

            def finish(i: int) -> Array:
                return statistics.finish_layer(block, self.after_attention[i], self.sources[i])

        return in_lanes(finish, range(len(self.after_attention)), self.mesh)


def add_drift(
    drifts: SplitSum[DriftMoments] | None,
    stream: ResidualStream,
    batch: int,
    module: Attention | MLP,
    activations: tuple[Array, Array],
    before: Float[Array, "batch seq hidden"],
    weights: Float[Array, "batch seq"] | None,
) -> None:
    """Adds a batch to the moments of a module's drift, where there are any.

    Args:
        drifts: the sum.
        stream: with the dense stream behind the module.
        batch: its number.
        module: unpruned.
        activations: the input of its output projection, and that of the pruned module, on the pruned stream.
        before: the pruned stream before the module.
        weights: of the tokens.
    """
    if drifts is None or stream.dense is None:
        return
    full, kept = activations
    found = statistics.drift(module, full, before, stream.dense.batches[batch])
    drifts.of(batch).add(statistics.add_drift, stream.real[batch], (0, 1, 2), kept, found, weights)


def drift_of(drifts: SplitSum[DriftMoments] | None, held_plain: Any) -> Drift | None:
    """The sums, with the module's other moments on the windows held out."""
    if drifts is None:
        return None
    whole, held = drifts.totals()
    return None if held is None else Drift(whole, held, held_plain)


def fits(config: PruneConfig, stream: ResidualStream, per_batch: Any) -> bool:
    """Whether what one batch gave may be kept for all batches."""
    size = sum(array.nbytes for array in jax.tree.leaves(per_batch))
    return len(stream.batches) * size <= config.memory_budget * ways(stream.mesh)


def part(arrays: Mapping[str, Weights], module: str) -> dict[str, Weights]:
    """The arrays of one module of a block, by their names within it."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def check_weights(arrays: Mapping[str, Array], prefix: str = "") -> None:
    """Raises InputError that names the first array with a value that is not finite; `prefix` completes its path."""
    for name, finite in _finite(dict(arrays)).items():
        if not finite:
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(to_host(arrays[name])))[0])
            raise InputError(
                f"{prefix}{name} is not finite at {first}: the model is damaged, or overflowed when converted"
            )


def check_finite(layer: int, module: str, moments: Any) -> Any:
    """The moments, or a RunError that names the first entry that is not finite."""
    finite = _finite(moments._asdict())
    for name, array in moments._asdict().items():
        if not finite[name]:
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
            raise RunError(
                f"layer {layer}, {module}: {name} is not finite at {first}; the weights or activations overflow "
                "(try `dtype=float32`)"
            )
    return moments


def _finite(arrays: Mapping[str, Array]) -> dict[str, bool]:
    """Which arrays are finite. NumPy looks at those of a CPU where they lie, which leaves nothing to compile."""
    if all(array.devices() <= set(jax.devices("cpu")) and len(array.devices()) == 1 for array in arrays.values()):
        return {name: bool(np.isfinite(np.asarray(array)).all()) for name, array in arrays.items()}
    found = {name: _all_finite(array) for name, array in arrays.items()}
    return {name: bool(finite) for name, finite in jax.device_get(found).items()}


@jax.jit
def _all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def replace(
    arrays: Mapping[str, Array], module: str, new: Mapping[str, Array | np.ndarray], mesh: Mesh | None = None
) -> dict[str, Array]:
    """The block's arrays with one module's exchanged, in the dtypes they had; those of process 0 on all processes."""
    cast = {
        f"{module}.{name}": jax.device_put(np.asarray(array).astype(arrays[f"{module}.{name}"].dtype))
        for name, array in new.items()
    }
    return {**arrays, **(cast if mesh is None else put_weights(from_first(cast), mesh, RULES.in_use(), quiet=True))}


def batch_size(model: ModelConfig, shape: tuple[int, ...], config: PruneConfig, ways: int = 1, at_once: int = 1) -> int:
    """The largest divisor of the windows of each of `ways` device rows whose activations fit the memory budget.

    `at_once` batches are under way together and share the windows and the budget.
    """
    samples, seq = shape
    samples = max(1, samples // (ways * at_once))
    wanted = -(-config.batch_size // (ways * at_once))
    if not wanted:
        widest = max(model.layers, key=lambda layer: layer.intermediate_size)
        per_token = 8 * model.hidden_size + 4 * widest.intermediate_size
        scores = 2 * widest.num_attention_heads * max(128, seq // 8)
        wanted = config.memory_budget // (4 * seq * (per_token + scores) * at_once)
    return max(size for size in range(1, max(1, min(wanted, samples)) + 1) if samples % size == 0)
