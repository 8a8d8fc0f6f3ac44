"""Widths of all modules by exchanging parameters between them, judged in the pruned model (docs/method.md 6.3)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from intraslice_jax.calibrate.gradients import OnBatch
from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block
from intraslice_jax.models.streamed import StreamedDecoder
from intraslice_jax.parallel.distributed import from_first
from intraslice_jax.parallel.placement import gathered
from intraslice_jax.prune.allocation import allocate_evenly
from intraslice_jax.prune.budget import HeadWidths, LayerRatios, narrowest
from intraslice_jax.prune.divergence import Tail, split_windows
from intraslice_jax.prune.exchange import Move, exchange
from intraslice_jax.prune.heads import head_counts
from intraslice_jax.prune.resume import Resumable, RunLog
from intraslice_jax.prune.sensitivity import KLSensitivity
from intraslice_jax.prune.trials import Trials, padded_block, variants

log = logging.getLogger(__name__)

WIDTH_STEPS = 8
"""Into how many steps the widths of heads are cut."""

CHANNEL_STEPS = 16
"""Into how many steps the channels of an MLP are cut."""

LAYER_STEPS = 8
"""In how many ways a round changes a layer: one step down and one up of each of its four widths."""

SHARES = (1.0, 0.5)
"""Which parts of an exchange are tried: measured one by one, steps cost more together."""

STATE = "search"
"""What a run's log calls where the search is."""


@dataclass(frozen=True)
class Search(Resumable):
    """Ratios by divergence, then parameters exchanged between the modules of the pruned model while that helps.

    Every round measures what one step of each width costs or gains in the pruned model: query heads, channels of
    queries and keys, channels of values, channels of the MLP. The most profitable exchanges at constant size make the
    next candidate, which is pruned and judged as a whole; the better of two sizes of exchange is kept if it is better.
    """

    def resumed(
        self,
        model: LanguageModel,
        windows: Int[np.ndarray, "samples seq"],
        config: PruneConfig,
        on_batch: OnBatch | None,
        run_log: RunLog | None,
    ) -> LayerRatios:
        """Ratios, and the widths of all attentions; goes on behind the layers of which the log has measurements.

        Raises:
            InputError: the method does not take widths.
        """
        if config.method != "intraslice":
            raise InputError(f"only method intraslice takes the widths of ratios search, found method {config.method}")
        if config.target_sparsity == 0:
            return allocate_evenly(model.config, config)
        state = _State.kept_in(run_log)
        if state is None:
            told = (
                None
                if on_batch is None
                else lambda done, _: on_batch(done, _modules(model.config, config.search_rounds))
            )
            state = _State(0, KLSensitivity().resumed(model, windows, config, told, run_log), [])
        candidates = _Candidates(model, windows, config)
        best, clock = candidates.prune(state.ratios), _Clock(config.search_seconds)
        for number in range(state.round, config.search_rounds):
            if state.round < number:
                state = _State(number, best.ratios, [])
            moves = self._moves(model, candidates, best, state, clock, on_batch, run_log)
            chosen = exchange([move for layer in moves for move in layer])
            sizes = sorted({math.ceil(len(chosen) * share) for share in SHARES} - {0})
            tried = [candidates.prune(best.after(chosen[:size], model.config, config)) for size in sizes]
            better = min(tried, key=lambda candidate: candidate.divergence, default=best)
            found = number + 1, best.divergence, better.divergence
            log.info("search, round %d: divergence %.4f, with the best exchange %.4f", *found)
            if better.divergence >= best.divergence:
                break
            best = better
            if clock.is_over():
                break
        return best.ratios

    def _moves(
        self,
        model: LanguageModel,
        candidates: _Candidates,
        best: _Candidate,
        state: _State,
        clock: _Clock,
        on_batch: OnBatch | None,
        run_log: RunLog | None,
    ) -> list[list[Move]]:
        """All steps of all layers measured one by one, or of as many layers as the time allows."""
        dense, now, config = model.config, best.pruned.config.layers, candidates.config
        tail = Tail.start(model, candidates.held_out, best.blocks)
        first, every = len(state.moves), _modules(dense, config.search_rounds)
        if on_batch is not None:
            on_batch(_modules(dense, state.round) + LAYER_STEPS * first, every)
        found = variants(
            model, candidates.train, config, lambda i: steps(now[i], dense.layers[i], config), first, best.blocks
        )
        for layer, ways in itertools.groupby(found, key=lambda variant: variant.layer):
            tail.advance_to(layer)
            measured = []
            for variant in ways:
                count = dense.mlp_parameters if variant.kind else dense.attention_parameters
                kept, least = count(variant.shape), (1 - config.max_ratio) * count(dense.layers[layer])
                removed = count(now[layer]) - kept
                if removed and kept >= least:
                    cost = tail.divergence(variant.block) - best.divergence
                    measured.append(Move(layer, variant.heads, removed, cost))
            state.moves.append(measured)
            state.keep_in(run_log)
            if on_batch is not None:
                on_batch(_modules(dense, state.round) + LAYER_STEPS * (layer + 1), every)
            if clock.is_over():
                break
        return state.moves


def _modules(dense: ModelConfig, rounds: int) -> int:
    """How many are pruned alone: each of the two of a layer before the first round, then steps of widths."""
    return dense.num_layers * (2 + rounds * LAYER_STEPS)


@dataclass(frozen=True)
class _Candidate:
    """A pruned model, its widths, its layers in the dense model's shapes and its divergence in nats per token."""

    pruned: LanguageModel
    ratios: LayerRatios
    blocks: Callable[[int], Block]
    divergence: float

    def after(self, moves: Sequence[Move], dense: ModelConfig, config: PruneConfig) -> LayerRatios:
        """Its ratios after some moves; the MLPs together make up for what these miss of the budget."""
        attention, mlp, heads = list(self.ratios.attention), list(self.ratios.mlp), list(self.ratios.heads)
        for move in moves:
            shape = dense.layers[move.layer]
            if move.heads is None:
                mlp[move.layer] += move.parameters / dense.mlp_parameters(shape)
            else:
                heads[move.layer] = move.heads
                attention[move.layer] += move.parameters / dense.attention_parameters(shape)
        asked = LayerRatios(tuple(attention), tuple(mlp)).sparsity(dense)
        missing = (
            (config.target_sparsity - asked) * dense.block_parameters() / sum(map(dense.mlp_parameters, dense.layers))
        )
        mlp = [min(max(ratio + missing, 0.0), config.max_ratio) for ratio in mlp]
        return LayerRatios(tuple(attention), tuple(mlp), tuple(heads))


class _Candidates:
    """Makes candidates: the model pruned on all but the held-out windows."""

    def __init__(self, model: LanguageModel, windows: np.ndarray, config: PruneConfig) -> None:
        self.train, self.held_out = split_windows(windows)
        plain = {"refine": 0, "iterative": "never", "output_biases": False, "loss_weight": 0.0, "dense_targets": 0.0}
        self.config = dataclasses.replace(config, **plain)
        self._model = model

    def prune(self, ratios: LayerRatios) -> _Candidate:
        """The model of these ratios, and how far its predictions are from the dense model's."""
        from intraslice_jax.prune.pipeline import prune_model  # which estimates ratios itself

        dense = self._model
        pruned = prune_model(dense, self.train, self.config, ratios=ratios)
        blocks = functools.partial(padded_block, pruned, dense)
        if not isinstance(dense.decoder, StreamedDecoder):
            blocks = [blocks(i) for i in range(dense.config.num_layers)].__getitem__
        divergence = Tail.start(dense, self.held_out, blocks).divergence(gathered(blocks(0)))
        return _Candidate(pruned, _ratios_of(pruned.config, dense.config), blocks, divergence)


def _ratios_of(pruned: ModelConfig, dense: ModelConfig) -> LayerRatios:
    """What a pruned model's layers are, as ratios of parameters."""

    def removed(count: Callable[[LayerShape], int]) -> tuple[float, ...]:
        return tuple(1 - count(new) / count(old) for new, old in zip(pruned.layers, dense.layers, strict=True))

    heads = tuple(_widths(shape) for shape in pruned.layers)
    return LayerRatios(removed(dense.attention_parameters), removed(dense.mlp_parameters), heads)


def _widths(shape: LayerShape) -> HeadWidths:
    return HeadWidths(shape.num_attention_heads, shape.qk_head_dim, shape.v_head_dim)


def steps(now: LayerShape, full: LayerShape, config: PruneConfig) -> Trials:
    """One step down and one up of each width of a layer.

    Args:
        now: the layer as it is pruned.
        full: the dense one.
        config: its grouping, alignments and largest ratio.
    """
    here, attention = _widths(now), []
    for name, values in (
        ("num_attention_heads", head_counts(full.query_to_kv, config.grouping)),
        ("qk_head_dim", _width_steps(full.qk_head_dim, config.head_align)),
        ("v_head_dim", _width_steps(full.v_head_dim, config.head_align)),
    ):
        attention += [dataclasses.replace(here, **{name: value}) for value in _beside(values, getattr(here, name))]
    inner, align = full.intermediate_size, config.align
    step = align * max(1, round(inner / CHANNEL_STEPS / align))
    least = narrowest(inner, align, config.max_ratio)
    channels = [width for width in (*range(step, inner, step), inner) if width >= least]
    return Trials(attention, _beside(channels, now.intermediate_size))


def _width_steps(full: int, align: int) -> list[int]:
    """Multiples of `align` in equal steps, and the full width."""
    parts = (align * max(1, round(full * i / WIDTH_STEPS / align)) for i in range(1, WIDTH_STEPS))
    return sorted({full, *(width for width in parts if width < full)})


def _beside(values: Sequence[int], now: int) -> list[int]:
    """The next value of a grid below and the next above, at least half a step away."""
    least = (values[1] - values[0]) / 2 if len(values) > 1 else 1
    below, above = [v for v in values if v <= now - least], [v for v in values if v >= now + least]
    return [*below[-1:], *above[:1]]


@dataclass
class _State:
    """Where a search is: the round, the ratios at its beginning, and the moves measured so far, layer by layer."""

    round: int
    ratios: LayerRatios
    moves: list[list[Move]]

    @classmethod
    def kept_in(cls, run_log: RunLog | None) -> _State | None:
        """That of a run that was stopped."""
        return None if run_log is None else run_log.get(STATE, cls)

    def keep_in(self, run_log: RunLog | None) -> None:
        """For a run that goes on later."""
        if run_log is not None:
            run_log.put(STATE, dataclasses.asdict(self))


class _Clock:
    """Says when a time is over, to all processes alike; never for 0 seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else None

    def is_over(self) -> bool:
        """Whether the first process is past the end."""
        return self._end is not None and bool(from_first(np.asarray(time.monotonic() >= self._end)))
