"""The decoder: embedding, a plain list of blocks of any shapes, final norm, head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.attention import Attention
from intraslice_jax.models.initialise import normal, optional_zeros
from intraslice_jax.models.mlp import MLP
from intraslice_jax.models.norm import Norm
from intraslice_jax.models.rope import RopeTable, rope_table
from intraslice_jax.parallel.placement import embed_rows, gathered


class Block(nnx.Module):
    """One decoder layer. In a parallel block attention and MLP share one norm and there is no `post_norm`."""

    def __init__(self, config: ModelConfig, shape: LayerShape, dtype: jnp.dtype, rngs: nnx.Rngs):
        def norm() -> Norm:
            return Norm(config.norm, config.hidden_size, config.norm_eps, dtype)

        self.input_norm = norm()
        self.attention = Attention(config, shape, dtype, rngs)
        self.post_norm = None if config.parallel_block else norm()
        self.mlp = MLP(config, shape, dtype, rngs)

    def mlp_input(
        self, x: Float[Array, "batch seq hidden"] | None, after_attention: Float[Array, "batch seq hidden"]
    ) -> Float[Array, "batch seq hidden"]:
        """What the MLP reads, given the block's input (parallel blocks) and the stream behind its attention."""
        if self.post_norm is not None:
            return self.post_norm(after_attention)
        if x is None:
            raise TypeError("a parallel block's MLP reads the block's input")
        return self.input_norm(x)

    def __call__(self, x: Float[Array, "batch seq hidden"], rope: RopeTable) -> Float[Array, "batch seq hidden"]:
        after_attention = x + self.attention(self.input_norm(x), rope)
        return after_attention + self.mlp(self.mlp_input(x, after_attention))


@jax.jit
def run_block(block: Block, x: Float[Array, "batch seq hidden"], rope: RopeTable) -> Float[Array, "batch seq hidden"]:
    """One layer, compiled once per distinct layer shape."""
    return block(x, rope)


class Decoder(nnx.Module):
    """Token ids to hidden states and logits.

    `embed_tokens` [vocab, hidden]; `lm_head` has the same layout and is None when tied to the embedding.
    """

    def __init__(self, config: ModelConfig, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        rngs, dtype = rngs or nnx.Rngs(0), jnp.dtype(dtype)
        self.config = config
        self.embed_tokens = normal(rngs, (config.vocab_size, config.hidden_size), dtype)
        self.layers = nnx.List([Block(config, shape, dtype, rngs) for shape in config.layers])
        self.norm = Norm(config.norm, config.hidden_size, config.norm_eps, dtype)
        untied = not config.tie_word_embeddings
        self.lm_head = normal(rngs, (config.vocab_size, config.hidden_size), dtype) if untied else None
        self.lm_head_bias = optional_zeros(config.lm_head_bias, (config.vocab_size,), dtype)

    @property
    def head(self) -> Float[Array, "vocab hidden"]:
        """The output embedding."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head)[...]

    def embed(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        """The residual stream before the first layer."""
        return embed_rows(self.embed_tokens[...], tokens)

    def rope(self, positions: Int[Array, "rows seq"], seq_len: int | Int[Array, ""]) -> RopeTable:
        """The tables every layer picks its frequencies from."""
        config = self.config
        return rope_table(config.rope, config.rotary_dim, config.max_position_embeddings, positions, seq_len)

    def rope_for(self, seq: int) -> RopeTable:
        """The tables of positions 0 ... seq - 1."""
        return self.rope(jnp.arange(seq, dtype=jnp.int32)[None], seq)

    def hidden_states(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        """The residual stream behind the last layer, after the final norm."""
        x, rope = self.embed(tokens), self.rope_for(tokens.shape[1])
        for block in self.layers:
            x = run_block(gathered(block), x, rope)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq vocab"]:
        """Next-token logits in float32."""
        out = jnp.einsum("btd,vd->btv", hidden, self.head).astype(jnp.float32)
        bias = self.lm_head_bias
        return out if bias is None else out + bias[...].astype(jnp.float32)[None, None]

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        return self.logits(self.hidden_states(tokens))


def abstract_arrays(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Path, shape and dtype of every array of a model, without making one."""
    return _abstract_decoder(config, dtype)[1]


def decoder_from_arrays(config: ModelConfig, arrays: Mapping[str, Any]) -> Decoder:
    """A decoder filled from a flat mapping of dotted paths (`layers.0.attention.q_proj`) to arrays.

    Raises:
        InputError: a path is missing or left over, or an array has another shape.
    """
    return _fill(lambda dtype: _abstract_decoder(config, dtype), arrays, "embed_tokens")


def block_from_arrays(config: ModelConfig, shape: LayerShape, arrays: Mapping[str, Any]) -> Block:
    """One layer from a mapping of paths within it (`attention.q_proj`), checked like a whole decoder."""
    return _fill(lambda dtype: _with_dtype(_abstract_block(config, shape), dtype), arrays, "mlp.up_proj")


def decoder_to_arrays(module: nnx.Module) -> dict[str, Array]:
    """The inverse of `decoder_from_arrays`; works for a block as well."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(module)
    return {_dotted(path): leaf for path, leaf in leaves}


def _fill(abstract: Callable[[Any], Any], arrays: Mapping[str, Any], dtype_of: str) -> Any:
    treedef, expected = abstract(jnp.dtype(arrays[dtype_of].dtype if dtype_of in arrays else jnp.float32))
    missing, leftover = expected.keys() - arrays.keys(), arrays.keys() - expected.keys()
    if missing or leftover:
        raise InputError(f"weights do not fit the model: missing {_some(missing)}, left over {_some(leftover)}")
    filled = []
    for path, want in expected.items():
        if tuple(arrays[path].shape) != want.shape:
            raise InputError(f"{path} has shape {tuple(arrays[path].shape)}, expected {want.shape}")
        filled.append(jnp.asarray(arrays[path], want.dtype))
    return jax.tree.unflatten(treedef, filled)


def _abstract_decoder(config: ModelConfig, dtype: Any) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    return _with_dtype(_abstract_float32(config), dtype)


def _with_dtype(
    abstract: tuple[Any, dict[str, jax.ShapeDtypeStruct]], dtype: Any
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    treedef, leaves = abstract
    return treedef, {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype) if leaf.dtype == jnp.float32 else leaf
        for path, leaf in leaves.items()
    }


@functools.lru_cache(maxsize=4)
def _abstract_float32(config: ModelConfig) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """Remembered: tracing the constructor of a deep model takes seconds, and loading asks more than once."""
    return _abstract(lambda: Decoder(config, jnp.float32))


@functools.lru_cache(maxsize=64)
def _abstract_block(config: ModelConfig, shape: LayerShape) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    return _abstract(lambda: Block(config, shape, jnp.dtype(jnp.float32), nnx.Rngs(0)))


def _abstract(make: Callable[[], Any]) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(nnx.eval_shape(make))
    return treedef, {_dotted(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def _dotted(path: tuple[Any, ...]) -> str:
    names = (str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path)
    return ".".join(name for name in names if name not in ("value", "_pytree__nodes"))


def _some(names: Any, most: int = 4) -> str:
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "nothing"
