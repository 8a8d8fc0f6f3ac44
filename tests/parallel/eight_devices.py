"""What needs eight devices; `test_eight_devices.py` runs it in a process that has them."""

import contextlib
import dataclasses
import functools
import re
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax import api
from intraslice_jax.calibrate import statistics
from intraslice_jax.calibrate.gradients import group_gradients
from intraslice_jax.calibrate.statistics import GramMoments
from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.io.checkpoint import restore, save
from intraslice_jax.io.journal import Journal
from intraslice_jax.model import on_mesh
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.models.generate import generate
from intraslice_jax.parallel import moments
from intraslice_jax.parallel.linalg import cholesky_solve
from intraslice_jax.parallel.mesh import make_mesh
from intraslice_jax.parallel.placement import LocalParts, gathered, put_batch, put_parts, put_weights, replicated
from intraslice_jax.parallel.rules import weight_shardings
from intraslice_jax.prune import calibration, drift
from intraslice_jax.prune import refine as refine_module
from intraslice_jax.prune.linalg import solver_precision
from intraslice_jax.prune.mlp import fuse_mlp, select_channels
from intraslice_jax.prune.mlp_on_mesh import fuse_mlp_on_mesh
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.refine import RefineSettings, refine
from tests.prune.flavours import make, windows
from tests.tiny import write_tiny_llama

FINE = PruneConfig(sparsity=0.3, align=1)
TOLERANCE = 5e-5  # of the largest weight: sums over tokens and heads are taken in another order


def arrays_of(model):
    return {name: np.asarray(array) for name, array in decoder_to_arrays(model.decoder).items()}


def assert_near(a, b, tolerance=TOLERANCE):
    np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-30), rtol=0)


def model_of(flavour):
    return make(flavour, layers=1)


@functools.cache
def on_one_device(flavour, count):
    return prune_model(model_of(flavour), windows(count), FINE)


# Ten sequences leave two for eight devices; 4 heads, 2 or 3 KV heads and pruned widths do not divide everything.
@pytest.mark.parametrize(
    ("flavour", "mesh", "count"),
    [
        ("gqa", "data=1,model=1", 10),
        ("gqa", "data=8", 10),
        ("gqa", "data=2,model=4", 10),
        ("gqa", "data=1,model=8", 10),
        ("ragged", "data=4,model=2", 3),
    ],
)
def test_every_mesh_gives_the_weights_of_one_device(flavour, mesh, count):
    expected = on_one_device(flavour, count)
    found = prune_model(model_of(flavour), windows(count), FINE, mesh=make_mesh(mesh))
    assert found.config == expected.config
    one, many = arrays_of(expected), arrays_of(found)
    for name in one:
        assert_near(many[name], one[name])
        if name.endswith("rope_pairs"):
            np.testing.assert_array_equal(many[name], one[name])
    for a, b in zip(found.report["layers"], expected.report["layers"], strict=True):
        assert a["kept_heads"] == b["kept_heads"]
        assert a["mlp_error"] == pytest.approx(b["mlp_error"], abs=1e-5)


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("data=2,model=4", {"loss_weight": 0.8, "dense_targets": 1.0}),
    ],
)
def test_weighted_tokens_and_dense_targets_on_a_mesh(mesh, settings):
    config = dataclasses.replace(FINE, **settings)
    expected = prune_model(model_of("biases"), windows(10), config)
    found = arrays_of(prune_model(model_of("biases"), windows(10), config, mesh=make_mesh(mesh)))
    plain = arrays_of(on_one_device("biases", 10))
    for name, array in arrays_of(expected).items():
        assert_near(found[name], array, 2 * TOLERANCE)
    assert np.abs(found["layers.0.mlp.down_proj"] - plain["layers.0.mlp.down_proj"]).max() > 1e-2


def test_dense_targets_need_the_gram_matrix_on_one_device(monkeypatch):
    monkeypatch.setattr(drift, "fits_one_device", lambda size: size < 24)
    config = dataclasses.replace(FINE, dense_targets=1.0)
    with pytest.raises(InputError, match="dense_targets needs the Gram matrix of 24 channels"):
        prune_model(model_of("gqa"), windows(10), config, mesh=make_mesh("data=2,model=4"))


def test_a_model_learned_further_on_a_mesh():
    """Split over `model` the steps are those of one device; `data=2` takes two windows at once."""
    model, tokens, settings = make("gqa"), windows(24), RefineSettings(passes=1, learning_rate=1e-3)
    pruned = prune_model(model, tokens, FINE)
    expected = refine(model, pruned.decoder, tokens, settings)
    assert expected.notes["accepted"]
    for name in ("data=1,model=8", "data=2,model=4"):
        mesh = make_mesh(name)
        dense, small = on_mesh(model, mesh), on_mesh(pruned, mesh)
        found = refine(dense, small.decoder, tokens, settings)
        assert found.notes["accepted"]
        arrays, before = decoder_to_arrays(found.decoder), decoder_to_arrays(small.decoder)
        assert all(array.sharding.is_equivalent_to(before[path].sharding, array.ndim) for path, array in arrays.items())
        if name.startswith("data=1"):
            np.testing.assert_allclose(found.notes["losses"], expected.notes["losses"], rtol=1e-3)
            for path, array in decoder_to_arrays(expected.decoder).items():
                one, many = np.asarray(array), np.asarray(arrays[path])
                # Where a gradient is about 0 its sign, which Adam follows, is a matter of rounding.
                assert np.mean(np.abs(many - one) > 1e-3 * np.abs(one).max()) < 0.02, path


def collectives(compiled, devices_per_row):
    """Collective operations of a program, and those of them that cross from one row of devices to another."""
    found = re.findall(r"= [^=]* (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(.*", compiled.as_text())
    lines = [
        line
        for line in compiled.as_text().splitlines()
        if re.search(r" (all-\w+|reduce-scatter|collective-\w+)(-start)?\(", line)
    ]
    crossing = [line for line in lines if not _within_rows(line, devices_per_row)]
    return found, crossing


def _within_rows(line, devices_per_row):
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        ends = [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},")]
        return all(a // devices_per_row == b // devices_per_row for a, b in ends)
    groups = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[8\]($|[, ])", line)
    return bool(groups) and int(groups[2]) == devices_per_row


@pytest.mark.parametrize("spec", ["data=8", "data=2,model=4"])
def test_moments_are_reduced_once_per_module(spec):
    mesh, model = make_mesh(spec), model_of("mha")
    shape, placed = model.config.layers[0], on_mesh(model, mesh)
    block = gathered(placed.decoder.layers[0])
    x = placed.decoder.embed(put_batch(windows(8), mesh))
    rope = replicated(placed.decoder.rope_for(32), mesh)
    inner = shape.intermediate_size
    total = moments.MomentSum(GramMoments(jnp.zeros((inner, inner)), jnp.zeros(inner)), mesh)
    step = moments.add_on_mesh.lower(
        statistics.attend_and_add_mlp, mesh, 1, (), True, total._moments, None, (block, x, rope)
    )
    every, crossing = collectives(step.compile(), mesh.shape["model"])
    assert not crossing, crossing
    assert bool(every) == (mesh.shape["model"] > 1)  # heads and channels are gathered within a row, nothing else
    reduce = moments.reduce_over_data.lower(total._moments, mesh).compile()
    assert collectives(reduce, 8)[0].count("all-reduce") == 1


@pytest.fixture(scope="module")
def model():
    return model_of("biases")


@pytest.fixture(scope="module")
def sharded(model):
    return on_mesh(model, make_mesh("data=2,model=4"))


def test_weights_lie_in_parts(sharded):
    """Per-device bytes fall with the number of devices up to what stays whole."""
    parts = {"q_proj": 8, "o_proj": 8, "up_proj": 8, "down_proj": 8, "gate_bias": 4}
    parts |= {"k_proj": 2, "embed_tokens": 2}  # 2 KV heads and 61 tokens are not a multiple of 4
    for path, array in decoder_to_arrays(sharded.decoder).items():
        assert len(array.sharding.device_set) == 8
        held, name = array.addressable_shards[0].data.nbytes, path.rpartition(".")[2]
        if name in parts:
            assert held * parts[name] == array.nbytes, path


def test_evaluation_generation_and_gradients(model, sharded):
    tokens = windows(5)
    assert perplexity(sharded, tokens).mean_nll == pytest.approx(perplexity(model, tokens).mean_nll, rel=1e-5)
    prompts = [[1, 2, 3], [4, 5]]
    assert generate(sharded, prompts, max_new_tokens=4).tokens == generate(model, prompts, max_new_tokens=4).tokens
    pairs = zip(group_gradients(sharded, tokens, group=2), group_gradients(model, tokens, group=2), strict=True)
    for found, expected in pairs:
        for name in ("attention", "mlp", "head_gram"):
            for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
                assert_near(a, b)


def test_a_checkpoint_restores_on_another_mesh(model, sharded, tmp_path):
    save(sharded, tmp_path / "sharded")
    expected = arrays_of(model)
    for mesh in (None, make_mesh("data=8")):
        back = restore(tmp_path / "sharded", mesh)
        for name, array in decoder_to_arrays(back.decoder).items():
            assert array.sharding.device_set == (set(jax.devices()[:1]) if mesh is None else set(jax.devices()))
            np.testing.assert_array_equal(np.asarray(array), expected[name])
    save(model, tmp_path / "whole")
    for name, array in arrays_of(restore(tmp_path / "whole", make_mesh("data=2,model=4"))).items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_folder_is_loaded_onto_a_mesh_part_by_part(tmp_path, monkeypatch):
    folder = write_tiny_llama(tmp_path / "model")
    expected = arrays_of(api.load(folder))
    from intraslice_jax.convert.sources import Safetensors

    def refuse(self, name):
        raise AssertionError(f"{name} was read as a whole")

    monkeypatch.setattr(Safetensors, "read", refuse)
    found = arrays_of(api.load(folder, mesh=make_mesh("data=2,model=4")))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def positive(size, seed=0):
    a = np.random.default_rng(seed).standard_normal((size, 2 * size)).astype(np.float32)
    return a @ a.T / size + 0.1 * np.eye(size, dtype=np.float32)


@pytest.mark.parametrize(("mesh", "size", "block"), [("data=2,model=4", 37, 4), ("data=1,model=1", 12, 5)])
def test_the_blocked_solve(mesh, size, block):
    matrix, right = positive(size), np.random.default_rng(1).standard_normal((size, 5)).astype(np.float32)
    expected = np.linalg.solve(matrix.astype(np.float64), right)
    found = cholesky_solve(jnp.asarray(matrix), jnp.asarray(right), make_mesh(mesh), block)
    assert_near(np.asarray(found), expected, 1e-5)


@pytest.mark.parametrize("flavour", ["gqa", "biases"])
def test_an_mlp_folded_by_all_devices_is_that_of_one(flavour):
    mesh = make_mesh("data=2,model=4")
    arrays = decoder_to_arrays(model_of(flavour).decoder.layers[0].mlp)
    size, tokens, keep = 24, 100, 15
    gram = positive(size) * tokens
    total = np.random.default_rng(2).standard_normal(size).astype(np.float32) * tokens / 10
    with solver_precision():
        kept = select_channels(gram.astype(np.float64), np.asarray(arrays["down_proj"], np.float64), keep)
        expected = fuse_mlp(arrays, GramMoments(jnp.asarray(gram), jnp.asarray(total)), tokens, kept, 0.01)
    placed = replicated(GramMoments(gram, total), mesh)
    found = fuse_mlp_on_mesh(arrays, placed, tokens, keep, 0.01, "energy")
    np.testing.assert_array_equal(found.channels, expected.channels)
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert_near(np.asarray(found.arrays[name]), np.asarray(array), 1e-5)
    assert found.relative_error == pytest.approx(expected.relative_error, rel=1e-3)


def test_a_large_mlp_is_solved_by_all_devices(monkeypatch):
    monkeypatch.setattr(calibration, "fits_one_device", lambda size: size < 24)
    expected = on_one_device("gqa", 10)
    found = prune_model(model_of("gqa"), windows(10), FINE, mesh=make_mesh("data=2,model=4"))
    assert found.report["layers"][0]["notes"]["mlp"]["solver"] == "cholesky over the mesh, float32"
    for name, array in arrays_of(expected).items():
        assert_near(arrays_of(found)[name], array, 1e-4)


def test_a_mesh_that_does_not_divide_the_devices():
    with pytest.raises(InputError, match=r"data=3,model=2.* 6 devices.* 8 "):
        make_mesh("data=3,model=2")
    mesh = make_mesh("model=4")
    assert mesh is not None
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    assert dict(make_mesh().shape) == {"data": 8, "model": 1}  # pyright: ignore[reportOptionalMemberAccess]


def test_biases_are_added_on_the_mesh():
    config = dataclasses.replace(FINE, output_biases=True)
    found = prune_model(model_of("gqa"), windows(8), config, mesh=make_mesh("data=2,model=4"))
    bias = decoder_to_arrays(found.decoder)["layers.0.attention.o_bias"]
    assert len(bias.sharding.device_set) == 8
    assert np.abs(np.asarray(bias)).max() > 0


def test_a_run_on_a_mesh_is_continued_to_the_same_bits(tmp_path):
    mesh, model = make_mesh("data=2,model=4"), make("gqa", layers=2)
    expected = arrays_of(prune_model(model, windows(10), FINE, mesh=mesh))

    def stop(record):
        raise StopIteration

    for on_layer in (stop, None):
        with closing(Journal(tmp_path / "journal")) as journal:
            journal.begin({})
            assert journal.layers_done == (on_layer is None)
            try:
                found = arrays_of(prune_model(model, windows(10), FINE, on_layer, mesh=mesh, run_log=journal))
            except StopIteration:
                continue
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


def test_a_refinement_that_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(refine_module, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(refine_module, "WRITING", 1e-9)  # the first state is kept, and no other
    mesh, tokens = make_mesh("data=4,model=2"), windows(16)
    model, settings = on_mesh(make("gqa"), mesh), RefineSettings(passes=2, learning_rate=0.01)
    pruned = prune_model(model, tokens, FINE).decoder
    expected = refine(model, pruned, tokens, settings)
    told = []

    def stop(done, _):
        told.append(done)
        if len(told) == 3:  # of eight steps
            raise StopIteration

    for _ in range(2):
        with closing(Journal(tmp_path / "journal")) as journal:
            journal.begin({})
            with contextlib.suppress(StopIteration):
                found = refine(model, pruned, tokens, settings, stop, journal)
    assert told[3] == told[1]
    assert found.notes == expected.notes
    for name, array in decoder_to_arrays(expected.decoder).items():
        assert np.asarray(decoder_to_arrays(found.decoder)[name]).tobytes() == np.asarray(array).tobytes(), name


def test_what_a_process_holds_of_stored_arrays():
    mesh = make_mesh("data=4,model=2")
    stored = {"q_proj": np.arange(8 * 4 * 2.0).reshape(8, 4, 2), "weight": np.arange(8.0)}
    shapes = {name: array.shape for name, array in stored.items()}
    shardings = weight_shardings(shapes, mesh)
    for parts in (LocalParts.read(stored, shapes, shardings), LocalParts.of(put_weights(stored, mesh))):
        for name, sharding in shardings.items():
            np.testing.assert_array_equal(put_parts(parts, name, shapes[name], sharding), stored[name])
        np.testing.assert_array_equal(parts["weight"], stored["weight"])
        with pytest.raises(InputError, match="q_proj: this process holds the parts of its own devices"):
            parts["q_proj"]


def test_layers_streamed_to_a_mesh(tmp_path):
    mesh, folder = make_mesh("data=4,model=2"), write_tiny_llama(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(0, 258, (8, 32), dtype=np.int32)
    here, there = (prune_model(api.load(folder, mesh=mesh, residency=r), tokens, FINE) for r in ("device", "disk"))
    for name, array in arrays_of(here).items():
        assert there.decoder.arrays[name].tobytes() == array.tobytes(), name
