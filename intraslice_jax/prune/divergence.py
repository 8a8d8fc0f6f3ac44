"""What replacing one module costs: the divergence of the model's predictions on held-out windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Int

from intraslice_jax.calibrate.held_out import held_out_count
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Block, Decoder, run_block
from intraslice_jax.models.head import Predictions, predictions, token_kl
from intraslice_jax.parallel.placement import gathered, mesh_of, put_batch, to_host

EARLY, LATE = (12, 64), (2, 256)
"""Windows and tokens of each on which modules are judged: all layers after a module run over them for every
measurement."""


def split_windows(windows: Int[np.ndarray, "samples seq"]) -> tuple[np.ndarray, np.ndarray]:
    """Windows to calibrate on, and the last ones, which are held out; a single window is both."""
    held_out = held_out_count(len(windows))
    return (windows[:-held_out] if len(windows) > held_out else windows), windows[-held_out:]


def judging(windows: Int[np.ndarray, "samples seq"]) -> tuple[np.ndarray, np.ndarray]:
    """What single modules are judged on: the first tokens of windows from all over the text, and held-out windows.

    Prompts are short: a module may matter at their first tokens only, of which long windows have few. Those windows are
    calibrated on, too, but their first tokens are a small part of that.
    """
    (early, few), (late, more) = judging_shapes(*windows.shape)
    spread = np.linspace(0, len(windows) - 1, early).round().astype(int)
    return windows[spread, :few], windows[-late:, :more]


def judging_shapes(samples: int, seq: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Windows and tokens of what `judging` gives of so many windows of so many tokens."""
    (early, few), (late, more) = EARLY, LATE
    return (min(early, samples), min(few, seq)), (min(late, held_out_count(samples)), min(more, seq))


@dataclass
class Tail:
    """Windows at one layer boundary of a model, all layers after it, and the model's predictions.

    Attributes:
        decoder: the model.
        layer: the next one.
        x: the hidden states before it.
        predicted: at all positions.
    """

    decoder: Decoder
    layer: int
    x: Float[Array, "batch seq hidden"]
    predicted: Predictions

    @classmethod
    def start(cls, model: LanguageModel, windows: Int[np.ndarray, "batch seq"]) -> Tail:
        """Before the first layer."""
        decoder = model.decoder
        tokens = put_batch(windows.astype(np.int32), mesh_of(decoder))
        return cls(decoder, 0, decoder.embed(tokens), predictions(decoder, decoder.hidden_states(tokens)))

    def advance_to(self, layer: int) -> None:
        """Goes on to a layer."""
        while self.layer < layer:
            self.x = run_block(gathered(self.decoder.layers[self.layer]), self.x, self._rope)
            self.layer += 1

    def divergence(self, block: Block) -> float:
        """Mean divergence per token from the model's predictions, in nats, when the layer at hand is replaced."""
        x = run_block(block, self.x, self._rope)
        for later in range(self.layer + 1, self.decoder.config.num_layers):
            x = run_block(gathered(self.decoder.layers[later]), x, self._rope)
        divergence = token_kl(self.decoder, self.predicted, self.decoder.norm(x))
        return float(to_host(divergence).mean(dtype=np.float64))

    @property
    def _rope(self):
        return self.decoder.rope_for(self.x.shape[1])
