"""The compiler's own account of the steps that a run repeats, on abstract arrays: nothing is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import RunError
from intraslice_jax.models.decoder import Block, abstract_arrays
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.mesh import DATA, ways
from intraslice_jax.parallel.moments import add_on_mesh, moment_sharding
from intraslice_jax.parallel.rules import RULES, weight_shardings

_ITEM = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


@dataclass(frozen=True)
class Program:
    """What one compiled step costs each device."""

    scratch_bytes: int
    """Temporaries, and results that take no argument's place."""
    flops: float
    collective_bytes: int
    """What collectives leave on a device."""


def layer_programs(
    config: ModelConfig, shape: LayerShape, mesh: Mesh, per_row: int, seq: int, dtype: str
) -> dict[str, Program]:
    """The attention's pass and the MLP's step of one layer shape, compiled for a mesh.

    Args:
        config: the model.
        shape: of the layer.
        mesh: with the axes `data` and `model`.
        per_row: sequences per step and device row.
        seq: tokens of each.
        dtype: of weights and activations.
    """
    kind, inner, rows = jnp.dtype(dtype), shape.intermediate_size, ways(mesh)
    block = nnx.eval_shape(lambda: Block(config, shape, kind, nnx.Rngs(0)))
    every = abstract_arrays(config.with_layers((shape,)), kind)
    leaves = {path: leaf for path, leaf in every.items() if path.startswith("layers.0.")}
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    placed = weight_shardings(shapes, mesh, RULES.in_use(), quiet=True)
    block = jax.tree.unflatten(
        jax.tree.structure(block),
        [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed[path]) for path, a in leaves.items()],
    )
    split, whole = NamedSharding(mesh, PartitionSpec(DATA)), NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((per_row * rows, seq, config.hidden_size), kind, sharding=split)
    table: Any = jax.ShapeDtypeStruct((1, seq, config.rotary_dim // 2), jnp.float32, sharding=whole)
    rope = RopeTable(table, table)

    def zeros(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *dims), jnp.float32, sharding=moment_sharding((rows, *dims), mesh))

    moments = GramMoments(zeros(inner, inner), zeros(inner))  # pyright: ignore[reportArgumentType]
    with jax.default_matmul_precision("highest"):
        attention = statistics.mix.lower(block, x, rope)
        mlp = add_on_mesh.lower(statistics.attend_and_add_mlp, mesh, 1, (), True, moments, None, (block, x, rope))
        return {"attention pass": _analysed(attention.compile()), "MLP step": _analysed(mlp.compile())}


def _analysed(compiled: jax.stages.Compiled) -> Program:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is None:
        raise RunError("the compiler says nothing about the memory of its programs; run it with JAX_PLATFORMS=cpu")
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = compiled.as_text() or ""
    return Program(memory.temp_size_in_bytes + new, float((cost or {}).get("flops", 0.0)), collective_bytes(text))


def collective_bytes(text: str) -> int:
    """Bytes that the collectives of a compiled program's text leave on a device."""
    total = 0
    for shapes in re.findall(r"= (\S.*?) (?:all-[a-z]+|reduce-scatter|collective-permute)\(", text):
        for dtype, dims in re.findall(rf"({'|'.join(_ITEM)})\[([\d,]*)\]", shapes):
            total += _ITEM[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
    return total
