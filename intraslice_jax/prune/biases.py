"""Biases for the o- and down-projections of families that have none."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays


def with_output_biases(model: LanguageModel) -> LanguageModel:
    """The same model with a zero bias on every o- and down-projection, for a method to fill.

    MLP biases come all or none in `ModelConfig`, so gate and up projections get theirs as well; they stay zero
    and count as parameters.
    """
    arrays = decoder_to_arrays(model.decoder)
    config = dataclasses.replace(model.config, attention_output_bias=True, mlp_bias=True)
    for i, shape in enumerate(config.layers):
        inner = ("gate_bias", "up_bias") if config.gated_mlp else ("up_bias",)
        sizes = {f"layers.{i}.mlp.{name}": shape.intermediate_size for name in inner}
        sizes |= {f"layers.{i}.{name}": config.hidden_size for name in ("attention.o_bias", "mlp.down_bias")}
        for name, size in sizes.items():
            arrays.setdefault(name, jnp.zeros(size, arrays["embed_tokens"].dtype))
    return dataclasses.replace(model, config=config, decoder=decoder_from_arrays(config, arrays))
