"""Tiny random models of every kind that the pruning code distinguishes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import abstract_arrays, decoder_from_arrays, decoder_to_arrays

VOCAB = 61
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
GQA = LayerShape((0, 0, 1, 1), 8, 8, 8, 24)
FLAVOURS = {
    "mha": ((LayerShape((0, 1, 2, 3), 8, 8, 8, 24),) * 2, {}),
    "gqa": ((GQA, GQA), {"tie_word_embeddings": True}),
    # As an earlier pruning leaves it: groups of 3, 1 and 2 heads, pairs missing, layers of different widths.
    "ragged": ((LayerShape((0, 0, 0, 1, 2, 2), 6, 6, 6, 24), LayerShape((0, 1, 1), 8, 8, 8, 16)), {}),
    "biases": ((GQA, GQA), BIASES),
    "window": ((dataclasses.replace(GQA, sliding_window=5),) * 2, {}),
    # Half of each query/key head is not rotated, as in Phi.
    "partial": ((dataclasses.replace(GQA, rotary_dim=4),) * 2, {"rotary_dim": 4}),
    "phi": (
        (LayerShape((0, 1, 2, 3), 8, 8, 8, 24),) * 2,
        BIASES | {"norm": "layer", "parallel_block": True, "gated_mlp": False, "hidden_act": "gelu_new"},
    ),
}


def make(
    flavour: str = "gqa",
    seed: int = 0,
    layers: int = 0,
    shape: LayerShape | None = None,
    dtype=jnp.float32,
    **changes,
) -> LanguageModel:
    """A model with random weights, biases and RoPE pairs; `layers` repeats `shape` or the first layer's."""
    shapes, extra = FLAVOURS[flavour]
    shapes = (shape or shapes[0],) * layers or shapes
    options = {"rotary_dim": 8, "max_position_embeddings": 256} | extra | changes
    config = ModelConfig(flavour, VOCAB, 16, 8, layers=shapes, **options)
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, abstract in abstract_arrays(config).items():
        if name.endswith("rope_pairs"):
            every = config.rotary_dim // 2
            rows = [np.sort(rng.permutation(every)[: abstract.shape[1]]) for _ in range(abstract.shape[0])]
            arrays[name] = np.asarray(rows, np.int32)
        else:
            arrays[name] = _random(rng, name, abstract.shape).astype(dtype)
    return LanguageModel(config, decoder_from_arrays(config, arrays), None, f"a tiny {flavour} model")


def _random(rng, name, shape):
    values = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if len(shape) == 1 or name.endswith("bias"):
        return 0.3 * values
    if "embed" in name or "lm_head" in name:
        return values
    # Uneven scales, so that heads, pairs and channels differ in weight; queries and keys look somewhere.
    uneven = np.exp(0.5 * rng.standard_normal((*(1,) * (len(shape) - 2), *shape[-2:])))
    return 1.5 * values * (uneven if name.endswith("_proj") else 1) / np.sqrt(16)


def windows(count: int = 6, length: int = 32, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length), dtype=np.int32)


def with_arrays(model: LanguageModel, **new: np.ndarray) -> LanguageModel:
    """The model with some arrays replaced; dots in names are written as two underscores."""
    arrays = decoder_to_arrays(model.decoder)
    for name, array in new.items():
        dotted = name.replace("__", ".")
        assert dotted in arrays
        arrays[dotted] = jnp.asarray(array, arrays[dotted].dtype)
    return dataclasses.replace(model, decoder=decoder_from_arrays(model.config, arrays))
