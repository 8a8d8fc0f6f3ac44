"""SliceGPT: the residual stream is rotated onto its principal components and cut, a matrix in every shortcut."""

from __future__ import annotations

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from intraslice_jax.config import ModelConfig, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, Decoder, decoder_to_arrays
from intraslice_jax.models.norm import Norm
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.prune.calibration import ResidualStream
from intraslice_jax.prune.linalg import eigh_descending, solver_precision, to_solver


class Bases(NamedTuple):
    """Orthonormal columns [hidden, width] that span what is kept of the stream at a layer's three boundaries."""

    before: Float[Array, "hidden width"]
    middle: Float[Array, "hidden width"]
    behind: Float[Array, "hidden out"]


class SlicedBlock(Block):
    """A layer between rotated streams. Its modules are ordinary ones; its two shortcuts are not the identity.

    Args:
        block: the layer of the original model.
        bases: of the stream before, inside and behind the layer.
    """

    def __init__(self, block: Block, bases: Bases):
        if block.post_norm is None:
            raise TypeError("a parallel block has no boundary between attention and MLP")
        before, middle, behind = bases
        dtype = block.mlp.up_proj[...].dtype
        self.input_norm, self.post_norm = _cut_norm(block.input_norm, before), _cut_norm(block.post_norm, middle)
        into_attention = before * _column(block.input_norm.weight)
        into_mlp = middle * _column(block.post_norm.weight)
        # The pytree is rebuilt, so that the original's modules stay as they are.
        self.attention, self.mlp = jax.tree.map(lambda leaf: leaf, (block.attention, block.mlp))
        for name in ("q_proj", "k_proj", "v_proj"):
            kernel = getattr(block.attention, name)
            setattr(self.attention, name, _param("dw,dhk->whk", into_attention, kernel[...], dtype))
        self.attention.o_proj = _param("hvd,dw->hvw", block.attention.o_proj[...], middle, dtype)
        self.attention.o_bias = _rotate_bias(block.attention.o_bias, middle)
        if block.mlp.gate_proj is not None:
            self.mlp.gate_proj = _param("dw,di->wi", into_mlp, block.mlp.gate_proj[...], dtype)
        self.mlp.up_proj = _param("dw,di->wi", into_mlp, block.mlp.up_proj[...], dtype)
        self.mlp.down_proj = _param("id,dw->iw", block.mlp.down_proj[...], behind, dtype)
        self.mlp.down_bias = _rotate_bias(block.mlp.down_bias, behind)
        self.attention_shortcut = _param("dv,dw->vw", before, middle, dtype)
        self.mlp_shortcut = _param("dv,dw->vw", middle, behind, dtype)

    def __call__(self, x: Float[Array, "batch seq width"], rope: RopeTable) -> Float[Array, "batch seq out"]:
        attended = self.attention(self.input_norm(x), rope)
        after = jnp.einsum("btv,vw->btw", x, self.attention_shortcut[...]) + attended
        output = self.mlp.output(self.mlp.inner(self.mlp_input(None, after)))
        return jnp.einsum("btv,vw->btw", after, self.mlp_shortcut[...]) + output


class SlicedDecoder(Decoder):
    """A decoder whose embedding and layers live in the cut streams; final norm and head are the original's.

    As in the authors' program the stream behind the last layer is not cut, and a tied head becomes a matrix of
    its own, because the embedding is rotated and the head is not.
    """

    def __init__(self, dense: Decoder, embedding: Float[Array, "hidden width"], layers: list[SlicedBlock]):
        self.config = dataclasses.replace(dense.config, tie_word_embeddings=False)
        self.embed_tokens = _param("vd,dw->vw", dense.embed_tokens[...], embedding, dense.embed_tokens[...].dtype)
        self.layers = nnx.List(layers)
        self.norm = dense.norm
        self.lm_head = nnx.Param(dense.head)
        self.lm_head_bias = dense.lm_head_bias

    def hidden_states(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        """The residual stream behind the last layer, after the final norm."""
        x, rope = self.embed(tokens), self.rope_for(tokens.shape[1])
        for block in self.layers:
            x = _run(block, x, rope)
        return self.norm(x)


@jax.jit
def _run(block: SlicedBlock, x: Array, rope: RopeTable) -> Array:
    return block(x, rope)


def prune_slicegpt(model: LanguageModel, windows: Int[np.ndarray, "samples seq"], config: PruneConfig) -> LanguageModel:
    """SliceGPT (Ashkboos et al., ICLR 2024) at the width whose block parameters, shortcuts included, match.

    The scale of every RMSNorm is folded into the matrices behind it; the stream is rotated by the eigenvectors of
    its second moment before each norm and only the first `width` directions stay; between two rotations the
    shortcut carries a [width, width] matrix. Every boundary is calibrated on the already cut stream before it.
    `config.ratios` and `config.align` have no meaning here: one width serves the whole model.

    Returns:
        A model for `perplexity`, with a report. It is of another class than all others here: it cannot be saved
        or exported.

    Raises:
        InputError: the family has LayerNorm or parallel blocks.
        RunError: an activation is not finite.
    """
    width = width_for(model.config, config.target_sparsity)
    return slice_model(model, windows, width, config.batch_size or 1)


def slice_model(
    model: LanguageModel, windows: Int[np.ndarray, "samples seq"], width: int, batch_size: int = 1
) -> LanguageModel:
    """`prune_slicegpt` for a given width of the residual stream, from 1 to the hidden size (which cuts nothing)."""
    started = time.monotonic()
    check_family(model.config)
    if not 1 <= width <= model.config.hidden_size:
        raise InputError(f"SliceGPT's width must be from 1 to {model.config.hidden_size}, found {width}")
    with jax.default_matmul_precision("highest"):
        stream = ResidualStream.start(model, windows, batch_size)
        first = before = _basis(stream.batches, width, "the embedding")
        layers = []
        for i, block in enumerate(model.decoder.layers):
            inside = [_attend(block, x, stream.rope, before) for x in stream.batches]
            middle = _basis(inside, width, f"layer {i}, attention")
            stream.batches = [_feed_forward(block, x, middle) for x in inside]
            if i + 1 < model.config.num_layers:
                behind = _basis(stream.batches, width, f"layer {i}, MLP")
            else:
                behind = jnp.eye(model.config.hidden_size, dtype=before.dtype)
            layers.append(SlicedBlock(block, Bases(before, middle, behind)))
            before = behind
        decoder = SlicedDecoder(model.decoder, first, layers)
    blocks, total = count_parameters(decoder)
    dense_blocks, dense_total = model.config.block_parameters(), model.config.total_parameters()
    report = {
        "method": "slicegpt",
        "width": width,
        "removed_block_fraction": 1 - blocks / dense_blocks,
        "removed_model_fraction": 1 - total / dense_total,
        "block_parameters": {"dense": dense_blocks, "pruned": blocks},
        "total_parameters": {"dense": dense_total, "pruned": total},
        "calibration_samples": windows.shape[0],
        "calibration_sequence_length": windows.shape[1],
        "prune_seconds": time.monotonic() - started,
    }
    return dataclasses.replace(model, config=decoder.config, decoder=decoder, report=report)


def check_family(config: ModelConfig) -> None:
    """Raises InputError where the residual stream cannot be rotated."""
    if config.norm != "rms" or config.parallel_block:
        found = "parallel blocks" if config.parallel_block else "LayerNorm"
        raise InputError(
            f"slicegpt needs a family with RMSNorm and attention and MLP one after the other; "
            f"{config.model_type} has {found}; leave the method out"
        )


def block_parameters(config: ModelConfig, width: int) -> int:
    """Parameters of the sliced layers: attention, MLP and shortcuts, as `count_parameters` finds them."""
    last = config.layers[-1]
    cut = dataclasses.replace(config, hidden_size=width)
    wider = config.hidden_size - width
    # Only the last layer's outputs keep the full width: of its down-projection, its bias and its shortcut.
    outputs = (last.intermediate_size + config.mlp_bias + width) * wider
    return cut.block_parameters() + 2 * config.num_layers * width**2 + outputs


def width_for(config: ModelConfig, sparsity: float) -> int:
    """The width whose removed fraction of the block parameters is nearest to `sparsity`."""
    target = (1 - sparsity) * config.block_parameters()
    widths = range(1, config.hidden_size + 1)
    return min(widths, key=lambda width: abs(block_parameters(config, width) - target))


def count_parameters(decoder: SlicedDecoder) -> tuple[int, int]:
    """Parameters of the layers without their norms, and of the whole model, counted on its arrays."""
    sizes = {name: array.size for name, array in decoder_to_arrays(decoder).items() if "rope_pairs" not in name}
    blocks = sum(size for name, size in sizes.items() if name.startswith("layers.") and "norm" not in name)
    return blocks, sum(sizes.values())


@jax.jit
def _attend(
    block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable, basis: Float[Array, "hidden width"]
) -> Float[Array, "batch seq hidden"]:
    """The stream behind the attention, in the original coordinates, when it was cut before."""
    x = _cut(x, basis)
    return x + block.attention(block.input_norm(x), rope)


@jax.jit
def _feed_forward(
    block: Block, x: Float[Array, "batch seq hidden"], basis: Float[Array, "hidden width"]
) -> Float[Array, "batch seq hidden"]:
    """The stream behind the MLP, likewise."""
    x = _cut(x, basis)
    return x + block.mlp(block.mlp_input(None, x))


def _cut(x: Array, basis: Array) -> Array:
    basis = basis.astype(x.dtype)
    return jnp.einsum("btw,dw->btd", jnp.einsum("btd,dw->btw", x, basis), basis)


def _basis(batches: list[Array], width: int, place: str) -> Float[Array, "hidden width"]:
    """The first principal directions of a stream, not centred, float32."""
    gram = sum(_gram(x) for x in batches)
    if not bool(jnp.isfinite(jnp.asarray(gram)).all()):
        raise RunError(f"slicegpt: the residual stream behind {place} is not finite (try `dtype=float32`)")
    with solver_precision():
        vectors = eigh_descending(to_solver(jnp.asarray(gram))[None])[1][0, :, :width]
        return vectors.astype(jnp.float32)


@jax.jit
def _gram(x: Float[Array, "batch seq hidden"]) -> Float[Array, "hidden hidden"]:
    x = x.astype(jnp.float32)
    return jnp.einsum("btd,bte->de", x, x, precision=jax.lax.Precision.HIGHEST)


def _cut_norm(norm: Norm, basis: Float[Array, "hidden width"]) -> Norm:
    """RMSNorm over the cut stream that divides by the original width, its scale being folded elsewhere."""
    hidden, width = basis.shape
    cut = Norm("rms", width, norm.eps * hidden / width, norm.weight[...].dtype)
    cut.weight = nnx.Param(cut.weight[...] * (hidden / width) ** 0.5)
    return cut


def _param(spec: str, left: Array, right: Array, dtype: jnp.dtype) -> nnx.Param:
    """A product in float32, stored in the model's dtype."""
    product = jnp.einsum(spec, left.astype(jnp.float32), right.astype(jnp.float32), precision="highest")
    return nnx.Param(product.astype(dtype))


def _rotate_bias(bias: nnx.Param | None, basis: Array) -> nnx.Param | None:
    return None if bias is None else _param("d,dw->w", bias[...], basis, bias[...].dtype)


def _column(weight: nnx.Param) -> Float[Array, "hidden 1"]:
    return weight[...].astype(jnp.float32)[:, None]
