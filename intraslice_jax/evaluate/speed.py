"""How fast models read prompts and write tokens, and what they occupy.

As in the paper's tables: a whole prompt at once (prefill), and one more token behind a full cache (decode); the whole
model, all its decoder layers, and one of them. The models take turns, on the same random tokens.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.environment import available_bytes
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate import arithmetic
from intraslice_jax.evaluate.timing import in_turn
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.cache import LayerCache, cache_rope, decode_block, logits_at, prefill_block
from intraslice_jax.models.precision import exact_float32

PAPER_CONTEXT = 4096
"""Tokens of the paper's speed measurements."""


@dataclass(frozen=True)
class Workload:
    """What the models are to do.

    Attributes:
        batch: sequences at once.
        context: tokens of each, the new one of the decode step included.
        layer: the decoder layer that is measured by itself.
        repeats: how often each model does everything, after a round that is not counted.
        seed: of the random tokens.
    """

    batch: int = 1
    context: int = PAPER_CONTEXT
    layer: int = 0
    repeats: int = 5
    seed: int = 0


def common_context(configs: list[ModelConfig], context: int | None) -> int:
    """The context to measure at: the paper's, or the longest that all models have.

    Raises:
        InputError: the one asked for is longer than a model's.
    """
    limit = min(config.max_position_embeddings for config in configs)
    if context is None:
        return min(PAPER_CONTEXT, limit)
    if context > limit:
        raise InputError(
            f"context {context} is longer than the model's maximum of {limit} tokens; give `context={limit}` or less"
        )
    if context < 2:
        raise InputError(f"`context` must be at least 2, found {context}")
    return context


def middle_layer(config: ModelConfig) -> int:
    """The layer with the median number of parameters."""
    sizes = [config.attention_parameters(s) + config.mlp_parameters(s) for s in config.layers]
    return int(np.argsort(sizes, kind="stable")[len(sizes) // 2])


def check_workload(models: Mapping[str, LanguageModel], work: Workload, memory: int | None = None) -> None:
    """Refuses what cannot be measured.

    Args:
        models: already in memory.
        work: to be done by each of them.
        memory: bytes left, None to ask the machine.

    Raises:
        InputError: a number is out of range, or the batch does not fit the memory; the message says which does.
    """
    for name, value in (("`batch_size`", work.batch), ("`repeats`", work.repeats)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, found {value}")
    layers = min(model.config.num_layers for model in models.values())
    if not 0 <= work.layer < layers:
        raise InputError(f"`layer` must be between 0 and {layers - 1}, found {work.layer}")
    memory = available_bytes() if memory is None else memory
    each = bytes_per_sequence(models, work.context)
    if work.batch * each > memory:
        fits = memory // each
        mend = f"the largest that fits is `batch_size={fits}`" if fits else "give a shorter `context`"
        raise InputError(
            f"`batch_size={work.batch}` with `context={work.context}` needs about {work.batch * each / 2**30:.1f} GiB, "
            f"{memory / 2**30:.1f} GiB are free; {mend}"
        )


def bytes_per_sequence(models: Mapping[str, LanguageModel], context: int) -> int:
    """An estimate of what one sequence takes: the caches of all models, and the activations of the widest layer."""
    caches = sum(
        cache_bytes(model.config, 1, context, model.decoder.embed_tokens[...].dtype.itemsize)
        for model in models.values()
    )
    configs = [model.config for model in models.values()]
    return caches + max(_activation_bytes(config, shape, context) for config in configs for shape in config.layers)


def _activation_bytes(model: ModelConfig, shape: LayerShape, context: int) -> int:
    heads = shape.num_attention_heads
    widths = 4 * model.hidden_size + 2 * arithmetic.mixed_channels(shape) + 3 * shape.intermediate_size
    scores = 2 * heads * max(128, -(-context // 8))  # of one chunk of queries, see models.attention
    return 4 * (context * (widths + scores) + model.vocab_size)


def cache_bytes(model: ModelConfig, batch: int, slots: int, itemsize: int) -> int:
    """Bytes of the keys and values of all layers."""
    widths = sum(s.num_key_value_heads * (s.qk_head_dim + s.v_head_dim) for s in model.layers)
    return batch * slots * widths * itemsize


def measure_speed(models: Mapping[str, LanguageModel], work: Workload) -> dict[str, dict[str, Any]]:
    """Times and sizes of each model.

    Returns:
        By name: `seconds` (`prefill` and `decode`, each with the medians of `model`, `layers` and `layer`), `rounds`
        (what they are medians of), `flops` of the layers likewise, `parameters`, `block_parameters`, `weight_bytes`,
        `block_bytes`, `cache_bytes`.

    Raises:
        InputError: as `check_workload`.
    """
    check_workload(models, work)
    vocab = min(model.config.vocab_size for model in models.values())
    tokens = np.random.default_rng(work.seed).integers(0, vocab, (work.batch, work.context), dtype=np.int32)
    runners = {name: _Runner(model, tokens, work.layer) for name, model in models.items()}
    rounds: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in models}
    for phase in ("prefill", "decode"):
        calls = {name: functools.partial(getattr(runner, phase)) for name, runner in runners.items()}
        for name, found in in_turn(calls, work.repeats).items():
            rounds[name][phase] = found
    return {
        name: {
            "seconds": {
                phase: {part: statistics.median(times) for part, times in parts.items()}
                for phase, parts in rounds[name].items()
            },
            "rounds": rounds[name],
            "flops": _flops(model.config, work),
            **_sizes(model),
            "cache_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(runners[name].caches)),
        }
        for name, model in models.items()
    }


def _flops(model: ModelConfig, work: Workload) -> dict[str, dict[str, int]]:
    counted = {}
    for phase, of, predicted in (
        ("prefill", arithmetic.prefill_layer, work.batch),  # only the last token of a prompt meets the head
        ("decode", arithmetic.decode_layer, work.batch),
    ):
        each = [of(model, shape, work.batch, work.context) for shape in model.layers]
        layers = sum(each)
        counted[phase] = {
            "model": layers + arithmetic.head(model, predicted),
            "layers": layers,
            "layer": each[work.layer],
        }
    return counted


def _sizes(model: LanguageModel) -> dict[str, int]:
    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    return {
        "parameters": model.config.total_parameters(),
        "block_parameters": model.config.block_parameters(),
        "weight_bytes": size(model.decoder),
        "block_bytes": size(list(model.decoder.layers)),
    }


class _Runner:
    """One model with its cache: what `models.cache` does, with a clock between layers and head."""

    def __init__(self, model: LanguageModel, tokens: np.ndarray, layer: int) -> None:
        self.decoder, self.layer = model.decoder, layer
        self.blocks = list(model.decoder.layers)
        self.tokens = jnp.asarray(tokens)
        self.caches: list[LayerCache] = []

    def prefill(self) -> dict[str, float]:
        """Reads the prompts, and keeps the caches for `decode`."""
        batch, seq = self.tokens.shape
        positions = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32)[None], (batch, seq))
        lengths = jnp.full((batch,), seq, jnp.int32)
        rope = cache_rope(self.decoder, positions, lengths)
        inputs = jax.block_until_ready(self.decoder.embed(self.tokens))
        self.caches.clear()  # not both the old ones and the new ones at once
        clock = _Clock(self.decoder)
        with exact_float32(self.decoder):
            x = self.decoder.embed(self.tokens)
            for block in self.blocks:
                x, cache = prefill_block(block, x, rope, seq)
                self.caches.append(cache)
            clock.lap("layers", x)
            clock.lap("model", logits_at(self.decoder, x, lengths - 1))
            alone = _Clock(self.decoder)
            alone.lap("layer", prefill_block(self.blocks[self.layer], inputs, rope, seq))
        return {**clock.laps, **alone.laps}

    def decode(self) -> dict[str, float]:
        """The last token again, in the last slot of the caches."""
        batch, seq = self.tokens.shape
        at = jnp.full((batch, 1), seq - 1, jnp.int32)
        rope = cache_rope(self.decoder, at, jnp.full((batch,), seq, jnp.int32))
        first = jnp.zeros((batch,), jnp.int32)
        inputs = jax.block_until_ready(self.decoder.embed(self.tokens[:, -1:]))
        clock = _Clock(self.decoder)
        with exact_float32(self.decoder):
            x = self.decoder.embed(self.tokens[:, -1:])
            for i, block in enumerate(self.blocks):
                x, self.caches[i] = decode_block(block, x, rope, self.caches[i], at)
            clock.lap("layers", x)
            clock.lap("model", logits_at(self.decoder, x, first))
            alone = _Clock(self.decoder)
            done = decode_block(self.blocks[self.layer], inputs, rope, self.caches[self.layer], at)
            alone.lap("layer", done)
            self.caches[self.layer] = done[1]
        return {**clock.laps, **alone.laps}


class _Clock:
    """Seconds since the start at which results were there."""

    def __init__(self, ready: Any) -> None:
        jax.block_until_ready(ready)
        self.laps: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str, result: Any) -> None:
        """Waits for a result."""
        jax.block_until_ready(result)
        self.laps[name] = time.perf_counter() - self._started
