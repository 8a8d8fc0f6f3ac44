"""How much to take from each module, and the ledger that makes the sum come out."""

from __future__ import annotations

from dataclasses import dataclass

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError


@dataclass(frozen=True)
class LayerRatios:
    """Fraction of the channels to remove, per layer: of the o-projection's and of the down-projection's inputs."""

    attention: tuple[float, ...]
    mlp: tuple[float, ...]


def uniform_ratios(config: ModelConfig, sparsity: float) -> LayerRatios:
    """The same fraction everywhere."""
    same = (sparsity,) * config.num_layers
    return LayerRatios(same, same)


class Ledger:
    """Turns ratios into MLP widths such that the removed parameters add up to the request.

    Attention removes what whole heads and even widths allow; what that misses is taken from, or given back to,
    the MLP of the same layer, and what rounding leaves over goes to the next layer.
    """

    def __init__(self, config: ModelConfig, ratios: LayerRatios, align: int) -> None:
        self._config = config
        self._ratios = ratios
        self._align = align
        self._owed = 0.0

    def attention_done(self, layer: int, pruned: LayerShape) -> None:
        """Books what pruning the attention of a layer removed."""
        dense = self._config.attention_parameters(self._config.layers[layer])
        self._owed += dense * self._ratios.attention[layer] - (dense - self._config.attention_parameters(pruned))

    def mlp_width(self, layer: int) -> int:
        """The MLP width of a layer, and books it; call after `attention_done`."""
        shape = self._config.layers[layer]
        dense = self._config.mlp_parameters(shape)
        per_channel = self._config.hidden_size * (3 if self._config.gated_mlp else 2)
        self._owed += dense * self._ratios.mlp[layer]
        full = shape.intermediate_size
        width = full - self._align * round(self._owed / per_channel / self._align)
        width = max(min(self._align, full), min(full, width))
        self._owed -= (full - width) * per_channel
        return width

    def check(self, tolerance: float) -> None:
        """Raises InputError when more than `tolerance` of the block parameters are still owed at the end."""
        missing = self._owed / self._config.block_parameters()
        if abs(missing) > tolerance:
            raise InputError(
                f"the requested sparsity cannot be met with these ratios: {missing:.1%} of the block parameters "
                "could not be removed; ask for less"
            )
