"""What replacing one module costs: the divergence of the model's predictions on held-out windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, Decoder, run_block
from intraslice_jax.models.head import Predictions, predictions, token_kl
from intraslice_jax.parallel.placement import gathered, mesh_of, put_batch, to_host

JUDGED = 1024
"""Tokens at which predictions are compared, spread evenly over the held-out windows: the head costs more than all
layers of a small model."""

CONTEXT = 512
"""Tokens of a held-out window that are read: all layers behind a module run over them for every measurement."""

EARLY, EARLY_WINDOWS, LATE, LATE_WINDOWS = 64, 12, 256, 2
"""Tokens and windows on which modules are judged, see `judging`."""


def split_windows(windows: Int[np.ndarray, "samples seq"]) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate on, and the last ones, which are held out; a single window is both."""
    held_out = held_out_count(len(windows))
    return (windows[:-held_out] if len(windows) > held_out else windows), windows[-held_out:]


def judging(windows: Int[np.ndarray, "samples seq"]) -> tuple[np.ndarray, np.ndarray]:
    """What single modules are judged on: the first tokens of windows from all over the text, and held-out windows.

    Prompts are short: a module may matter at their first tokens only, of which long windows have few. These windows are
    calibrated on, too, but their first tokens are a small part of that.
    """
    spread = np.linspace(0, len(windows) - 1, min(EARLY_WINDOWS, len(windows))).round().astype(int)
    return windows[spread, :EARLY], split_windows(windows)[1][-LATE_WINDOWS:, :LATE]


@dataclass
class Tail:
    """The held-out windows at one layer boundary of a model, all layers behind it, and the dense model's predictions.

    Attributes:
        decoder: the dense model, whose embedding, norm and head both have.
        blocks: the layers of the model that a replacement goes into.
        layer: the next one.
    """

    decoder: Decoder
    blocks: Callable[[int], Block]
    layer: int
    x: Float[Array, "batch seq hidden"]
    positions: Int[np.ndarray, " judged"]
    predicted: Predictions

    @classmethod
    def start(cls, dense: LanguageModel, held_out: np.ndarray, blocks: Callable[[int], Block] | None = None) -> Tail:
        """Before the first layer; the layers are the dense ones where no others are given."""
        windows, decoder = held_out[:, :CONTEXT], dense.decoder
        tokens = put_batch(windows.astype(np.int32), mesh_of(decoder))
        count, seq = windows.shape
        positions = np.unique(np.linspace(0, seq - 1, max(1, min(JUDGED // count, seq))).round().astype(np.int32))
        predicted = predictions(decoder, decoder.hidden_states(tokens)[:, positions])
        return cls(
            decoder,
            decoder.layers.__getitem__ if blocks is None else blocks,
            0,
            decoder.embed(tokens),
            positions,
            predicted,
        )

    def advance_to(self, layer: int) -> None:
        """Goes on to a layer."""
        while self.layer < layer:
            self.x = run_block(gathered(self.blocks(self.layer)), self.x, self._rope)
            self.layer += 1

    def divergence(self, block: Block) -> float:
        """Mean divergence per token from the dense model, in nats, when the layer at hand is replaced."""
        x = run_block(block, self.x, self._rope)
        for later in range(self.layer + 1, self.decoder.config.num_layers):
            x = run_block(gathered(self.blocks(later)), x, self._rope)
        divergence = token_kl(self.decoder, self.predicted, self.decoder.norm(x[:, self.positions]))
        return float(to_host(divergence).mean(dtype=np.float64))

    @property
    def _rope(self):
        return self.decoder.rope_for(self.x.shape[1])
