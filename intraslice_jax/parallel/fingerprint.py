"""A number that says whether two models have the same weights, the same on any devices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from intraslice_jax.models.decoder import Decoder, decoder_to_arrays
from intraslice_jax.parallel.placement import to_host


def fingerprint(decoder: Decoder) -> str:
    """A digest of all bits of all weights, their names, shapes and dtypes; 64 hexadecimal digits.

    Integer sums do not depend on how the arrays are split, nor on the order of additions. This finds accidents and
    other models, not forgeries.
    """
    digest = hashlib.sha256()
    for prefix, arrays in _parts(decoder):
        sums = {name: to_host(pair) for name, pair in _sums(arrays).items()}
        for name, array in sorted(arrays.items()):
            digest.update(f"{prefix}{name} {array.dtype} {array.shape} {sums[name].tolist()}\n".encode())
    return digest.hexdigest()


def _parts(decoder: Decoder) -> Iterator[tuple[str, dict[str, Array]]]:
    yield "", {name: a for name, a in decoder_to_arrays(decoder).items() if not name.startswith("layers.")}
    for i, block in enumerate(decoder.layers):
        yield f"layers.{i}.", decoder_to_arrays(block)


@jax.jit
def _sums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, "2"]]:
    return {name: jnp.stack([_sum(array, seed) for seed in (1, 2)]) for name, array in arrays.items()}


def _sum(array: Array, seed: int) -> UInt32[Array, ""]:
    """The sum of hashes of every entry's bits and position, modulo 2^32."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    place = jnp.full(array.shape, seed, jnp.uint32)
    for axis in range(array.ndim):
        place = _mixed(place + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis))
    return jnp.sum(_mixed(bits + place), dtype=jnp.uint32)


def _mixed(x: Array) -> Array:
    """The finaliser of MurmurHash3 (Austin Appleby, public domain)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x
