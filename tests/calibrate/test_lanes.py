"""Two batches at once: order, threads, settings, errors, and the same results as one after the other."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.calibrate import lanes
from intraslice_jax.calibrate.gradients import group_gradients
from intraslice_jax.calibrate.lanes import in_lanes
from intraslice_jax.config import PruneConfig
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.models.streamed import StreamedDecoder, StreamedLayers
from intraslice_jax.parallel.mesh import make_mesh
from intraslice_jax.prune.pipeline import prune_model
from tests.prune.flavours import make

WINDOWS = np.random.default_rng(0).integers(0, 32, (6, 24)).astype(np.int32)


def one_after_the_other(monkeypatch):
    monkeypatch.setattr(lanes, "one_cpu", lambda: False)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_are_in_order_and_each_lane_has_its_own_thread(count):
    seen = {}

    def work(i):
        seen.setdefault(i % 2, []).append((i, threading.get_ident()))
        return i * i

    assert in_lanes(work, range(count), None) == [i * i for i in range(count)]
    for found in seen.values():
        assert [i for i, _ in found] == sorted(i for i, _ in found)
        assert len({thread for _, thread in found}) == 1
    if count > 1:
        assert threading.get_ident() not in {thread for found in seen.values() for _, thread in found}


def test_lanes_run_at_the_same_time():
    meet = threading.Barrier(2, timeout=20)
    assert len(in_lanes(lambda _: meet.wait(), range(2), None)) == 2


def test_a_mesh_has_one_lane():
    threads = in_lanes(lambda _: threading.get_ident(), range(3), make_mesh("data=1"))
    assert set(threads) == {threading.get_ident()}


@pytest.mark.parametrize("float64", [False, True])
def test_settings_of_the_thread_hold_in_the_lanes(float64):
    with jax.enable_x64(float64):
        found = in_lanes(lambda i: jnp.asarray(np.full(2, i, np.float64)).dtype, range(2), None)
    assert set(found) == {np.dtype("float64" if float64 else "float32")}


def test_an_error_reaches_the_caller():
    def work(i):
        if i == 3:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        in_lanes(work, range(5), None)


def test_gradients_are_those_of_one_lane(monkeypatch):
    model = make("gqa")
    both = list(group_gradients(model, WINDOWS, group=3, matrices=True, batch_size=4))
    one_after_the_other(monkeypatch)
    for ours, plain in zip(both, group_gradients(model, WINDOWS, group=3, matrices=True, batch_size=4), strict=True):
        assert ours.sequences == plain.sequences
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            (ours.attention, ours.mlp, ours.matrices, ours.head_gram, ours.loss),
            (plain.attention, plain.mlp, plain.matrices, plain.head_gram, plain.loss),
        )


def test_gradients_fetch_a_streamed_layer_once_for_both_lanes(monkeypatch):
    model = make("gqa", layers=4)
    streamed = dataclasses.replace(model, decoder=StreamedDecoder(model.config, decoder_to_arrays(model.decoder)))
    fetched, fetch = [], StreamedLayers._fetch
    monkeypatch.setattr(StreamedLayers, "_fetch", lambda self, index: fetched.append(index) or fetch(self, index))
    (ours,) = group_gradients(streamed, WINDOWS[:4], group=4, batch_size=4)
    assert sorted(fetched) == [0, 0, 1, 1, 2, 2, 3, 3]  # forward and backward
    (plain,) = group_gradients(model, WINDOWS[:4], group=4, batch_size=4)
    jax.tree.map(np.testing.assert_array_equal, ours.mlp, plain.mlp)


@pytest.mark.parametrize("changes", [{}, {"batch_size": 2}, {"memory_budget": 1}, {"dense_targets": 0.5}])
def test_pruned_weights_are_those_of_one_lane(monkeypatch, changes):
    model, config = make("gqa"), PruneConfig(sparsity=0.3, **changes)
    ours, again = (prune_model(model, WINDOWS, config) for _ in range(2))
    one_after_the_other(monkeypatch)
    plain = prune_model(model, WINDOWS, config)
    assert ours.config == plain.config
    for path, array in decoder_to_arrays(ours.decoder).items():
        np.testing.assert_array_equal(array, decoder_to_arrays(again.decoder)[path])
        np.testing.assert_allclose(array, decoder_to_arrays(plain.decoder)[path], rtol=2e-3, atol=2e-4)
