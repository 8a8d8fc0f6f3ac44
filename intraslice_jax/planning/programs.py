"""The compiler's own account of the steps that a run repeats, on abstract arrays: nothing is allocated."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.statistics import AttentionMoments, DriftMoments, GramMoments, MapMoments
from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import RunError
from intraslice_jax.models.attention_by_head import heads_together
from intraslice_jax.models.decoder import Block, abstract_arrays
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.mesh import DATA, ways
from intraslice_jax.parallel.moments import add_on_mesh, moment_sharding
from intraslice_jax.parallel.rules import RULES, weight_shardings
from intraslice_jax.prune import attention as attention_solve
from intraslice_jax.prune import mlp as mlp_solve
from intraslice_jax.prune.drift import Drift

_ITEM = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}


@dataclass(frozen=True)
class Program:
    """What one compiled step costs each device.

    Attributes:
        argument_bytes: what it is given.
        new_bytes: results that take no argument's place.
        temporary_bytes: what it holds beside them while it runs.
        flops: floating-point operations.
        collective_bytes: what collectives leave on a device.
    """

    argument_bytes: int
    new_bytes: int
    temporary_bytes: int
    flops: float
    collective_bytes: int


class Steps:
    """The programs of one layer on a mesh, or without one.

    Args:
        config: the dense model.
        dense: the layer's shape.
        pruned: its shape afterwards.
        mesh: with the axes `data` and `model`, or None.
        seq: tokens of a sequence.
        dtype: of weights and activations.
    """

    def __init__(
        self, config: ModelConfig, dense: LayerShape, pruned: LayerShape, mesh: Mesh | None, seq: int, dtype: str
    ) -> None:
        self._config, self._dense, self._pruned, self._mesh = config, dense, pruned, mesh
        self._seq, self._dtype = seq, jnp.dtype(dtype)
        table: Any = self._array((1, seq, config.rotary_dim // 2), jnp.float32)
        self._rope = RopeTable(table, table)

    def passes(self, per_row: int, selected: bool) -> dict[str, Program]:
        """Of the passes over the text, by stage.

        Args:
            per_row: sequences per step and device row.
            selected: whether the MLP's inner activations were kept for the last of them.
        """
        dense, pruned, rows = self._dense, self._pruned, ways(self._mesh)
        heads, v, inner = dense.num_attention_heads, dense.v_head_dim, dense.intermediate_size
        kept, maps = pruned.num_attention_heads, (dense.qk_head_dim, pruned.qk_head_dim)
        x = self._array((per_row * rows, self._seq, self._config.hidden_size), self._dtype, DATA)
        with jax.default_matmul_precision("highest"), heads_together():
            block = self._block(dense)
            mix = statistics.mix.lower(block, x, self._rope).compile()
            mixed = self._like(jax.eval_shape(statistics.mix, block, x, self._rope), mix.output_shardings)
            first = self._add(
                statistics.add_attention, _attention_moments(dense), 0, (mixed,), False,
                query_to_kv=dense.query_to_kv, rotary_dim=dense.rotary_dim, joint_pairs=False,
            )  # fmt: skip
            wide = kept * v, heads * v
            again = self._add(
                statistics.add_kept_attention,
                _map_moments(*wide),
                0,
                (
                    mixed,
                    self._array((kept,), jnp.int32),
                    self._array((kept,), jnp.int32),
                    self._array((kept, *maps), jnp.float32),
                    self._array((kept, *maps), jnp.float32),
                ),
                True,
                scale=float(self._config.head_dim) ** -0.5,
                sliding_window=dense.sliding_window,
            )
            half = self._block(dataclasses.replace(pruned, intermediate_size=inner))
            moments = GramMoments((inner, inner), (inner,))  # pyright: ignore[reportArgumentType]
            mlp = self._add(statistics.attend_and_add_mlp, moments, 1, (half, x, self._rope), True)
            small = self._block(pruned)
            if selected:
                z = self._array((*x.shape[:2], inner), self._dtype, DATA)
                channels = self._array((pruned.intermediate_size,), jnp.int32)
                output = statistics.finish_selected.lower(small.mlp, x, z, channels)
            else:
                source = x if self._config.parallel_block else None
                output = statistics.finish_layer.lower(small, x, source)
        return {
            "attention": analysed(mix),
            "head moments": analysed(first.compile()),
            "kept attention": analysed(again.compile()),
            "MLP": analysed(mlp.compile()),
            "output": analysed(output.compile()),
        }

    def solves(self, dense_targets: bool = False) -> dict[str, Program]:
        """Of the solves in float64 on one device, with corrections towards the dense model or without."""
        dense, pruned, hidden = self._dense, self._pruned, self._config.hidden_size
        heads, kept, v = dense.num_attention_heads, pruned.num_attention_heads, dense.v_head_dim
        kv, qk, to_kv = pruned.num_key_value_heads, dense.qk_head_dim, np.asarray(pruned.query_to_kv)
        inner, left = dense.intermediate_size, pruned.intermediate_size
        with jax.enable_x64(True):

            def wide(*shape: int) -> Any:
                return jax.ShapeDtypeStruct(shape, jnp.float64)

            def drift(inputs: int, plain: MapMoments | GramMoments) -> Drift | None:
                if not dense_targets:
                    return None
                sums = DriftMoments(wide(inputs, hidden), wide(hidden), wide(1))
                return Drift(sums, sums, plain)

            moments = MapMoments(*(wide(*shape) for shape in _map_moments(kept * v, heads * v)))
            projections = {
                "q_proj": wide(hidden, kept, qk),
                "k_proj": wide(hidden, kv, qk),
                "v_proj": wide(hidden, kv, v),
            }
            fuse = attention_solve._fuse.lower(
                projections, {"o_proj": wide(heads, v, hidden)}, moments, wide(kept, qk, pruned.qk_head_dim),
                wide(kv, qk, pruned.qk_head_dim), to_kv, wide(), wide(), pruned.v_head_dim, "activations",
                drift(kept * v, moments), wide(),
            ).compile()  # fmt: skip
            index, dropped = (jax.ShapeDtypeStruct((count,), jnp.int64) for count in (left, inner - left))
            gram = GramMoments(wide(inner, inner), wide(inner))
            fold = mlp_solve._fold.lower(
                *gram, wide(inner, hidden), None, index, dropped, wide(), wide(), drift(inner, gram), wide()
            ).compile()
        return {"attention solve": analysed(fuse), "MLP solve": analysed(fold)}

    def _array(self, shape: tuple[int, ...], dtype: Any, *axes: str) -> Any:
        sharding = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def _like(self, tree: Any, shardings: Any) -> Any:
        if self._mesh is None:
            return tree
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)

    def _block(self, shape: LayerShape) -> Any:
        block = nnx.eval_shape(lambda: Block(self._config, shape, self._dtype, nnx.Rngs(0)))
        if self._mesh is None:
            return block
        every = abstract_arrays(self._config.with_layers((shape,)), self._dtype)
        leaves = {path: leaf for path, leaf in every.items() if path.startswith("layers.0.")}
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        placed = weight_shardings(shapes, self._mesh, RULES.in_use(), quiet=True)
        return jax.tree.unflatten(
            jax.tree.structure(block),
            [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed[path]) for path, a in leaves.items()],
        )

    def _add(
        self, step: Callable[..., Any], shapes: Any, split: int, args: tuple[Any, ...], passes: bool, **statics: Any
    ) -> jax.stages.Lowered:
        mesh = self._mesh
        if mesh is None:
            moments = type(shapes)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
            return step.lower(moments, *args, **statics)  # pyright: ignore[reportFunctionMemberAccess]
        stacked = [(ways(mesh), *shape) for shape in shapes]
        moments = type(shapes)(
            *(jax.ShapeDtypeStruct(s, jnp.float32, sharding=moment_sharding(s, mesh)) for s in stacked)
        )
        return add_on_mesh.lower(step, mesh, split, tuple(sorted(statics.items())), passes, moments, None, args)


def _attention_moments(shape: LayerShape) -> Any:
    return AttentionMoments(*(a.shape for a in jax.eval_shape(lambda: statistics.empty_attention_moments(shape))))


def _map_moments(inputs: int, targets: int) -> Any:
    return MapMoments(*(a.shape for a in jax.eval_shape(lambda: statistics.empty_map_moments(inputs, targets))))


def analysed(compiled: jax.stages.Compiled) -> Program:
    """What the compiler says of a program.

    Raises:
        RunError: it says nothing.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is None:
        raise RunError("the compiler says nothing about the memory of its programs; run it with JAX_PLATFORMS=cpu")
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = float((cost or {}).get("flops", 0.0))
    traffic = collective_bytes(compiled.as_text() or "")
    return Program(memory.argument_size_in_bytes, new, memory.temp_size_in_bytes, flops, traffic)


def collective_bytes(text: str) -> int:
    """Bytes that the collectives of a compiled program's text leave on a device."""
    total = 0
    for shapes in re.findall(r"= (\S.*?) (?:all-[a-z]+|reduce-scatter|collective-permute)\(", text):
        for dtype, dims in re.findall(rf"({'|'.join(_ITEM)})\[([\d,]*)\]", shapes):
            total += _ITEM[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
    return total
