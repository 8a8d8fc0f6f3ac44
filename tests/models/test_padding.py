import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.config import PruneConfig
from intraslice_jax.evaluate.samples import in_shapes_of
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune.budget import HeadWidths, LayerRatios
from intraslice_jax.prune.pipeline import prune_model
from tests.prune.flavours import make, windows


@pytest.mark.parametrize("flavour", ["ragged", "partial", "phi"])
def test_a_padded_model_computes_the_same(flavour):
    dense = make(flavour)
    pruned = prune_model(dense, windows(6), PruneConfig(0.4, align=2, iterative="never"))
    padded = in_shapes_of(dense, pruned)
    shapes = [{n: a.shape for n, a in decoder_to_arrays(m.decoder).items()} for m in (padded, dense)]
    assert shapes[0] == shapes[1]
    assert padded.config.layers == dense.config.layers
    tokens = jnp.asarray(windows(2, 9))
    np.testing.assert_allclose(padded.decoder(tokens), pruned.decoder(tokens), rtol=0, atol=2e-5)


def test_pruning_to_widths_gives_these_widths():
    dense = make("gqa", layers=3)
    heads = (HeadWidths(4, 6, 8), HeadWidths(3, 8, 4), HeadWidths(1, 4, 6))
    config = dataclasses.replace(PruneConfig(0.3, align=2), iterative="never")
    pruned = prune_model(dense, windows(6), config, ratios=LayerRatios((0.1, 0.2, 0.5), (0.2, 0.3, 0.4), heads))
    found = [HeadWidths(s.num_attention_heads, s.qk_head_dim, s.v_head_dim) for s in pruned.config.layers]
    assert tuple(found) == heads
