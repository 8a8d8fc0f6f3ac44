"""The layout uniform: one shape for all layers, found from the unpruned model."""

import dataclasses

import numpy as np
import pytest

from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.convert.stock import common_pairs as kept_pairs
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune.attention import HeadEnergies
from intraslice_jax.prune.budget import LayerRatios
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.uniform import (
    best_groups,
    check_uniform_layout,
    common_heads,
    common_mlp_width,
    common_pairs,
)
from tests.prune.flavours import make, windows

SHAPE = LayerShape((0, 0, 0, 1, 1, 1, 2, 2, 2), 8, 8, 8, 96)
CONFIG = ModelConfig("llama", 50, 36, 8, 8, (SHAPE,) * 3)


class Energies(HeadEnergies):
    """Heads with drawn energies and spectra."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.total = rng.uniform(1, 5, 9)
        spectra = np.sort(rng.exponential(size=(9, 8)), 1)[:, ::-1]
        self.cumulative = np.concatenate([np.zeros((9, 1)), np.cumsum(spectra / spectra.sum(1, keepdims=True), 1)], 1)

    def of(self, heads, width):
        return self.total[heads] * self.cumulative[heads, width]


def test_all_layers_get_one_shape_and_the_same_pairs():
    model = make("gqa")
    pruned = prune_model(model, windows(), PruneConfig(0.3, align=1, layout="uniform"))
    assert pruned.config.distinct_shapes() == 1
    shape = pruned.config.layers[0]
    assert shape.num_key_value_groups is not None
    assert shape.qk_head_dim == shape.v_head_dim == shape.rotary_dim
    assert not model.config.hidden_size % shape.num_attention_heads
    assert kept_pairs(pruned.config, decoder_to_arrays(pruned.decoder)) is not None
    assert pruned.report["removed_block_fraction"] == pytest.approx(0.3, abs=0.01)
    errors = [record["attention_error"] for record in pruned.report["layers"]]
    assert all(0 < error < 1 for error in errors)


def test_groups_are_the_best_of_each_layer():
    energies = Energies(0)
    heads = best_groups(energies, SHAPE.query_to_kv, 2, 2)
    to_kv = np.asarray(SHAPE.query_to_kv)[heads]
    assert [list(to_kv).count(kv) for kv in sorted(set(to_kv))] == [2, 2]
    best = {kv: np.sort(energies.total[np.asarray(SHAPE.query_to_kv) == kv])[-2:].sum() for kv in range(3)}
    assert set(to_kv) == set(sorted(best, key=best.get)[-2:])


def test_numbers_of_heads_carry_the_most_energy_and_divide_the_hidden_size():
    energies = [Energies(seed) for seed in range(3)]
    kv_heads, group_size, width = common_heads(energies, SHAPE, 48, 36)
    rated = {}
    for n in range(1, 4):
        for m in range(1, 4):
            wide = min(48 // (n * m), 8)
            if wide >= 4 and (36 % (n * m) == 0 or n * m == 9):
                rated[n, m] = sum(e.of(best_groups(e, SHAPE.query_to_kv, n, m), wide).sum() for e in energies)
    assert (kv_heads, group_size) == max(rated, key=rated.get)
    assert width in {2 * round(48 / (kv_heads * group_size) / 2), 8}
    # 36 is no multiple of 9 x 3 / ... = 8 heads, which have room for all their channels in 64.
    assert 36 % np.prod(common_heads(energies, SHAPE, 64, 36)[:2]) == 0


def test_pairs_by_their_share_of_each_layer():
    first, second = np.zeros((2, 8)), np.zeros((1, 8))
    first[:, 1], first[:, 6] = 1000, 3000  # pairs 1 and 2 of four: 1/4 and 3/4 of this layer
    second[:, 3], second[:, 4] = 6, 4  # pairs 3 and 0: 3/5 and 2/5 of that one
    assert common_pairs([first, second], 8, 2) == (2, 3)
    assert common_pairs([first, second], 8, 3) == (0, 2, 3)


def test_mlp_width_meets_the_request():
    attention = dataclasses.replace(SHAPE, query_to_kv=(0, 1), qk_head_dim=6, v_head_dim=6, rotary_dim=6)
    width = common_mlp_width(CONFIG, 0.4, attention, PruneConfig(align=4))
    layers = (dataclasses.replace(attention, intermediate_size=width),) * 3
    removed = 1 - CONFIG.with_layers(layers).block_parameters() / CONFIG.block_parameters()
    assert width % 4 == 0
    assert removed == pytest.approx(0.4, abs=0.5 * 4 * 3 * 36 * 3 / CONFIG.block_parameters())
    with pytest.raises(InputError, match=r"layout uniform: .* too many were removed; ask for more"):
        common_mlp_width(CONFIG, 0.01, attention, PruneConfig())


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        ({"method": "flap"}, CONFIG.layers, "a plan of method intraslice, found method flap"),
        ({"ratios": "fisher"}, CONFIG.layers, "found ratios 'fisher'; use ratios uniform"),
        ({}, (SHAPE, dataclasses.replace(SHAPE, intermediate_size=8), SHAPE), "this one was pruned before"),
    ],
)
def test_contradictions(settings, layers, message):
    spread = (0.3, 0.2, 0.1) if "ratios" in settings else (0.2, 0.2, 0.2)
    with pytest.raises(InputError, match=message):
        check_uniform_layout(
            CONFIG.with_layers(layers), LayerRatios(spread, (0.2,) * 3), PruneConfig(layout="uniform", **settings)
        )
