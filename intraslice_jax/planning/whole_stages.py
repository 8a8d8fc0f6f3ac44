"""Floating-point operations of what goes through all layers: mask gradients, divergences, the refinement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.config import ModelConfig
from intraslice_jax.planning.memory import MeshSizes
from intraslice_jax.prune.divergence import judging_shapes
from intraslice_jax.prune.estimators import FromGradients, find_estimator
from intraslice_jax.prune.sensitivity import KLSensitivity, measured_ratios

if TYPE_CHECKING:
    from intraslice_jax.planning.plan import Run


@dataclass(frozen=True)
class Work:
    """What a stage takes on a device.

    Attributes:
        flops: of its own.
        passes: how often the windows go through the loop.
        reruns: how often through its attention with the kept heads.
        solves: how often every module is solved for.
    """

    flops: float
    passes: float = 0.0
    reruns: float = 0.0
    solves: int = 0

    def of(self, loop: Mapping[str, float], rate: float = 1.0) -> float:
        """All FLOPs given those of the loop by stage; or seconds given its seconds and FLOPs per second."""
        once = sum(amount for name, amount in loop.items() if name not in ("solves", "kept attention"))
        again = self.reruns * loop["kept attention"] + self.solves * loop["solves"]
        return self.flops / rate + self.passes * once + again


def whole_model_work(config: ModelConfig, pruned: ModelConfig, run: Run, mesh: MeshSizes) -> dict[str, Work]:
    """By stage, those that the run has; divided by the devices.

    Args:
        config: the dense model.
        pruned: what becomes of it.
        run: the options.
        mesh: the devices.
    """
    found, samples, seq = {}, run.samples, run.sequence_length
    estimator = find_estimator(run.ratios)
    if isinstance(estimator, FromGradients):
        found["gradients"] = Work(gradient_flops(config, samples, seq, estimator.matrices) / mesh.devices)
    if isinstance(estimator, KLSensitivity):
        held = held_out_count(samples)
        share = (samples - held) / samples if samples > held else 1.0
        flops, points = 0.0, len(measured_ratios(run.sparsity))
        for windows, read in judging_shapes(samples, seq):
            # Windows that the mesh does not divide go through every row of devices.
            devices = mesh.model if windows % mesh.data else mesh.devices
            flops += divergence_flops(config, windows, read, points) / devices
        found["kl"] = Work(flops, share, share * points, points)
    if run.refine and samples > (held := held_out_count(samples)):
        flops = refinement_flops(config, pruned, samples, held, seq, run.refine)
        found["refinement"] = Work(flops / mesh.devices)
    return found


def forward_flops(config: ModelConfig, seq: int) -> float:
    """Of all layers, for one window of `seq` tokens."""
    chunk = min(seq, max(128, -(-seq // 8)))  # of queries, which take the keys that any of them sees
    seen = (seq + chunk) / 2
    pairs = sum(s.num_attention_heads * (s.qk_head_dim + s.v_head_dim) for s in config.layers)
    return 2 * seq * (config.block_parameters() + pairs * seen)


def head_flops(config: ModelConfig, tokens: int) -> int:
    """Of one product with the head."""
    return 2 * tokens * config.vocab_size * config.hidden_size


def gradient_flops(config: ModelConfig, samples: int, seq: int, matrices: bool) -> float:
    """Of the mask gradients of all windows, over all devices.

    A pass, its repetition and the backward pass, which costs as much as one: weights have no gradients. Masks that are
    matrices take one more pass, for the heads' bases.
    """
    layers = (4 if matrices else 3) * forward_flops(config, seq)
    return samples * (layers + 2 * head_flops(config, seq))


def divergence_flops(config: ModelConfig, windows: int, seq: int, points: int) -> float:
    """Of all measurements on some windows, over all devices.

    Args:
        config: the dense model.
        windows: how many.
        seq: tokens of each.
        points: ratios at which each of the two modules of a layer is pruned.
    """
    layers, measured = config.num_layers, 2 * config.num_layers * points
    # A measurement runs the layer and those after it: (layers + 1) / 2 on average. The dense model's own predictions
    # take all layers and two products with the head, the windows on their way from layer to layer all but one.
    passes = measured * (layers + 1) / (2 * layers) + 1 + (layers - 1) / layers
    return passes * windows * forward_flops(config, seq) + (measured + 2) * head_flops(config, windows * seq)


def refinement_flops(
    dense: ModelConfig, pruned: ModelConfig, samples: int, held_out: int, seq: int, passes: int
) -> float:
    """Of the refinement, over all devices.

    Args:
        dense: the model.
        pruned: what became of it.
        samples: windows.
        held_out: how many of them judge the result, before and after.
        seq: tokens of a window.
        passes: over the others.
    """
    small, head = forward_flops(pruned, seq), head_flops(dense, seq)
    # Forward, again, and backward to inputs and weights; the head for both models, and its gradient.
    step = 4 * small + 3 * head
    # Predictions take two products with the head, the divergence one.
    judgement = small + 3 * head
    return samples * forward_flops(dense, seq) + passes * (samples - held_out) * step + 2 * held_out * judgement
