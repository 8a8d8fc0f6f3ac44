"""What uniform ratios make of a model whose heads are all alike: which ones real heads leave, only a run can say."""

from __future__ import annotations

import dataclasses

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.prune.allocation import allocate_evenly
from intraslice_jax.prune.attention import AttentionPlan, even_width, plan_widths
from intraslice_jax.prune.budget import Ledger


def typical(config: ModelConfig, prune: PruneConfig) -> ModelConfig:
    """The pruned model with as many heads as the least width of a head (3/4) allows: no plan re-runs more of them.

    Raises:
        InputError: the sparsity is beyond reach.
    """
    ratios = allocate_evenly(config, prune)
    ledger = Ledger(config, ratios, prune.align, prune.max_ratio)
    shapes = []
    for i, shape in enumerate(config.layers):
        attention = _attention(shape, ratios.attention[i], prune.head_align)
        ledger.attention_done(i, attention)
        shapes.append(dataclasses.replace(attention, intermediate_size=ledger.mlp_width(i)))
    return config.with_layers(tuple(shapes))


def _attention(shape: LayerShape, ratio: float, align: int) -> LayerShape:
    full, heads = shape.v_head_dim, shape.num_attention_heads
    kept = heads * full - round(heads * full * ratio)

    def fit(count: int) -> bool:
        share = kept // count
        return share >= 0.75 * full and even_width(kept, count, full, align) <= share + 1

    count = next(filter(fit, range(heads, 1, -1)), 1)
    width = even_width(kept, count, full, align)
    # The first heads of every group: all KV heads stay while they can.
    place = [shape.query_to_kv[:h].count(kv) for h, kv in enumerate(shape.query_to_kv)]
    stay = sorted(sorted(range(heads), key=lambda h: (place[h], h))[:count])
    plan = AttentionPlan(tuple(stay), tuple(shape.query_to_kv[h] for h in stay), *plan_widths(width, shape), width)
    return plan.shape_of(shape)
