"""Choosing the next token."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from intraslice_jax.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: logits over the temperature, then the `top_k` likeliest, then the nucleus `top_p`.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: keep so many tokens, 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach this sum.
        seed: of the random draws; row and step are mixed in.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or more, found {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (all tokens) or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, found {self.top_p}")

    def choose(self, logits: Float[Array, "batch vocab"], step: int) -> Int[Array, " batch"]:
        """One int32 token per row."""
        if self.temperature == 0:
            return _greedy(logits)
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        top_k = min(self.top_k or logits.shape[1], logits.shape[1])
        return _draw(logits, key, jnp.float32(self.temperature), jnp.int32(top_k), jnp.float32(self.top_p))


@jax.jit
def _greedy(logits: Array) -> Array:
    return jnp.argmax(logits, 1).astype(jnp.int32)


@jax.jit
def _draw(logits: Array, key: Key[Array, ""], temperature: Array, top_k: Array, top_p: Array) -> Array:
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
    order = jnp.argsort(-logits, 1, stable=True)
    ranked = jnp.take_along_axis(logits, order, 1)
    ranked = (ranked - ranked[:, :1]) / temperature
    ranked = jnp.where(jnp.arange(logits.shape[1])[None] < top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, 1)
    before = jnp.cumsum(probabilities, 1) - probabilities
    # The likeliest token has nothing before it and always stays.
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    chosen = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, chosen[:, None], 1)[:, 0].astype(jnp.int32)
