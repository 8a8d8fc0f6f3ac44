"""Bytes that a pruning run holds on each device, by part; arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.parallel.rules import LOGICAL_AXES, RULES, AxisRules, partition

Residency = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class MeshSizes:
    """A mesh that need not exist."""

    data: int
    model: int

    @property
    def devices(self) -> int:
        """How many it has."""
        return self.data * self.model

    def sizes(self) -> dict[str, int]:
        """By axis."""
        return {"data": self.data, "model": self.model}


def shard_bytes(arrays: Mapping[str, Any], mesh: MeshSizes, rules: AxisRules = RULES) -> int:
    """Bytes on one device of abstract arrays by dotted path."""
    total = 0
    for path, array in arrays.items():
        spec, _ = partition(LOGICAL_AXES[path.rpartition(".")[2]], tuple(array.shape), mesh.sizes(), rules)
        parts = math.prod(mesh.sizes()[axis] for axis in spec if axis is not None)
        total += math.prod(array.shape) * array.dtype.itemsize // parts
    return total


def map_moment_bytes(inputs: int, mesh: MeshSizes) -> int:
    """Moments of a regression of `inputs` channels on as many: three matrices and two vectors in float32."""
    ways = 1 if inputs % mesh.model else mesh.model
    return 4 * (3 * inputs**2 + 2 * inputs) // ways


def gram_moment_bytes(channels: int, mesh: MeshSizes) -> int:
    """Second moments and sums of an MLP's inner channels in float32."""
    ways = 1 if channels % mesh.model else mesh.model
    return 4 * (channels**2 + channels) // ways


def stream_bytes(config: ModelConfig, samples: int, seq: int, itemsize: int, mesh: MeshSizes) -> int:
    """The residual stream of the calibration set."""
    return math.ceil(samples / mesh.data) * seq * config.hidden_size * itemsize


def widest(config: ModelConfig) -> LayerShape:
    """The layer whose moments are the largest."""
    return max(config.layers, key=lambda shape: shape.intermediate_size)


def parts(
    config: ModelConfig,
    arrays: Mapping[str, Any],
    mesh: MeshSizes,
    samples: int,
    seq: int,
    residency: Residency,
    step: int,
    budget: int,
) -> dict[str, int]:
    """Bytes per device: the weights at rest, the layer at work, and what its MLP or attention needs at most.

    Args:
        config: the dense model.
        arrays: its abstract arrays by dotted path.
        mesh: the devices.
        samples: calibration windows.
        seq: their tokens.
        residency: where the weights wait.
        step: temporary bytes of the largest compiled step.
        budget: the run's `memory_budget`: the most that kept activations may take.
    """
    layer = {name: array for name, array in arrays.items() if name.startswith("layers.0.")}
    rest = {name: array for name, array in arrays.items() if not name.startswith("layers.")}
    shape, itemsize = widest(config), arrays["embed_tokens"].dtype.itemsize
    inputs, inner = shape.num_attention_heads * shape.v_head_dim, shape.intermediate_size
    at_work = shard_bytes(layer, mesh, RULES.in_use())
    tokens = math.ceil(samples / mesh.data) * seq
    # The sums of a device row and, after the reduction, the whole of them.
    moments = max(
        map_moment_bytes(inputs, mesh) + map_moment_bytes(inputs, MeshSizes(1, 1)) * (mesh.devices > 1),
        gram_moment_bytes(inner, mesh) + gram_moment_bytes(inner, MeshSizes(1, 1)) * (mesh.devices > 1),
    )
    kept = tokens * inner * itemsize
    return {
        "parameters": shard_bytes(arrays if residency == "device" else rest, mesh),
        "layer in use": at_work if residency == "device" else at_work + shard_bytes(layer, mesh),
        "residual stream": 2 * stream_bytes(config, samples, seq, itemsize, mesh),
        "moments": moments,
        "kept activations": kept if kept <= budget else 0,
        "step temporaries": step,
    }
