"""What pruning changed, layer by layer, for reports."""

from __future__ import annotations

import dataclasses
from typing import Any

from intraslice_jax.config import LayerShape, ModelConfig


def layer_changes(dense: ModelConfig, pruned: ModelConfig) -> dict[str, Any]:
    """`dense_layers`: the widths before; `removed_by_layer`: fractions of each module's parameters that went.

    A fraction is negative where biases were added and little was removed.
    """

    def removed(count_dense: list[int], count_pruned: list[int]) -> list[float]:
        return [1 - small / full for full, small in zip(count_dense, count_pruned, strict=True)]

    return {
        "dense_layers": [_widths(shape) for shape in dense.layers],
        "removed_by_layer": {
            "attention": removed(*([c.attention_parameters(s) for s in c.layers] for c in (dense, pruned))),
            "mlp": removed(*([c.mlp_parameters(s) for s in c.layers] for c in (dense, pruned))),
        },
    }


def _widths(shape: LayerShape) -> dict[str, Any]:
    return {**dataclasses.asdict(shape), "query_to_kv": list(shape.query_to_kv)}
