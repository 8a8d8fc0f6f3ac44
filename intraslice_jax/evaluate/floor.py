"""How near a pruning run comes to the arithmetic that it cannot do without.

The floor of a stage is its matrix products divided by the rate at which this machine multiplies matrices, sampled
between the layers of the same run. Softmax, norms, activations and the float64 solves count as nothing in it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from intraslice_jax.calibrate.lanes import lanes
from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate import arithmetic as flops
from intraslice_jax.evaluate.timing import MatmulRate
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import mesh_of
from intraslice_jax.prune.calibration import batch_size
from intraslice_jax.prune.pipeline import LayerRecord, prune_model
from intraslice_jax.stages import OUTSIDE, measured_stages

LOOP = ("attention moments", "attention solves", "attention re-run", "MLP moments", "MLP solves", "outputs")
GRADIENTS = ("gradients: forward", "gradients: loss", "gradients: backward")


@dataclass(frozen=True)
class StageCost:
    """One stage of a run.

    Attributes:
        stage: its name.
        flops: matrix products that it must do; 0 for what could be done without any.
        floor: seconds for them at the machine's rate.
        seconds: measured, without compilation.
        compiling: seconds of tracing and compiling.
    """

    stage: str
    flops: int
    floor: float
    seconds: float
    compiling: float

    @property
    def ratio(self) -> float | None:
        """Measured by floor."""
        return self.seconds / self.floor if self.floor else None


@dataclass(frozen=True)
class PruningCost:
    """All stages of a run, their sums, and the rate (floating-point operations per second) of the floor."""

    stages: list[StageCost]
    groups: list[StageCost]
    rate: float
    rates: list[float]
    compilations: int


def first_layers(model: LanguageModel, count: int) -> LanguageModel:
    """The model without its later layers.

    Raises:
        InputError: it has fewer.
    """
    if not 1 <= count <= model.config.num_layers:
        raise InputError(f"`layers` must be between 1 and {model.config.num_layers}, found {count}")
    config = model.config.with_layers(model.config.layers[:count])
    arrays = {
        path: array
        for path, array in decoder_to_arrays(model.decoder).items()
        if not path.startswith("layers.") or int(path.split(".")[1]) < count
    }
    return dataclasses.replace(model, config=config, decoder=decoder_from_arrays(config, arrays))


def measure_pruning(
    model: LanguageModel, windows: Int[np.ndarray, "samples seq"], config: PruneConfig
) -> tuple[PruningCost, LanguageModel]:
    """Prunes a model with a clock on every stage.

    Raises:
        InputError, RunError: as `prune_model`.
    """
    samples, seq = windows.shape
    mesh = mesh_of(model.decoder)
    devices, at_once = ways(mesh), lanes(mesh)
    rows = devices * at_once * batch_size(model.config, windows.shape, config, devices, at_once)
    inner = max(shape.intermediate_size for shape in model.config.layers)
    rate = MatmulRate(rows * seq, model.config.hidden_size, inner)
    rate.sample()

    def on_layer(_: LayerRecord) -> None:
        with times.running("rate"):
            rate.sample()

    def on_stage(stage: str, _: int, __: int) -> None:
        if stage != "layers":
            with times.running("rate"):
                rate.sample()

    # What happens once, such as the import of LAPACK, is no stage's.
    with measured_stages() as warming:
        prune_model(first_layers(model, 1), windows[:rows], config)
    with measured_stages() as times:
        pruned = prune_model(model, windows, config, on_layer, on_stage)
    rate.sample()
    needed = loop_flops(model.config, pruned.config, samples, seq)
    if any(name in times.wall for name in GRADIENTS):
        needed |= gradient_flops(model.config, samples, seq)
    stages = []
    for name, wall in times.wall.items():
        if name != "rate":
            compiling, count = times.compiling(name), needed.get(name, 0)
            once = warming.compiling(name)
            stages.append(StageCost(name, count, count / rate.median, wall - compiling, compiling + once))
    stages.sort(key=lambda cost: _ORDER.index(cost.stage) if cost.stage in _ORDER else len(_ORDER))
    groups = [
        _sum(name, parts)
        for name, members in (("gradient stage", GRADIENTS), ("pruning loop", (*LOOP, OUTSIDE)))
        if (parts := [cost for cost in stages if cost.stage in members])
    ]
    return PruningCost(stages, groups, rate.median, rate.samples, warming.compilations + times.compilations), pruned


_ORDER = (*GRADIENTS, *LOOP, OUTSIDE)


def _sum(name: str, parts: list[StageCost]) -> StageCost:
    fields = ("flops", "floor", "seconds", "compiling")
    totals: dict[str, Any] = {field: sum(getattr(part, field) for part in parts) for field in fields}
    return StageCost(name, **totals)


def loop_flops(dense: ModelConfig, pruned: ModelConfig, samples: int, seq: int) -> dict[str, int]:
    """By stage of the loop over layers: what docs/method.md sections 2 and 3 cannot do without."""
    total: dict[str, int] = dict.fromkeys(LOOP, 0)
    tokens = samples * seq
    for before, after in zip(dense.layers, pruned.layers, strict=True):
        total["attention moments"] += (
            flops.query_key_value(dense, before, tokens)
            + flops.scores_and_mixing(before, samples, seq)
            + before.num_attention_heads * flops.gram(before.v_head_dim, tokens)
        )
        kept = _unrotated(before, after)
        inputs, targets = (s.num_attention_heads * s.v_head_dim for s in (kept, before))
        total["attention re-run"] += (
            flops.scores_and_mixing(kept, samples, seq)
            + flops.gram(inputs, tokens)
            + flops.gram(targets, tokens)
            + 2 * tokens * inputs * targets
        )
        total["MLP moments"] += flops.mlp_inner(dense, before, tokens) + flops.gram(before.intermediate_size, tokens)
        total["outputs"] += flops.attention_output(dense, after, tokens) + flops.mlp_output(dense, after, tokens)
    return total


def _unrotated(before: LayerShape, after: LayerShape) -> LayerShape:
    """The attention as it is run again: heads and pairs are cut, values have all their channels."""
    return dataclasses.replace(after, v_head_dim=before.v_head_dim)


def gradient_flops(model: ModelConfig, samples: int, seq: int) -> dict[str, int]:
    """By stage of the mask gradients: forward; the head once forward and once back; and backward with each layer's
    activations computed again, without gradients of weights.
    """
    tokens = samples * seq
    linear = sum(flops.linear_layer(model, shape, tokens) for shape in model.layers)
    attended = sum(flops.scores_and_mixing(shape, samples, seq) for shape in model.layers)
    down = sum(flops.mlp_output(model, shape, tokens) for shape in model.layers)
    grams = sum(shape.num_attention_heads * flops.gram(shape.v_head_dim, tokens) for shape in model.layers)
    return {
        "gradients: forward": linear + attended + grams,
        "gradients: loss": 2 * flops.head(model, tokens),
        # The last product of a layer is not needed again; the gradient of a product of two activations is two products.
        "gradients: backward": (linear - down + attended) + (linear + 2 * attended),
    }
