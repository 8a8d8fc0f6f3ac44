"""Causal grouped-query attention whose groups may be ragged and whose heads may be narrow."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.models.attention_by_head import attend_by_head, attend_mapped_by_head, one_cpu
from intraslice_jax.models.initialise import normal, optional_zeros
from intraslice_jax.models.rope import RopeTable, rotate


class RopePairs(nnx.Variable):
    """Indices into the model's frequency table: data of a layer, not a trainable weight."""


class Attention(nnx.Module):
    """Projections [hidden, heads, width] around causal attention.

    `rope_pairs` [KV heads, rotary_dim / 2] says which of the original head's frequencies each KV head kept.
    """

    def __init__(self, config: ModelConfig, shape: LayerShape, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.query_to_kv = shape.query_to_kv
        self.scale = config.head_dim**-0.5
        self.sliding_window = shape.sliding_window
        hidden, n_q, n_kv = config.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
        qk, v = shape.qk_head_dim, shape.v_head_dim
        self.q_proj = normal(rngs, (hidden, n_q, qk), dtype)
        self.k_proj = normal(rngs, (hidden, n_kv, qk), dtype)
        self.v_proj = normal(rngs, (hidden, n_kv, v), dtype)
        self.o_proj = normal(rngs, (n_q, v, hidden), dtype)
        self.q_bias = optional_zeros(config.attention_bias, (n_q, qk), dtype)
        self.k_bias = optional_zeros(config.attention_bias, (n_kv, qk), dtype)
        self.v_bias = optional_zeros(config.attention_bias, (n_kv, v), dtype)
        self.o_bias = optional_zeros(config.attention_output_bias, (hidden,), dtype)
        pairs = jnp.arange(shape.rotary_dim // 2, dtype=jnp.int32)
        self.rope_pairs = RopePairs(jnp.tile(pairs, (n_kv, 1)))

    def project(
        self, x: Float[Array, "batch seq hidden"], rope: RopeTable
    ) -> tuple[Float[Array, "batch seq heads qk"], Float[Array, "batch seq kv qk"], Float[Array, "batch seq kv v"]]:
        """Queries and keys after RoPE, and values."""
        pairs = self.rope_pairs[...]
        cos, sin = rope.cos[:, :, pairs], rope.sin[:, :, pairs]
        to_kv = jnp.asarray(self.query_to_kv)
        q = rotate(_project(x, self.q_proj, self.q_bias), cos[:, :, to_kv], sin[:, :, to_kv])
        k = rotate(_project(x, self.k_proj, self.k_bias), cos, sin)
        return q, k, _project(x, self.v_proj, self.v_bias)

    def output(self, y: Float[Array, "batch seq heads v"]) -> Float[Array, "batch seq hidden"]:
        """The o-projection."""
        out = jnp.einsum("bthv,hvd->btd", y, self.o_proj[...])
        return out if self.o_bias is None else out + self.o_bias[...][None, None]

    def mix(self, x: Float[Array, "batch seq hidden"], rope: RopeTable) -> Float[Array, "batch seq heads v"]:
        """The input of the o-projection: y in docs/method.md (paper section 3.2)."""
        return self.mix_projected(*self.project(x, rope))

    def mix_projected(
        self,
        q: Float[Array, "batch seq heads qk"],
        k: Float[Array, "batch seq kv qk"],
        v: Float[Array, "batch seq kv v"],
    ) -> Float[Array, "batch seq heads v"]:
        """`mix` for queries, keys and values at hand."""
        return attend_causally(q, k, v, self.query_to_kv, self.scale, self.sliding_window)

    def __call__(self, x: Float[Array, "batch seq hidden"], rope: RopeTable) -> Float[Array, "batch seq hidden"]:
        return self.output(self.mix(x, rope))


def _project(x: Array, kernel: nnx.Param, bias: nnx.Param | None) -> Array:
    y = jnp.einsum("btd,dhk->bthk", x, kernel[...])
    return y if bias is None else y + bias[...][None, None]


def attend_causally(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq kv qk"],
    v: Float[Array, "batch seq kv v"],
    query_to_kv: tuple[int, ...],
    scale: float,
    sliding_window: int | None = None,
) -> Float[Array, "batch seq heads v"]:
    """Softmax attention of every position to itself and the earlier ones.

    Queries are taken in chunks and every chunk multiplies only the keys it may see, which saves close to half
    of the arithmetic and bounds the score matrix.
    """
    seq = q.shape[1]
    if one_cpu():
        return attend_by_head(q, k, v, query_to_kv, scale, sliding_window, _chunk_on_cpu(seq))
    if fused_kernel(q, v):
        return attend_fused(q, k, v, query_to_kv, scale, sliding_window, "cudnn")
    chunk, outputs = max(128, -(-seq // 8)), []
    for start in range(0, seq, chunk):
        stop = min(start + chunk, seq)
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        outputs.append(attend(q[:, start:stop], k[:, first:stop], v[:, first:stop], visible[None], query_to_kv, scale))
    return jnp.concatenate(outputs, 1)


def attend_mapped(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq kv qk"],
    v: Float[Array, "batch seq kv v"],
    heads: Int[Array, " kept"],
    kv: Int[Array, " kept"],
    query_maps: Float[Array, "kept qk width"],
    key_maps: Float[Array, "kept qk width"],
    scale: float,
    sliding_window: int | None,
) -> Float[Array, "batch seq kept v"]:
    """`attend_causally` with some query heads and the KV heads they read, queries and keys through a map each."""
    query_maps, key_maps = query_maps.astype(q.dtype), key_maps.astype(k.dtype)
    if one_cpu():
        chunk = _chunk_on_cpu(q.shape[1])
        return attend_mapped_by_head(q, k, v, heads, kv, query_maps, key_maps, scale, sliding_window, chunk)
    kept_q = jnp.einsum("bthk,hkw->bthw", q[:, :, heads], query_maps)
    kept_k = jnp.einsum("bthk,hkw->bthw", k[:, :, kv], key_maps)
    return attend_causally(kept_q, kept_k, v[:, :, kv], tuple(range(len(heads))), scale, sliding_window)


def _chunk_on_cpu(seq: int) -> int:
    """Queries whose scores stay in the cache."""
    return max(256, -(-seq // 8))


def fused_kernel(q: Array, v: Array) -> bool:
    """Whether cuDNN's FlashAttention can do it: half precision, heads that are not too wide, an even length."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and max(q.shape[3], v.shape[3]) <= 128 and q.shape[1] % 2 == 0 and has_fused_kernel()


@functools.cache
def has_fused_kernel() -> bool:
    """Whether all there is to compute with is one GPU on which cuDNN's attention compiles."""
    if jax.default_backend() != "gpu" or jax.device_count() > 1:
        return False
    some = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    try:
        jax.jit(lambda q, k, v: attend_fused(q, k, v, (0, 1), 1.0, 64, "cudnn")).lower(some, some, some).compile()
    except Exception:  # an old GPU or no cuDNN: whatever it is, the products below do the same
        return False
    return True


def attend_fused(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq kv qk"],
    v: Float[Array, "batch seq kv v"],
    query_to_kv: tuple[int, ...],
    scale: float,
    sliding_window: int | None,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "batch seq heads v"]:
    """`attend_causally` by a kernel for groups of one size and heads of one width, a multiple of 8.

    Heads are filled up with zeros to such a width; where groups are ragged, every query head gets its own copy of its
    key and value head.
    """
    heads, kv, width = q.shape[2], k.shape[2], v.shape[3]
    if any(query_to_kv.count(j) * kv != heads for j in range(kv)):
        to_kv = jnp.asarray(query_to_kv)
        k, v = k[:, :, to_kv], v[:, :, to_kv]
    common = -(-max(q.shape[3], width) // 8) * 8
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, common - a.shape[3]))) for a in (q, k, v))
    window = None if sliding_window is None else (sliding_window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=window, implementation=implementation
    )
    return out[..., :width]


def attend(
    q: Float[Array, "batch queries heads qk"],
    k: Float[Array, "batch keys kv qk"],
    v: Float[Array, "batch keys kv v"],
    visible: Bool[Array, "rows queries keys"],
    query_to_kv: tuple[int, ...],
    scale: float,
) -> Float[Array, "batch queries heads v"]:
    """Attention under an explicit mask, softmax in float32."""
    batch, queries, _, qk = q.shape
    sizes = [query_to_kv.count(j) for j in range(k.shape[2])]
    spread = None
    if len(set(sizes)) > 1 and queries > 1:
        # Ragged groups: every query head gets its own copy of its key and value head.
        to_kv = jnp.asarray(query_to_kv)
        k, v = k[:, :, to_kv], v[:, :, to_kv]
    elif len(set(sizes)) > 1:
        # One query per row: copying the keys would cost more than the arithmetic, so groups are filled up to the
        # largest one with queries whose results are dropped.
        most = max(sizes)
        spread = jnp.asarray([j * most + i for j, size in enumerate(sizes) for i in range(size)])
        q = jnp.zeros((batch, queries, len(sizes) * most, qk), q.dtype).at[:, :, spread].set(q)
    kv, heads = k.shape[2], q.shape[2]
    grouped = q.reshape(batch, queries, kv, heads // kv, qk)
    scores = jnp.einsum("btngk,bsnk->bngts", grouped, k).astype(jnp.float32) * scale
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    out = jnp.einsum("bngts,bsnv->btngv", weights, v).reshape(batch, queries, heads, v.shape[-1])
    return out if spread is None else out[:, :, spread]
