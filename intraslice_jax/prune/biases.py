"""Biases for the o- and down-projections of families that have none."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import numpy as np

from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from intraslice_jax.models.streamed import StreamedDecoder
from intraslice_jax.parallel.placement import read_part


def with_output_biases(model: LanguageModel) -> LanguageModel:
    """The same model with a zero bias on every o- and down-projection, for a method to fill.

    MLP biases come all or none in `ModelConfig`, so gate and up projections get theirs as well; they stay zero
    and count as parameters.
    """
    old = model.decoder
    arrays = old.arrays if isinstance(old, StreamedDecoder) else decoder_to_arrays(old)
    dtype = old.embed_tokens[...].dtype
    config = dataclasses.replace(model.config, attention_output_bias=True, mlp_bias=True)
    there = set(arrays)
    new: dict[str, Any] = {}
    for i, shape in enumerate(config.layers):
        inner = ("gate_bias", "up_bias") if config.gated_mlp else ("up_bias",)
        sizes = {f"layers.{i}.mlp.{name}": shape.intermediate_size for name in inner}
        sizes |= {f"layers.{i}.{name}": config.hidden_size for name in ("attention.o_bias", "mlp.down_bias")}
        new |= {name: np.zeros(size, dtype) for name, size in sizes.items() if name not in there}
    if isinstance(old, StreamedDecoder):
        decoder = StreamedDecoder(config, _WithNew(new, old.arrays), old.mesh)
    else:
        decoder = decoder_from_arrays(config, {**arrays, **new})
    return dataclasses.replace(model, config=config, decoder=decoder)


class _WithNew(ChainMap[str, Any]):
    """New arrays over stored ones, of which parts are read where the storage allows that."""

    def __init__(self, new: dict[str, Any], stored: Mapping[str, Any]):
        super().__init__(new, stored)  # pyright: ignore[reportArgumentType] (nothing is written to it)

    def part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """`self[path][index]`."""
        new, stored = self.maps
        return read_part(new if path in new else stored, path, index)
