"""Ratios per layer, and the ledger that makes the removed parameters add up to the request."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.reading import Count

Ratio = Annotated[float, Field(ge=0, le=1)]

TOLERANCE = 0.005
"""How far the removed fraction of the block parameters may be from the request."""


@dataclass(frozen=True)
class HeadWidths:
    """What stays of an attention: query heads, and channels of a query or key head and of a value head."""

    num_attention_heads: Count
    qk_head_dim: Count
    v_head_dim: Count

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class LayerRatios:
    """Fraction of the channels to remove, per layer: of the o-projection's and of the down-projection's inputs.

    Attributes:
        attention, mlp: one ratio per layer.
        heads: of every layer's attention, where that is decided too; its ratio is then one of parameters. Empty where
            the method chooses heads and widths.
    """

    attention: tuple[Ratio, ...]
    mlp: tuple[Ratio, ...]
    heads: tuple[HeadWidths, ...] = ()

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    def sparsity(self, config: ModelConfig) -> float:
        """The fraction of the block parameters that these ratios ask for."""
        asked = sum(
            a * config.attention_parameters(shape) + m * config.mlp_parameters(shape)
            for a, m, shape in zip(self.attention, self.mlp, config.layers, strict=True)
        )
        return asked / config.block_parameters()


class Ledger:
    """Turns ratios into MLP widths such that the removed parameters add up to the request.

    Attention removes what whole heads and even widths allow; what that misses is taken from, or given back to,
    the MLP of the same layer, and what a full or empty MLP or rounding leaves over goes to the next layer.
    `attention_range` says how far an attention may miss for the layers behind it to still make up for it.
    """

    def __init__(self, config: ModelConfig, ratios: LayerRatios, align: int, max_ratio: float = 1.0) -> None:
        self._config = config
        self._align = align
        self._max_ratio = max_ratio
        shapes = config.layers
        dense = [config.attention_parameters(shape) for shape in shapes]
        self._attention = [n * r for n, r in zip(dense, ratios.attention, strict=True)]
        self._mlp = [config.mlp_parameters(s) * r for s, r in zip(shapes, ratios.mlp, strict=True)]
        self._capacity = [self._removed(s, narrowest(s.intermediate_size, align, max_ratio)) for s in shapes]
        self._owed = 0.0

    def __len__(self) -> int:
        return len(self._mlp)

    @property
    def owed(self) -> float:
        """Asked of the modules done so far and not removed by them: all that the ledger remembers of them."""
        return self._owed

    @owed.setter
    def owed(self, owed: float) -> None:
        self._owed = owed

    def attention_range(self, layer: int) -> tuple[int, int]:
        """The fewest and the most parameters that a layer's attention may keep for the budget to be met.

        Never fewer than the maximum ratio leaves. Where no attention meets the range, take the next greater one.
        """
        dense = self._config.attention_parameters(self._config.layers[layer])
        most_removed = self._owed + self._attention[layer] + sum(self._mlp[layer:])
        least_removed = most_removed - sum(self._capacity[layer:])
        fewest = max(dense - most_removed, dense * (1 - self._max_ratio), 0)
        return round(fewest), round(max(fewest, min(dense, dense - least_removed)))

    def attention_done(self, layer: int, pruned: LayerShape) -> None:
        """Books what pruning the attention of a layer removed."""
        dense = self._config.attention_parameters(self._config.layers[layer])
        self._owed += self._attention[layer] - (dense - self._config.attention_parameters(pruned))

    def mlp_width(self, layer: int) -> int:
        """The MLP width of a layer, and books it; call after `attention_done`."""
        shape = self._config.layers[layer]
        full = shape.intermediate_size
        self._owed += self._mlp[layer]
        widths = [full, *range(narrowest(full, self._align, self._max_ratio), full, self._align)]
        width = min(widths, key=lambda w: (abs(self._removed(shape, w) - self._owed), w))
        self._owed -= self._removed(shape, width)
        return width

    def check(self, tolerance: float = TOLERANCE) -> None:
        """Raises InputError when more than `tolerance` of the block parameters are owed at the end.

        Half a step of the alignment or of a head's width is borne, where that is more: in tiny models nothing
        comes closer.
        """
        total = self._config.block_parameters()
        missing, step = self._owed / total, max(map(self._step, self._config.layers)) / total
        if abs(missing) > max(tolerance, 0.5 * step):
            raise InputError(
                f"the requested sparsity cannot be met with these ratios: {abs(missing):.1%} of the block parameters "
                + ("could not be removed; ask for less" if missing > 0 else "too many were removed; ask for more")
            )

    def _step(self, shape: LayerShape) -> int:
        """The parameters of one step of the alignment, or of two channels of all heads."""
        width, qk = max(shape.v_head_dim - 2, 1), max(shape.qk_head_dim - 2, 1)
        narrow = dataclasses.replace(shape, v_head_dim=width, qk_head_dim=qk, rotary_dim=0)
        channels = self._config.attention_parameters(shape) - self._config.attention_parameters(narrow)
        return max(channels, self._removed(shape, max(shape.intermediate_size - self._align, 1)))

    def _removed(self, shape: LayerShape, width: int) -> int:
        narrow = dataclasses.replace(shape, intermediate_size=width)
        return self._config.mlp_parameters(shape) - self._config.mlp_parameters(narrow)


def narrowest(full: int, align: int, max_ratio: float) -> int:
    """The smallest width that an MLP of width `full` may get: a multiple of `align`, or `full`."""
    least = max(1, full * (1 - max_ratio) - 1e-9)
    width = -int(-least // align) * align
    return min(width, full)
