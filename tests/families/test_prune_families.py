"""Every family and option pruned as a user does it: loaded, pruned, exported, run by PyTorch, loaded again."""

import dataclasses

import numpy as np
import pytest

from intraslice_jax.config import PruneConfig
from intraslice_jax.convert import export, load
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.models.generate import generate
from intraslice_jax.prune.pipeline import prune_model
from tests.convert.checkpoints import CASES, build, save, tokens
from tests.convert.exported import greedy, in_torch, our_logits, quiet_torch, torch_logits

# `dynamic` and `longrope` switch at 16 tokens: prompts are shorter, texts longer, calibration of `longrope` as well.
SHORT, LONG, NEW = 6, 24, 14
SPARSITY = 0.3
# Cases of `tests/convert` that differ from a neighbour by a number in its configuration alone.
ALIKE = ("gelu", "theta", "linear", "mscale", "attention", "full", "layer-types", "interval", "factors")


@pytest.fixture(scope="module", autouse=True)
def _quiet(tmp_path_factory):
    with quiet_torch(tmp_path_factory.mktemp("modules")):
        yield


def pruned(case, folder, **options):
    """A tiny checkpoint of PyTorch, loaded and pruned; it has no stop tokens, so that all texts are equally long."""
    model = load(save(build(case), folder))
    model = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_token_id=()), generation_config={"pad_token_id": 0}
    )
    windows = tokens(min(LONG, model.config.max_position_embeddings), rows=4)
    return model, prune_model(model, windows, PruneConfig(SPARSITY, align=2, **options))


def step(config):
    """The largest share of the block parameters that one choice of the pruning moves: two channels of all heads."""
    narrower = [
        dataclasses.replace(s, qk_head_dim=s.qk_head_dim - 2, v_head_dim=s.v_head_dim - 2, rotary_dim=0)
        for s in config.layers
    ]
    pairs = zip(config.layers, narrower, strict=True)
    most = max(config.attention_parameters(wide) - config.attention_parameters(narrow) for wide, narrow in pairs)
    return most / config.block_parameters()


def assert_same(model, want):
    assert model.config == want.config
    arrays, expected = decoder_to_arrays(model.decoder), decoder_to_arrays(want.decoder)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name], name)


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith(ALIKE)])
def test_pruned_export_is_the_same_model_in_torch(case, tmp_path):
    dense, model = pruned(case, tmp_path / "dense")
    removed = 1 - model.config.block_parameters() / dense.config.block_parameters()
    assert removed == model.report["removed_block_fraction"]
    assert abs(removed - SPARSITY) <= max(0.005, step(dense.config) / 2)
    held = sum(a.size for name, a in decoder_to_arrays(model.decoder).items() if not name.endswith("rope_pairs"))
    assert held == model.config.total_parameters()

    folder = export(model, tmp_path / "out")
    exported = in_torch(folder)
    for length in (LONG, SHORT):
        ids = tokens(length)
        wanted = our_logits(model.decoder, ids)
        np.testing.assert_allclose(torch_logits(exported, ids), wanted, rtol=0, atol=1e-4)

    prompt = tokens(SHORT)
    ours = generate(model, prompt.tolist(), NEW).tokens
    np.testing.assert_array_equal(greedy(exported, prompt, NEW)[:, SHORT:], ours)

    assert_same(load(folder), model)
