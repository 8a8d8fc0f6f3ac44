"""A Llama small enough to be trained while you wait, and text for it; the notebooks share it."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from intraslice_jax.calibrate.data import encode
from intraslice_jax.config import LayerShape, ModelConfig, uniform_query_to_kv
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Decoder, decoder_from_arrays, decoder_to_arrays

LENGTH = 48


def text(sentences: int, seed: int) -> str:
    """Sentences of a small grammar: who does what where, and the same person again in the second half."""
    rng = random.Random(seed)
    people = ("Ann", "Ben", "Carla", "Dmitri", "Emma", "Farid")
    acts = ("finds a stone", "reads a letter", "paints the door", "counts the boats", "sings a song")
    places = ("by the river", "in the old mill", "under a tree", "behind the hill")
    lines = []
    for _ in range(sentences):
        who, other = rng.sample(people, 2)
        lines.append(f"{who} {rng.choice(acts)} {rng.choice(places)}, and {other} waits for {who}.")
    return " ".join(lines)


def train(steps: int = 90, seed: int = 0) -> LanguageModel:
    """Four layers, six query heads on three KV heads, one token per byte."""
    tokenizer = _tokenizer()
    shape = LayerShape(uniform_query_to_kv(6, 3), 16, 16, 16, 128)
    config = ModelConfig(
        "llama", len(tokenizer), 64, 16, 16, (shape,) * 4, max_position_embeddings=256, tie_word_embeddings=True
    )
    arrays = _initial(config, seed)
    pairs = {path: array for path, array in arrays.items() if path.endswith("rope_pairs")}
    weights = {path: array for path, array in arrays.items() if path not in pairs}
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(weights: dict, tokens: jax.Array) -> jax.Array:
        logits = decoder_from_arrays(config, {**weights, **pairs})(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(weights: dict, state, tokens: jax.Array):
        gradients = jax.grad(loss)(weights, tokens)
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(weights, updates), state

    stream, rng, state = encode(tokenizer, text(3000, seed)), np.random.default_rng(seed), optimiser.init(weights)
    for _ in range(steps):
        starts = rng.integers(0, len(stream) - LENGTH - 1, 16)
        tokens = np.stack([stream[start : start + LENGTH + 1] for start in starts])
        weights, state = step(weights, state, jnp.asarray(tokens))
    return LanguageModel(config, decoder_from_arrays(config, {**weights, **pairs}), tokenizer, "a small Llama")


def _initial(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """Random matrices, norms of one."""
    rng = np.random.default_rng(seed)

    def draw(path: str, array: jax.Array) -> jax.Array:
        if path.endswith(("norm.weight", "rope_pairs")):
            return array
        return jnp.asarray(0.1 * rng.standard_normal(array.shape), jnp.float32)

    return {path: draw(path, array) for path, array in decoder_to_arrays(Decoder(config)).items()}


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
