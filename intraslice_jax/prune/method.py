"""What a pruning method is: two functions from a calibrated module and a budget to smaller weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array

from intraslice_jax.config import LayerShape
from intraslice_jax.prune.calibration import AttentionCalibration, MLPCalibration


@dataclass(frozen=True)
class PrunedAttention:
    """New weights of one attention module, in any dtype, and what is to be known about them.

    Attributes:
        arrays: by name, as `AttentionCalibration.arrays`.
        shape: the layer with the new attention.
        heads: kept query heads, numbered as before.
        relative_error: squared error of the module's output on the calibration text, relative to its energy.
        notes: anything else for the record, JSON-serialisable.
        behind: the residual stream behind the new attention, batch by batch, where it came up on the way.
    """

    arrays: dict[str, Array]
    shape: LayerShape
    heads: tuple[int, ...]
    relative_error: float
    notes: dict[str, Any] = field(default_factory=dict)
    behind: list[Array] | None = None


@dataclass(frozen=True)
class PrunedMLP:
    """New weights of one MLP, likewise.

    Attributes:
        channels: which inner channels stay with their gate and up weights as they were; None if others take
            their place.
    """

    arrays: dict[str, Array]
    relative_error: float
    channels: np.ndarray | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class PruningMethod(Protocol):
    """A way to make modules smaller; one class per method.

    Passes over the text run in the model's precision; wrap only the solves in `linalg.solver_precision`.
    """

    def prune_attention(self, layer: AttentionCalibration, ratio: float) -> PrunedAttention:
        """Removes about `ratio` of the o-projection's input channels, with all that feeds them."""
        ...

    def prune_mlp(self, layer: MLPCalibration, keep: int) -> PrunedMLP:
        """Keeps exactly `keep` channels."""
        ...
