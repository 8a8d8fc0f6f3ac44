"""The compiler's own account of the steps that go through all layers: mask gradients, divergences, the refinement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from intraslice_jax.calibrate import gradients
from intraslice_jax.models import head
from intraslice_jax.models.attention_by_head import heads_together
from intraslice_jax.models.decoder import run_block
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.mesh import DATA, MODEL, ways
from intraslice_jax.parallel.rules import weight_shardings
from intraslice_jax.planning.memory import layer_arrays
from intraslice_jax.planning.programs import Program, Steps, analysed
from intraslice_jax.prune import refine


class WholeModelSteps(Steps):
    """The programs that such a step runs once per layer, and that of the head; see `Steps`."""

    def gradients(self, batch: int, matrices: bool) -> dict[str, Program]:
        """Of the mask gradients of one batch.

        Args:
            batch: sequences, over all devices.
            matrices: whether the masks of heads are matrices.
        """
        block, x = self._block(self._dense), self._stream(batch, self._seq)
        seen = self._stream(batch, self._seq - 1)
        with jax.default_matmul_precision("highest"), heads_together():
            forward = gradients._forward.lower(block, x, self._rope)
            backward = gradients._backward.lower(block, x, self._rope, x, matrices)
            loss = self._head(head._token_nll_forward, seen, self._array(seen.shape[:2], jnp.int32, DATA))
        return {
            "gradients: forward": analysed(forward.compile()),
            "gradients: loss": analysed(loss.compile()),
            "gradients: backward": analysed(backward.compile()),
        }

    def kl(self, batch: int, seq: int) -> dict[str, Program]:
        """Of one measurement of `--ratios kl` on windows that go through the layers all at once.

        Args:
            batch: windows; whole on every device where the mesh does not divide them.
            seq: tokens of each.
        """
        axes = (DATA,) if batch % ways(self._mesh) == 0 else ()
        hidden = self._config.hidden_size
        x = self._array((batch, seq, hidden), self._dtype, *axes)
        table: Any = self._array((1, seq, self._config.rotary_dim // 2), jnp.float32)
        with jax.default_matmul_precision("highest"), heads_together():
            block = run_block.lower(self._block(self._dense), x, RopeTable(table, table))
            loss = self._head(head._predictions, x, split=bool(axes))
        return {"kl: block": analysed(block.compile()), "kl: loss": analysed(loss.compile())}

    def refinement(self) -> dict[str, Program]:
        """Of one step of the refinement, with a window on every device row."""
        block, x = self._block(self._pruned), self._stream(ways(self._mesh), self._seq)
        arrays = layer_arrays(self._config.with_layers((self._pruned,)), 0, "float32")
        shapes = {name: tuple(array.shape) for name, array in arrays.items() if name.endswith("_proj")}
        placed = {} if self._mesh is None else weight_shardings(shapes, self._mesh, quiet=True)

        def at_rest(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
            where = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
            return jax.ShapeDtypeStruct(shape, dtype, sharding=placed[name] if name in placed and shape else where)

        weights = {name: at_rest(name, shape, jnp.float32) for name, shape in shapes.items()}
        sizes = {name: at_rest(name, (), jnp.float32) for name in shapes}
        settings = refine.RefineSettings()
        started = jax.eval_shape(refine._optimiser(settings, 1).init, weights)
        state = jax.tree_util.tree_map_with_path(
            lambda path, a: at_rest(str(getattr(path[-1], "key", "")), a.shape, a.dtype), started
        )
        with jax.default_matmul_precision("highest"), heads_together():
            backward = refine._backward.lower(block, x, self._rope, x)
            update = refine._update.lower(settings, 1, weights, state, sizes, weights)
            loss = self._head(head._token_kl_gradient, x, x)
        return {
            "refinement: loss": analysed(loss.compile()),
            "refinement: backward": analysed(backward.compile()),
            "refinement: update": analysed(update.compile()),
        }

    def _stream(self, batch: int, seq: int) -> Any:
        return self._array((batch, seq, self._config.hidden_size), self._dtype, DATA)

    def _head(self, function: Callable[..., Any], *arrays: Any, split: bool = True) -> jax.stages.Lowered:
        """A function of `intraslice_jax.models.head` on every device row's own sequences, or on all where not split."""
        config = self._config
        axis = () if self._mesh is None or config.vocab_size % self._mesh.shape[MODEL] else (MODEL,)
        weights = self._array((config.vocab_size, config.hidden_size), self._dtype, *axis)
        bias = self._array((config.vocab_size,), self._dtype, *axis) if config.lm_head_bias else None
        if self._mesh is None or not split:
            return jax.jit(function).lower(weights, bias, *arrays)
        return head._on_mesh.lower(function, self._mesh, weights, bias, *arrays)
