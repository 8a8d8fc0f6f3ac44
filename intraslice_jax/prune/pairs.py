"""RoPE pairs by their joint effect on the attention logits, and kept pairs that make up for dropped ones.

A logit is a sum over pairs p of x_p = q_p . k_p. With the query turned by 90 degrees x_p becomes y_p, and scaling and
turning a query pair in its plane, which commutes with RoPE and so folds into W_q, makes a x_p + b y_p of it. Over all
pairs of positions the second moments of the x and y follow from those of queries and keys alone, and pairs leave one by
one with the least error of the logits that the a and b of the others cannot make up for (docs/method.md 6.4).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from intraslice_jax.programs import by_shape
from intraslice_jax.prune.linalg import Number, each, inverse_gram


class KeptPairs(NamedTuple):
    """Pairs that stay, and what each query head scales and turns them by.

    Attributes:
        pairs: ascending, of each KV head.
        scale: a of each query head and pair.
        turn: b of each query head and pair.
    """

    pairs: Int[Array, "kv kept"]
    scale: Float[Array, "heads kept"]
    turn: Float[Array, "heads kept"]


def contribution_gram(
    query_gram: Float[Array, "heads rotary rotary"], key_gram: Float[Array, "heads rotary rotary"]
) -> Float[Array, "heads rotary rotary"]:
    """Second moments of x (first half) and y (second half) over all pairs of positions.

    Args:
        query_gram: second moment of each query head after RoPE, channels p and p + rotary / 2 being a pair.
        key_gram: likewise of the key head it reads. A softmax does not see what is the same for all keys, so it is
            to be taken about the mean.
    """
    heads, rotary, _ = query_gram.shape
    q = query_gram.reshape(heads, 2, rotary // 2, 2, rotary // 2)
    k = key_gram.reshape(q.shape)
    sign = jnp.asarray([1.0, -1.0], q.dtype)  # y = q_0 k_1 - q_1 k_0
    xx = jnp.einsum("hapbr,hapbr->hpr", q, k)
    xy = jnp.einsum("b,hapbr,hapbr->hpr", sign, q, k[:, :, :, ::-1])
    yy = jnp.einsum("a,b,hapbr,hapbr->hpr", sign, sign, q, k[:, ::-1, :, ::-1])
    return jnp.block([[xx, xy], [xy.swapaxes(1, 2), yy]])


def _inverse_2x2(blocks: Float[Array, "heads pairs 2 2"]) -> Float[Array, "heads pairs 2 2"]:
    """Of symmetric positive definite blocks."""
    (a, b), (_, d) = (tuple(jnp.moveaxis(row, -1, 0)) for row in jnp.moveaxis(blocks, -2, 0))
    adjugate = jnp.stack([jnp.stack([d, -b], -1), jnp.stack([-b, a], -1)], -2)
    return adjugate / (a * d - b * b)[..., None, None]


@by_shape
@functools.partial(jax.jit, static_argnames=("kv_heads", "kept"))
def eliminate_pairs(
    gram: Float[Array, "heads rotary rotary"],
    to_kv: Int[Array, " heads"],
    kv_heads: int,
    kept: int,
    damping: Number,
) -> KeptPairs:
    """Removes pairs from each KV head, always the one that its query heads' other pairs replace best.

    Backward elimination as in optimal brain surgery: each step is exact for the damped moments.

    Args:
        gram: from `contribution_gram`, of each query head.
        to_kv: the KV head it reads.
        kv_heads: how many there are.
        kept: pairs that stay in each.
        damping: relative, towards scale 1 and turn 0.
    """
    heads, rotary, _ = gram.shape
    every = rotary // 2
    inverse = each(lambda one: inverse_gram(one, damping), gram).reshape(heads, 2, every, 2, every)
    weights = jnp.stack([jnp.ones((heads, every), gram.dtype), jnp.zeros((heads, every), gram.dtype)], 1)
    head, pair = jnp.arange(heads), jnp.arange(every)

    def step(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        inverse, weights, stays = state
        blocks = inverse[:, :, pair, :, pair].transpose(1, 0, 2, 3)
        blocks = jnp.where(stays[to_kv][..., None, None], blocks, jnp.eye(2, dtype=gram.dtype)[None, None])
        own = weights.transpose(0, 2, 1)
        inverted = _inverse_2x2(blocks)
        costs = jnp.einsum("hpa,hpab,hpb->hp", own, inverted, own)
        costs = jax.ops.segment_sum(costs, to_kv, kv_heads)
        worst = jnp.argmin(jnp.where(stays, costs, jnp.inf), 1)
        gone = worst[to_kv]
        columns = inverse[head, :, :, :, gone]  # [heads, 2, pairs, 2]
        factor = jnp.einsum("hapc,hcd->hapd", columns, inverted[head, gone])
        weights = weights - jnp.einsum("hapc,hc->hap", factor, own[head, gone])
        inverse = inverse - jnp.einsum("hapc,hbrc->hapbr", factor, columns)
        return inverse, weights, stays.at[jnp.arange(kv_heads), worst].set(False)

    start = inverse, weights, jnp.ones((kv_heads, every), bool)
    _, weights, stays = jax.lax.fori_loop(0, every - kept, step, start)
    pairs = jnp.argsort(~stays, axis=1, stable=True)[:, :kept]
    scale, turn = (jnp.take_along_axis(weights[:, i], pairs[to_kv], 1) for i in (0, 1))
    return KeptPairs(pairs.astype(jnp.int32), scale, turn)
