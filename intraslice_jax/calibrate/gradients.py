"""Gradients of the language-model loss with respect to masks of ones on module outputs (docs/method.md section 4).

A mask stands on every input of an o-projection and of a down-projection. Its gradient says, to first order, what
the loss would lose with that unit. One microbatch of sequences at a time runs forward, keeping the residual stream
at the layer boundaries, and then backward through one compiled function per distinct layer shape that computes the
layer's forward pass again. Weights are never differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.lanes import in_lanes, lanes
from intraslice_jax.calibrate.token_blocks import by_token_blocks
from intraslice_jax.config import ModelConfig
from intraslice_jax.errors import RunError
from intraslice_jax.evaluate.perplexity import first_bad_layer
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.attention_by_head import one_cpu
from intraslice_jax.models.decoder import Block, Decoder
from intraslice_jax.models.head import token_nll
from intraslice_jax.models.rope import RopeTable
from intraslice_jax.parallel.batches import even_batch
from intraslice_jax.parallel.mesh import ways
from intraslice_jax.parallel.placement import gathered, mesh_of, put_batch, to_host
from intraslice_jax.stages import stage

OnBatch = Callable[[int, int], None]
"""Told how many sequences are done, and of how many."""


@dataclass(frozen=True)
class GroupGradients:
    """Sums over the sequences of one group, one entry per layer; float32.

    Attributes:
        attention: gradients of the o-projection's input masks, [heads, v] each.
        mlp: gradients of the down-projection's input masks, [inner] each.
        matrices: y_h^T dL/dy_h of every head, [heads, v, v] each, whose diagonals are `attention`; empty
            unless asked for.
        head_gram: y_h^T y_h of every head, [heads, v, v] each.
        loss: mean token losses of the sequences in nats, summed.
        sequences: how many sequences the group has.
    """

    attention: tuple[np.ndarray, ...]
    mlp: tuple[np.ndarray, ...]
    matrices: tuple[np.ndarray, ...]
    head_gram: tuple[np.ndarray, ...]
    loss: float
    sequences: int


def group_gradients(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    *,
    group: int = 8,
    matrices: bool = False,
    batch_size: int = 0,
    memory_budget: int = 512 * 2**20,
    on_batch: OnBatch | None = None,
    start: int = 0,
) -> Iterator[GroupGradients]:
    """Mask gradients of the mean token loss of every sequence, summed over groups of consecutive sequences.

    Only one group is held at a time. The last one is smaller when the number of windows does not divide.

    Args:
        model: dense, or pruned before.
        windows: int32 tokens.
        group: sequences per group; 1 gives the gradients of single sequences.
        matrices: whether each head's mask is an identity matrix between y and the o-projection, instead of its
            diagonal alone.
        batch_size: sequences per step, 0 to choose it from the budget.
        memory_budget: bytes that a step's activations may take.
        on_batch: told before the first step and after each.
        start: how many sequences, a multiple of `group`, are left out at the beginning. All others get the same bits as
            without it.

    Raises:
        RunError: a loss or a gradient is not finite; the message names the layer.
    """
    mesh = mesh_of(model.decoder)
    size = batch_size or ways(mesh) * automatic_batch(model.config, windows.shape[1], matrices, memory_budget)
    pending: list[_Sequences] = []
    waiting = 0
    for batch in _sequences(model.decoder, windows, size, matrices, on_batch, start):
        while waiting + batch.sequences >= group:
            head, batch = batch.split(group - waiting)
            yield _sum([*pending, head])
            pending, waiting = [], 0
        if batch.sequences:
            pending.append(batch)
            waiting += batch.sequences
    if waiting:
        yield _sum(pending)


@stage("head moments")
def head_grams(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    *,
    batch_size: int = 0,
    memory_budget: int = 512 * 2**20,
    on_batch: OnBatch | None = None,
) -> tuple[Float[np.ndarray, "heads v v"], ...]:
    """Second moments y_h^T y_h of the unpruned model per layer and head, summed over all tokens; float64."""
    mesh = mesh_of(model.decoder)
    size = batch_size or ways(mesh) * automatic_batch(model.config, windows.shape[1], False, memory_budget)
    shapes = [(s.num_attention_heads, s.v_head_dim, s.v_head_dim) for s in model.config.layers]
    totals = [np.zeros(shape) for shape in shapes]
    rope = model.decoder.rope_for(windows.shape[1])
    with jax.default_matmul_precision("highest"):
        for tokens, real, done in _batches(windows, size, mesh):
            x = model.decoder.embed(tokens)
            for i, block in enumerate(model.decoder.layers):
                x, gram = _forward(gathered(block), x, rope)
                totals[i] += to_host(gram)[:real].sum(0, dtype=np.float64)
            if not all(np.isfinite(total).all() for total in totals):
                raise RunError(f"the heads' outputs are not finite: {first_bad_layer(model.decoder, tokens)}")
            if on_batch is not None:
                on_batch(done, len(windows))
    return tuple(totals)


@stage("token gradients")
def token_gradients(
    model: LanguageModel,
    windows: Int[np.ndarray, "samples seq"],
    *,
    batch_size: int = 0,
    memory_budget: int = 512 * 2**20,
    on_batch: OnBatch | None = None,
) -> Float[np.ndarray, "layers samples seq"]:
    """||dL/dx||^2 of every token, x being the residual stream behind each layer and L its window's mean token loss.

    Args:
        model: dense, or pruned before.
        windows: int32 tokens.
        batch_size: sequences per step, 0 to choose it from the budget.
        memory_budget: bytes that a step's activations may take.
        on_batch: told before the first step and after each.

    Returns:
        float32, the same on all processes.

    Raises:
        RunError: a loss or a gradient is not finite; the message names the layer.
    """
    decoder = model.decoder
    size = batch_size or ways(mesh_of(decoder)) * automatic_batch(model.config, windows.shape[1], False, memory_budget)
    rope, found = decoder.rope_for(windows.shape[1]), []
    if on_batch is not None:
        on_batch(0, len(windows))
    with jax.default_matmul_precision("highest"):
        for tokens, real, done in _batches(windows, size, mesh_of(decoder)):
            parts = _lane_parts(decoder, tokens)
            x, boundaries, _ = _forwards(decoder, parts, rope)
            losses, cotangents = _loss_gradients(decoder, x, parts)
            if not all(np.isfinite(to_host(loss)).all() for loss in losses):
                raise RunError(f"the loss is not finite: {first_bad_layer(decoder, tokens)}")
            found.append(_squared_norms(decoder, boundaries, rope, cotangents)[:, :real])
            if on_batch is not None:
                on_batch(done, len(windows))
    return np.concatenate(found, 1)


def _squared_norms(
    decoder: Decoder, boundaries: list[list[Array]], rope: RopeTable, cotangents: list[Array]
) -> Float[np.ndarray, "layers batch seq"]:
    """Of the gradients behind all layers, given the one behind the last. Uses up the boundaries and the cotangents."""
    norms = []
    for layer in reversed(decoder.layers):
        norms.append([_squared_norm(cotangent) for cotangent in cotangents])
        cotangents, _ = _layer_backward(decoder, gathered(layer), boundaries.pop(), rope, cotangents, False)
    found = np.stack([_joined(parts) for parts in reversed(norms)])
    for i in reversed(range(len(found))):  # the gradient passes the layers from the last to the first
        if not np.isfinite(found[i]).all():
            raise RunError(f"the loss gradient behind layer {i} is not finite (try `dtype=float32`)")
    return found


@jax.jit
def _squared_norm(cotangent: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq"]:
    return jnp.square(cotangent.astype(jnp.float32)).sum(-1)


class _Masks(NamedTuple):
    """Ones on the o-projection's input, or identity matrices, and ones on the down-projection's; float32."""

    attention: Float[Array, "batch heads v"] | Float[Array, "batch heads v v"]
    mlp: Float[Array, "batch inner"]


class _Sequences(NamedTuple):
    """What `GroupGradients` sums, with a leading axis of sequences."""

    attention: tuple[np.ndarray, ...]
    mlp: tuple[np.ndarray, ...]
    head_gram: tuple[np.ndarray, ...]
    loss: np.ndarray

    @property
    def sequences(self) -> int:
        return len(self.loss)

    def split(self, first: int) -> tuple[_Sequences, _Sequences]:
        """The first sequences, and the others."""
        return jax.tree.map(lambda a: a[:first], self), jax.tree.map(lambda a: a[first:], self)


def _sum(parts: list[_Sequences]) -> GroupGradients:
    def total(*arrays: np.ndarray) -> np.ndarray:
        return np.asarray(sum(a.sum(0, dtype=np.float64) for a in arrays), np.float32)

    attention, mlp, head_gram, loss = jax.tree.map(total, *parts)
    full = attention[0].ndim == 3
    diagonals = tuple(np.diagonal(m, axis1=1, axis2=2) for m in attention) if full else attention
    sequences = sum(part.sequences for part in parts)
    return GroupGradients(diagonals, mlp, attention if full else (), head_gram, float(loss), sequences)


def _batches(windows: np.ndarray, size: int, mesh: Mesh | None) -> Iterator[tuple[Array, int, int]]:
    """Tokens, how many of the rows are real, and how many are done after them.

    The last batch is filled up with copies of the last window, so that nothing compiles twice.
    """
    count = len(windows)
    size = even_batch(count, size, ways(mesh))
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        done = min(start + size, count)
        yield put_batch(windows[rows].astype(np.int32), mesh), done - start, done


def _sequences(
    decoder: Decoder, windows: np.ndarray, size: int, matrices: bool, on_batch: OnBatch | None, start: int
) -> Iterator[_Sequences]:
    rope = decoder.rope_for(windows.shape[1])
    if on_batch is not None:
        on_batch(start, len(windows))
    for tokens, real, done in _batches(windows, size, mesh_of(decoder)):
        if done <= start:
            continue
        # Not around the whole loop: a generator must not leave the setting on while its caller runs.
        with jax.default_matmul_precision("highest"):
            batch = _one_batch(decoder, tokens, rope, matrices)
        batch, _ = batch.split(real)
        _, batch = batch.split(max(0, start - (done - real)))
        _check_batch(batch, decoder, tokens)
        yield batch
        if on_batch is not None:
            on_batch(done, len(windows))


def _one_batch(decoder: Decoder, tokens: Array, rope: RopeTable, matrices: bool) -> _Sequences:
    parts = _lane_parts(decoder, tokens)
    x, boundaries, grams = stage("gradients: forward")(_forwards)(decoder, parts, rope)
    losses, cotangents = stage("gradients: loss")(_loss_gradients)(decoder, x, parts)
    masks = stage("gradients: backward")(_backwards)(decoder, boundaries, rope, cotangents, matrices)
    return _Sequences(
        tuple(_joined(part.attention for part in layer) for layer in masks),
        tuple(_joined(part.mlp for part in layer) for layer in masks),
        tuple(map(_joined, grams)),
        _joined(losses),
    )


def _joined(parts: Iterable[Array]) -> np.ndarray:
    """The sequences of all parts."""
    return np.concatenate([to_host(part) for part in parts])


def _lane_parts(decoder: Decoder, tokens: Array) -> list[Array]:
    """A batch of tokens in as many parts as there are lanes, if they divide it.

    A layer serves all parts before the next one: where layers are streamed, each is fetched once.
    """
    count = lanes(mesh_of(decoder))
    return jnp.split(tokens, count) if len(tokens) % count == 0 else [tokens]


def _forwards(
    decoder: Decoder, parts: list[Array], rope: RopeTable
) -> tuple[list[Array], list[list[Array]], list[list[Array]]]:
    """What leaves the last layer, and for every layer what enters it and its heads' second moments; of each part."""
    x, boundaries, grams = [decoder.embed(tokens) for tokens in parts], [], []
    for layer in decoder.layers:
        boundaries.append(x)
        behind = in_lanes(functools.partial(_forward, gathered(layer), rope=rope), x, mesh_of(decoder))
        x, gram = ([pair[i] for pair in behind] for i in range(2))
        grams.append(gram)
    return x, boundaries, grams


def _loss_gradients(decoder: Decoder, x: list[Array], parts: list[Array]) -> tuple[list[Array], list[Array]]:
    """Mean token losses of each part's sequences, and the gradients with respect to the last layer's output."""
    pairs = list(zip(x, parts, strict=True))
    found = in_lanes(lambda pair: _loss_gradient(decoder, *pair), pairs, mesh_of(decoder))
    return [loss for loss, _ in found], [gradient for _, gradient in found]


def _backwards(
    decoder: Decoder, boundaries: list[list[Array]], rope: RopeTable, cotangents: list[Array], matrices: bool
) -> list[list[_Masks]]:
    """Mask gradients of every layer, of each part. Uses up the boundaries and the cotangents."""
    found = []
    for layer in reversed(decoder.layers):
        cotangents, masks = _layer_backward(decoder, gathered(layer), boundaries.pop(), rope, cotangents, matrices)
        found.append(masks)
    return found[::-1]


def _layer_backward(
    decoder: Decoder, block: Block, x: list[Array], rope: RopeTable, cotangents: list[Array], matrices: bool
) -> tuple[list[Array], list[_Masks]]:
    """`_backward` of each part; `cotangents` are used up."""
    pairs = list(zip(x, cotangents, strict=True))
    found = in_lanes(lambda pair: _backward(block, pair[0], rope, pair[1], matrices), pairs, mesh_of(decoder))
    return [cotangent for cotangent, _ in found], [masks for _, masks in found]


@jax.jit
def _forward(
    block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable
) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch heads v v"]]:
    """A layer, and y_h^T y_h of its heads per sequence."""
    y = block.attention.mix(block.input_norm(x), rope)
    wide = y.astype(jnp.float32).swapaxes(1, 2)
    gram = jnp.einsum("bhtv,bhtw->bhvw", wide, wide, precision=jax.lax.Precision.HIGHEST)
    after_attention = x + block.attention.output(y)
    return after_attention + by_token_blocks(block.mlp, block.mlp_input(x, after_attention)), gram


def _loss_gradient(decoder: Decoder, x: Array, tokens: Array) -> tuple[Array, Array]:
    """Mean token loss of each sequence, and the gradient of their sum with respect to the last layer's output."""

    def loss(x: Array) -> tuple[Array, Array]:
        per_sequence = token_nll(decoder, decoder.norm(x)[:, :-1], tokens[:, 1:]).mean(1)
        return per_sequence.sum(), per_sequence

    gradient, per_sequence = jax.grad(loss, has_aux=True)(x)
    return per_sequence, gradient


@functools.partial(jax.jit, static_argnames="matrices", donate_argnames="cotangent")
def _backward(
    block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable, cotangent: Array, matrices: bool
) -> tuple[Array, _Masks]:
    """Gradients with respect to a layer's input and to its masks, given the one with respect to its output."""
    heads, v, _ = block.attention.o_proj[...].shape
    inner = block.mlp.down_proj[...].shape[0]
    batch = x.shape[0]
    ones = jnp.ones((batch, heads, v), jnp.float32)
    if matrices:
        ones = ones[..., None] * jnp.eye(v, dtype=jnp.float32)[None, None]
    masks = _Masks(ones, jnp.ones((batch, inner), jnp.float32))
    _, pullback = jax.vjp(functools.partial(_masked, block, rope), x, masks)
    return pullback(cotangent)


def _masked(block: Block, rope: RopeTable, x: Array, masks: _Masks) -> Array:
    y = block.attention.mix(block.input_norm(x), rope)
    wide = y.astype(jnp.float32)
    if masks.attention.ndim == 4:
        wide = jnp.einsum("bthv,bhvw->bthw", wide, masks.attention)
    else:
        wide = wide * masks.attention[:, None]
    after_attention = x + block.attention.output(wide.astype(y.dtype))

    def masked_mlp(read: Array, mask: Array) -> Array:
        z = block.mlp.inner(read)
        return block.mlp.output((z.astype(jnp.float32) * mask[:, None]).astype(z.dtype))

    # Small blocks: a gradient has more to keep in the cache.
    read = block.mlp_input(x, after_attention)
    return after_attention + by_token_blocks(masked_mlp, read, masks.mlp, most=256)


def automatic_batch(config: ModelConfig, seq: int, matrices: bool, memory_budget: int) -> int:
    """How many sequences of a step fit the budget, at least 1."""
    widest = max(layer.intermediate_size for layer in config.layers)
    heads = max(layer.num_attention_heads for layer in config.layers)
    width = max(layer.num_attention_heads * layer.v_head_dim for layer in config.layers)
    # Boundaries, one layer's activations with their gradients, and the scores that its backward pass keeps: none on a
    # CPU, which computes them again.
    stream = seq * config.hidden_size * (config.num_layers + 8)
    activations = 8 * seq * (width + widest) + (0 if one_cpu() else 2 * heads * seq * seq)
    squares = sum(layer.num_attention_heads * layer.v_head_dim**2 for layer in config.layers)
    return max(1, memory_budget // (4 * (stream + activations + squares * (1 + matrices))))


def _check_batch(batch: _Sequences, decoder: Decoder, tokens: Array) -> None:
    if not all(np.isfinite(a).all() for a in (*batch.head_gram, batch.loss)):
        raise RunError(f"the loss is not finite: {first_bad_layer(decoder, tokens)}")
    # The gradient passes the layers from the last to the first.
    for i in reversed(range(len(batch.mlp))):
        for module, gradient in (("MLP", batch.mlp[i]), ("attention", batch.attention[i])):
            if not np.isfinite(gradient).all():
                raise RunError(f"layer {i}, {module}: the gradient of its mask is not finite (try `dtype=float32`)")
