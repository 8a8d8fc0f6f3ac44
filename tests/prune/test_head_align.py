"""Widths of heads in multiples of `head_align`."""

import numpy as np
import pytest

from intraslice_jax.config import LayerShape, PruneConfig, uniform_query_to_kv
from intraslice_jax.errors import InputError
from intraslice_jax.planning.typical import typical
from intraslice_jax.prune.allocation import allocate
from intraslice_jax.prune.budget import TOLERANCE
from intraslice_jax.prune.heads import plan_aligned_heads
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.uniform import common_heads
from tests.prune.flavours import make, windows
from tests.prune.test_allocation import model_of, prune_shapes, random_energies, random_scores

TO_KV = uniform_query_to_kv(9, 3)


@pytest.mark.parametrize("budget", [64, 200, 403, 450, 500, 576])
@pytest.mark.parametrize("align", [4, 16, 64, 128])
def test_the_width_is_a_multiple_and_the_heads_come_nearest_to_the_budget(budget, align):
    energies = random_energies(9, 64, np.random.default_rng(budget + align))
    heads, width = plan_aligned_heads(energies, budget, TO_KV, "ragged", align)
    assert width == 64 or width % align == 0
    assert width >= 48
    assert abs(len(heads) * width - budget) <= width / 2 or len(heads) in (1, 9)
    assert set(heads) == set(np.argsort(-energies.total)[: len(heads)])


def test_the_width_is_the_one_that_carries_the_most():
    energies = random_energies(9, 64, np.random.default_rng(1))

    def carried(width: int, budget: int) -> float:
        """Of the best heads, the last one in part."""
        each = np.sort(energies.total)[::-1] * energies.cumulative[np.argsort(-energies.total), width]
        whole = min(budget // width, 9)
        part = 0.0 if whole == 9 else (budget / width - whole) * each[whole]
        return float(each[:whole].sum() + part)

    # A flat spectrum makes narrow heads dear; one that ends early makes them free.
    flat, short = np.full(64, 1 / 64), np.r_[np.full(48, 1 / 48), np.zeros(16)]
    for shares, expected in ((flat, 64), (short, 48)):
        energies.cumulative = np.tile(np.r_[0.0, np.cumsum(shares)], (9, 1))
        width = plan_aligned_heads(energies, 432, TO_KV, "ragged", 16)[1]
        assert width == max((48, 64), key=lambda w: carried(w, 432)) == expected


def test_one_head_may_be_narrower():
    energies = random_energies(9, 64, np.random.default_rng(2))
    assert plan_aligned_heads(energies, 16, TO_KV, "ragged", 16)[1] == 16


def test_grouped_heads_are_equally_many():
    energies = random_energies(9, 64, np.random.default_rng(3))
    heads, width = plan_aligned_heads(energies, 400, TO_KV, "uniform", 64)
    counts = np.bincount(np.asarray(TO_KV)[heads], minlength=3)
    assert (width, len(heads), len(set(counts[counts > 0]))) == (64, 6, 1)


@pytest.mark.parametrize("choices", [{}, {"grouping": "uniform"}, {"layout": "uniform"}, {"ratios": "fisher_pca"}])
def test_whole_heads_leave_and_the_rest_keeps_its_width(choices):
    model = make("gqa")
    head = model.config.layers[0].v_head_dim
    pruned = prune_model(model, windows(), PruneConfig(0.3, align=1, head_align=128, **choices))
    assert {(shape.qk_head_dim, shape.v_head_dim) for shape in pruned.config.layers} == {(head, head)}
    assert sum(shape.num_attention_heads for shape in pruned.config.layers) < sum(
        shape.num_attention_heads for shape in model.config.layers
    )
    assert pruned.report["removed_block_fraction"] == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("grouping", ["ragged", "uniform"])
@pytest.mark.parametrize("align", [16, 64])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
def test_the_request_is_met_all_the_same(sparsity, align, grouping):
    rng = np.random.default_rng(align)
    config = model_of(layers=6, kv=3, group=3, width=64, inner=1536, hidden=576)
    prune = PruneConfig(sparsity, head_align=align, grouping=grouping)
    pruned = prune_shapes(config, allocate(config, random_scores(config, rng), prune), prune, rng)
    removed = 1 - pruned.block_parameters() / config.block_parameters()
    assert removed == pytest.approx(sparsity, abs=TOLERANCE)
    assert all(shape.v_head_dim % align == 0 for shape in pruned.layers)


def test_a_common_layout_has_no_more_channels_than_it_may():
    energies = [random_energies(9, 64, np.random.default_rng(seed)) for seed in range(3)]
    shape = LayerShape(TO_KV, 64, 64, 64, 1536)
    for align in (16, 64):
        kv_heads, group_size, width = common_heads(energies, shape, 403, 576, align)
        assert width % align == 0
        assert kv_heads * group_size * width <= 403
    assert kv_heads * group_size == 6


@pytest.mark.parametrize(("align", "heads", "width"), [(2, 8, 50), (16, 8, 48), (64, 6, 64)])
def test_what_a_plan_expects(align, heads, width):
    config = model_of(layers=2, kv=3, group=3, width=64, inner=1536, hidden=576)
    shape = typical(config, PruneConfig(0.3, head_align=align)).layers[0]
    assert (shape.num_attention_heads, shape.v_head_dim) == (heads, width)


@pytest.mark.parametrize("align", [0, 1, 7])
def test_an_odd_alignment_is_refused(align):
    with pytest.raises(InputError, match=f"head_align must be even and at least 2, found {align}"):
        PruneConfig(head_align=align)
