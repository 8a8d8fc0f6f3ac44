"""Bytes that a pruning run holds on each device, by part; arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from intraslice_jax.config import ModelConfig
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.parallel.rules import LOGICAL_AXES, RULES, AxisRules, partition
from intraslice_jax.planning.programs import Program

Residency = Literal["device", "host", "disk"]
RESIDENCIES: tuple[Residency, ...] = ("device", "host", "disk")


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


def widest(config: ModelConfig) -> int:
    """The layer whose moments are the largest."""
    return max(range(config.num_layers), key=lambda i: config.layers[i].intermediate_size)


@dataclass(frozen=True)
class Setting:
    """What the bytes depend on.

    Attributes:
        dense: the model.
        pruned: what becomes of it.
        dtype: of weights and activations.
        mesh: the devices.
        samples: calibration windows.
        seq: their tokens.
        steps: batches.
        budget: the run's `memory_budget`: the most that kept activations may take.
        solves: whether the devices solve, and not their host.
        one_device: whether one of them is enough for the MLP's solve.
        dense_targets: whether the dense model's stream is carried along, to correct modules towards it.
    """

    dense: ModelConfig
    pruned: ModelConfig
    dtype: str
    mesh: MeshSizes
    samples: int
    seq: int
    steps: int
    budget: int
    solves: bool
    one_device: bool
    dense_targets: bool = False

    @property
    def stream(self) -> int:
        """Bytes of the residual stream on a device."""
        itemsize = jnp.dtype(self.dtype).itemsize
        return stream_bytes(self.dense, self.samples, self.seq, itemsize, self.mesh)

    def layer(self, config: ModelConfig, rules: AxisRules = RULES) -> int:
        """Bytes of the widest layer on a device."""
        return shard_bytes(layer_arrays(config, widest(self.dense), self.dtype), self.mesh, rules)


def layer_arrays(config: ModelConfig, index: int, dtype: str) -> dict[str, Any]:
    """The abstract arrays of one layer."""
    return {
        name: array
        for name, array in abstract_arrays(config.with_layers((config.layers[index],)), dtype).items()
        if name.startswith("layers.0.")
    }


def standing(setting: Setting, residency: Residency) -> dict[str, int]:
    """What the last layer finds on a device: weights at rest, pruned layers, itself, the stream before and behind."""
    dense, pruned, mesh = setting.dense, setting.pruned, setting.mesh
    rest = shard_bytes(abstract_arrays(dense.with_layers(()), setting.dtype), mesh)
    layer, small = setting.layer(dense), setting.layer(pruned)
    # Without a mesh a layer is used where it lies; on one, its parts along `data` are gathered.
    in_use = setting.layer(dense, RULES.in_use()) + setting.layer(pruned, RULES.in_use()) if mesh.devices > 1 else 0
    held = residency == "device"
    return {
        "weights at rest": rest + (dense.num_layers if held else 2) * layer,
        "pruned layers": (pruned.num_layers if held else 1) * small,
        "layer in use": in_use,
        "residual stream": 2 * setting.stream,
        **({"dense stream": setting.stream} if setting.dense_targets else {}),
    }


def phases(setting: Setting, programs: Mapping[str, Program], residency: Residency) -> dict[str, dict[str, int]]:
    """Bytes on the first device by phase of the last layer, and by part; the run's peak is the largest sum.

    Args:
        setting: of the run.
        programs: of `intraslice_jax.planning.programs.Steps`.
        residency: where the weights wait.
    """
    mesh, index = setting.mesh, widest(setting.dense)
    shape, small = setting.dense.layers[index], setting.pruned.layers[index]
    hidden, itemsize = setting.dense.hidden_size, jnp.dtype(setting.dtype).itemsize
    many = mesh.devices > 1
    base = standing(setting, residency)
    mixed = _kept(setting, programs["attention"].new_bytes)
    # The MLP's step returns the stream behind the attention as well, which is counted as such.
    inner = _kept(setting, programs["MLP"].new_bytes - setting.stream // setting.steps)
    heads = 4 * shape.num_attention_heads * (2 * shape.v_head_dim**2 + shape.rotary_dim**2)
    inputs, targets = small.num_attention_heads * shape.v_head_dim, shape.num_attention_heads * shape.v_head_dim
    maps = 4 * (inputs**2 + inputs * targets + targets**2)
    gram = 4 * shape.intermediate_size**2
    # On a mesh the first device also gets whole weights of the module at hand, for the solve.
    local = itemsize * hidden * many
    local_attention, local_mlp = local * 2 * targets, local * 3 * shape.intermediate_size
    temporary = {name: program.temporary_bytes for name, program in programs.items()}
    if setting.dense_targets:  # sums over the windows held out and over the others, also those against the drift
        maps, gram = 2 * (maps + 4 * inputs * hidden), 2 * (gram + 4 * shape.intermediate_size * hidden)
    moments = {"head moments": heads, "kept attention": maps, "MLP": gram}
    sums = {name: size if not many else size // mesh.model + size for name, size in moments.items()}
    if not setting.one_device:
        sums["MLP"] = gram // mesh.model + gram // mesh.devices
    whole = gram if setting.one_device else gram // mesh.devices
    return {
        "head moments": base
        | {
            "kept activations": mixed,
            "moments": sums["head moments"],
            "step temporaries": max(temporary["attention"], temporary["head moments"]),
        },
        "kept attention": base
        | {
            "kept activations": mixed,
            "moments": heads + sums["kept attention"],
            "module's weights": local_attention,
            "step temporaries": max(temporary["attention"], temporary["kept attention"]),
        },
        "attention solve": base
        | {
            "kept activations": mixed,
            "moments": heads + maps,
            "module's weights": local_attention,
            "solve": _solve(programs["attention solve"]) if setting.solves else 0,
        },
        "MLP": base | {"kept activations": inner, "moments": sums["MLP"], "step temporaries": temporary["MLP"]},
        "MLP solve": base
        | {
            "kept activations": inner,
            "moments": whole,
            "module's weights": local_mlp,
            "solve": mlp_solve_bytes(setting, programs),
        },
        "output": base | {"kept activations": inner, "moments": whole, "step temporaries": temporary["output"]},
    }


def mlp_solve_bytes(setting: Setting, programs: Mapping[str, Program]) -> int:
    """What the MLP's solve takes on the first device: nothing where the host does it."""
    if not setting.one_device:
        # Gram matrix, system, factor and their paddings in rows; right-hand sides whole.
        inner = setting.dense.layers[widest(setting.dense)].intermediate_size
        return 4 * (5 * inner**2 // setting.mesh.devices + 5 * inner * setting.dense.hidden_size)
    return _solve(programs["MLP solve"]) if setting.solves else 0


def _solve(program: Program) -> int:
    return program.argument_bytes + program.temporary_bytes + program.new_bytes


def _kept(setting: Setting, per_batch: int) -> int:
    """All batches where they fit the budget (`calibration.fits`), else one and the next."""
    size = per_batch * setting.mesh.model  # the budget is of a device row
    every = setting.steps * size <= setting.budget
    return (setting.steps if every else min(2, setting.steps)) * per_batch
