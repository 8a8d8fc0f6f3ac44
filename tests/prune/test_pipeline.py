import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from intraslice_jax.calibrate import statistics
from intraslice_jax.config import LayerShape, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io.checkpoint import restore, save
from intraslice_jax.models.decoder import decoder_to_arrays, run_block
from intraslice_jax.prune.pipeline import prune_model
from tests.prune import reference
from tests.prune.flavours import FLAVOURS, VOCAB, make, windows, with_arrays

FINE = PruneConfig(sparsity=0.3, align=1)


def logits(model, tokens):
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.decoder(jnp.asarray(tokens)))


def arrays_of(model):
    return {name: np.asarray(array) for name, array in decoder_to_arrays(model.decoder).items()}


@functools.cache
def pruned_once(flavour):
    return prune_model(make(flavour), windows(), FINE)


def assert_equals_projections(model, pruned, tokens, config):
    """The pruned model is the dense one with explicit projections in its full-size layers."""
    expected = reference.Model(model.config, arrays_of(model))
    expected.prune(tokens, config.sparsity, [s.intermediate_size for s in pruned.config.layers], config.damping)
    for record, projections in zip(pruned.report["layers"], expected.projections, strict=True):
        assert list(record["kept_heads"]) == projections.heads
    unseen = windows(3, 40, seed=9)
    wanted = expected.logits(unseen)
    np.testing.assert_allclose(logits(pruned, unseen), wanted, atol=1e-4 * np.abs(wanted).max())
    dense = logits(model, unseen)
    assert np.abs(wanted - dense).max() > 0.05 * np.abs(dense).max()


@pytest.mark.parametrize("flavour", ["mha", "gqa", "ragged", "biases", "phi", "partial"])
def test_the_pruned_model_equals_projections_in_the_full_size_model(flavour):
    pruned = pruned_once(flavour)
    assert_equals_projections(make(flavour), pruned, windows(), FINE)
    assert pruned.report["removed_block_fraction"] == pytest.approx(0.3, abs=0.02)


def test_the_dense_model_stays_as_it_was():
    model = make("phi")
    prune_model(model, windows(), FINE)
    for name, array in arrays_of(make("phi")).items():
        np.testing.assert_array_equal(arrays_of(model)[name], array)


def test_a_pruned_model_is_pruned_again():
    once, tokens = pruned_once("gqa"), windows()
    twice = prune_model(once, tokens, FINE)
    assert_equals_projections(once, twice, tokens, FINE)
    dense = make("gqa").config.block_parameters()
    assert twice.config.block_parameters() == pytest.approx(0.49 * dense, rel=0.05)
    assert twice.report["block_parameters"]["dense"] == once.config.block_parameters()


@pytest.mark.parametrize("flavour", ["ragged", "phi"])
def test_sparsity_zero_returns_the_same_function(flavour):
    model, tokens = make(flavour), windows()
    same = prune_model(model, tokens, PruneConfig(sparsity=0.0))
    assert same.config == model.config
    assert same.report["removed_block_fraction"] == 0
    np.testing.assert_allclose(logits(same, tokens), logits(model, tokens), atol=1e-5)


# Layers wide enough for steps of 8 channels to be small.
WIDE = dataclasses.replace(FLAVOURS["gqa"][0][0], intermediate_size=256)


def _size(arrays):
    return sum(math.prod(a.shape) for a in arrays if a.dtype == jnp.float32)  # not the int32 RoPE pairs


@pytest.mark.parametrize("sparsity", [0.1, 0.5])
def test_the_removed_fraction_is_that_of_the_arrays_on_disk(sparsity, tmp_path):
    model = make("biases", layers=2, shape=WIDE, tie_word_embeddings=True)
    pruned = prune_model(model, windows(), PruneConfig(sparsity=sparsity))
    counts = []
    for name, each in (("dense", model), ("pruned", pruned)):
        save(each, tmp_path / name)
        stored = ocp.metadata(str(tmp_path / name / "state")).metadata
        assert "lm_head" not in stored  # tied stays tied
        weights = [a for path, a in stored.items() if ".attention." in path or ".mlp." in path]
        counts.append([_size(weights), _size(stored.values())])
    report = restore(tmp_path / "pruned").report
    assert report["removed_block_fraction"] == 1 - counts[1][0] / counts[0][0]
    assert report["removed_model_fraction"] == 1 - counts[1][1] / counts[0][1]
    assert report["removed_block_fraction"] == pytest.approx(sparsity, abs=0.01)
    assert report["block_parameters"] == {"dense": counts[0][0], "pruned": counts[1][0]}
    assert all(layer["intermediate_size"] % 8 == 0 for layer in report["layers"])
    assert np.asarray(pruned.decoder.head).shape == (VOCAB, 16)
    np.testing.assert_array_equal(arrays_of(pruned)["embed_tokens"], arrays_of(model)["embed_tokens"])


def test_the_same_run_gives_the_same_bits():
    first, second = arrays_of(pruned_once("biases")), arrays_of(prune_model(make("biases"), windows(), FINE))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_the_batch_size_does_not_matter():
    all_at_once, tokens = pruned_once("gqa"), windows()
    wanted = logits(all_at_once, tokens)
    for size in (1, 3):
        result = prune_model(make("gqa"), tokens, dataclasses.replace(FINE, batch_size=size))
        assert result.config == all_at_once.config
        np.testing.assert_allclose(logits(result, tokens), wanted, atol=2e-5 * np.abs(wanted).max())


def test_records_come_layer_by_layer_and_are_in_the_report():
    seen = []
    pruned = prune_model(make("ragged"), windows(), FINE, seen.append)
    assert [record.layer for record in seen] == [0, 1]
    report = json.loads(json.dumps(pruned.report))
    assert report["layers"] == json.loads(json.dumps([dataclasses.asdict(record) for record in seen]))
    for record, shape in zip(seen, pruned.config.layers, strict=True):
        assert len(record.kept_heads) == record.query_heads == shape.num_attention_heads
        assert record.kv_heads == shape.num_key_value_heads
        assert (record.qk_head_dim, record.v_head_dim) == (shape.qk_head_dim, shape.v_head_dim)
        assert record.intermediate_size == shape.intermediate_size
        assert 0 < record.attention_error < 1
        assert 0 < record.mlp_error < 1
    assert (report["calibration_samples"], report["calibration_sequence_length"]) == windows().shape


def test_layers_of_one_shape_are_compiled_once():
    model, tokens = make("gqa", layers=4), windows(4, 21)  # a length that no other test has
    once = (statistics.mix, statistics.add_attention, statistics.add_mlp)
    sizes = [fn._cache_size() for fn in once]
    again = [fn._cache_size() for fn in (statistics.add_kept_attention, statistics.finish_selected)]
    pruned = prune_model(model, tokens, FINE)
    assert [fn._cache_size() for fn in once] == [size + 1 for size in sizes]  # one dense shape
    kept = {(shape.num_attention_heads, shape.qk_head_dim) for shape in pruned.config.layers}
    widths = {shape.intermediate_size for shape in pruned.config.layers}
    assert statistics.add_kept_attention._cache_size() == again[0] + len(kept)
    assert statistics.finish_selected._cache_size() == again[1] + len(widths)
    assert pruned.report["distinct_layer_shapes"] == len(set(pruned.config.layers))
    before = run_block._cache_size()
    pruned.decoder.hidden_states(jnp.asarray(tokens))
    assert run_block._cache_size() == before + len(set(pruned.config.layers))


def test_bfloat16_stays_bfloat16():
    model = make("gqa", dtype=jnp.bfloat16)
    pruned = prune_model(model, windows(), FINE)
    for name, array in arrays_of(pruned).items():
        assert array.dtype == (np.int32 if name.endswith("rope_pairs") else jnp.bfloat16), name
        assert np.isfinite(array.astype(np.float32)).all()


@pytest.mark.parametrize("flavour", ["gqa", "biases"])
def test_a_constant_text(flavour):
    tokens = np.full((2, 16), 7, np.int32)
    model = make(flavour)
    pruned = prune_model(model, tokens, FINE)
    assert all(np.isfinite(array).all() for array in arrays_of(pruned).values())
    # On that text itself next to nothing is lost.
    dense = logits(model, tokens)
    np.testing.assert_allclose(logits(pruned, tokens), dense, atol=0.05 * np.abs(dense).max())


def test_dead_modules():
    model = make("mha")
    dense = arrays_of(model)
    attention = np.zeros_like(dense["layers.0.attention.v_proj"])
    mlp = np.zeros_like(dense["layers.1.mlp.down_proj"])
    model = with_arrays(model, layers__0__attention__v_proj=attention, layers__1__mlp__down_proj=mlp)
    pruned = prune_model(model, windows(), FINE)
    assert all(np.isfinite(array).all() for array in arrays_of(pruned).values())
    assert pruned.report["layers"][0]["attention_error"] == 0
    assert pruned.report["layers"][1]["mlp_error"] == 0


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("layers.1.attention.q_proj", 1, "attention"),
        ("layers.1.attention.v_proj", 1, "attention"),
        ("layers.1.attention.o_proj", 1, "attention"),
        ("layers.0.input_norm.weight", 0, "attention"),
        ("layers.0.attention.o_proj", 0, "attention"),
        ("layers.0.post_norm.weight", 0, "MLP"),
        ("layers.1.mlp.up_proj", 1, "MLP"),
        ("layers.0.mlp.down_proj", 0, "MLP"),
        ("layers.1.mlp.down_proj", 1, "MLP"),
    ],
)
def test_a_weight_that_is_no_number_is_named(name, layer, module):
    model = make("gqa")
    array = arrays_of(model)[name].copy()
    array.flat[3] = np.inf if module == "MLP" else np.nan
    model = with_arrays(model, **{name.replace(".", "__"): array})
    with pytest.raises((InputError, RunError)) as caught:
        prune_model(model, windows(), FINE)
    message = str(caught.value)
    assert "\n" not in message
    assert f"layer {layer}, {module}" in message or name in message


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (windows(2, 257), "257 .*context of 256"),
        (np.full((2, 8), VOCAB, np.int32), f"token {VOCAB},.*{VOCAB}"),
        (np.full((2, 8), -1, np.int32), f"token -1,.*{VOCAB}"),
        (np.zeros((0, 8), np.int32), "found 0 of 8"),
        (np.zeros((3, 1), np.int32), "found 3 of 1"),
    ],
)
def test_windows_that_do_not_fit(tokens, message):
    with pytest.raises(InputError, match=message):
        prune_model(make("gqa"), tokens, FINE)


def test_a_sparsity_that_no_widths_can_meet():
    narrow = LayerShape((0,), 8, 8, 8, 8)
    model = make("gqa", layers=2, shape=narrow)
    with pytest.raises(InputError, match=r"sparsity 0.95 cannot be reached: at most 0.42"):
        prune_model(model, windows(), PruneConfig(sparsity=0.95, align=8))


@pytest.mark.parametrize("flavour", ["gqa", "biases", "phi"])
def test_what_is_kept_in_memory_changes_nothing(flavour):
    """Without room for activations every module runs again, in place of reusing what its statistics saw."""
    model, tokens = make(flavour), windows()
    kept, again = (
        prune_model(model, tokens, dataclasses.replace(FINE, memory_budget=budget, batch_size=2))
        for budget in (2**30, 1)
    )
    assert kept.config == again.config
    expected = logits(again, windows(3, 40, seed=9))
    np.testing.assert_allclose(logits(kept, windows(3, 40, seed=9)), expected, atol=1e-4 * np.abs(expected).max())
