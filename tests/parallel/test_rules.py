import logging

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.parallel.batches import even_batches
from intraslice_jax.parallel.linalg import fits_one_device, padded_size
from intraslice_jax.parallel.mesh import make_mesh, parse_mesh
from intraslice_jax.parallel.rules import LOGICAL_AXES, RULES, Dropped, describe, partition, weight_shardings
from tests.prune.flavours import FLAVOURS, make


@pytest.mark.parametrize(
    ("text", "devices", "sizes"),
    [
        ("data=4,model=2", 8, (4, 2)),
        ("model=2, data=4", 8, (4, 2)),
        ("model=4", 8, (2, 4)),
        ("data=4", 8, (4, 1)),
        ("data=1,model=1", 8, (1, 1)),
    ],
)
def test_a_mesh_is_read(text, devices, sizes):
    assert parse_mesh(text, devices) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "takes 3 devices.* 8 "),
        ("data=16", "takes 16 devices.* 8 "),
        ("model=3", "takes 3 devices.* 8 "),
        ("data=0", "'data=0'"),
        ("data=2,data=2", "'data=2' does not"),
        ("tensor=2", "'tensor=2'.*data=D,model=M"),
        ("", "''"),
        ("8", "'8'"),
        ("data=-2", "'data=-2'"),
    ],
)
def test_a_mesh_that_is_none(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_mesh(text, 8)
    assert "\n" not in str(caught.value)


def test_one_device_needs_no_mesh():
    assert make_mesh(devices=jax.devices()[:1]) is None
    mesh = make_mesh("data=1,model=1", jax.devices()[:1])
    assert mesh is not None
    assert dict(mesh.shape) == {"data": 1, "model": 1}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_array_of_every_model_has_a_rule(flavour):
    for path, array in abstract_arrays(make(flavour).config).items():
        assert len(LOGICAL_AXES[path.rpartition(".")[2]]) == len(array.shape), path


@given(shape=st.tuples(*[st.integers(1, 40)] * 3), data=st.integers(1, 8), model=st.integers(1, 8))
def test_an_axis_is_split_exactly_where_it_divides(shape, data, model):
    sizes = {"data": data, "model": model}
    spec, dropped = partition(LOGICAL_AXES["q_proj"], shape, sizes)
    wanted = ("data" if shape[0] % data == 0 else None, "model" if shape[1] % model == 0 else None, None)
    assert tuple(spec) == wanted
    assert {(d.logical, d.size) for d in dropped} == {
        (name, size) for name, size, axis in zip(("hidden", "heads"), shape, wanted, strict=False) if axis is None
    }


def test_weights_in_use_are_whole_along_data():
    spec, _ = partition(LOGICAL_AXES["down_proj"], (16, 8), {"data": 2, "model": 4}, RULES.in_use())
    assert spec == PartitionSpec("model", None)


def test_one_line_says_what_stays_whole(caplog):
    mesh = make_mesh("data=1,model=1", jax.devices()[:1])
    with caplog.at_level(logging.WARNING):
        weight_shardings({"layers.0.attention.q_proj": (6, 3, 4)}, mesh)
    assert not caplog.records
    dropped = [Dropped("heads", 3, "model", 2)] * 2 + [Dropped("inner", 5, "model", 2)]
    assert describe(dropped) == (
        "heads of 3 in 2 arrays, not a multiple of model=2; inner of 5 in 1 arrays, not a multiple of model=2"
    )


@given(count=st.integers(1, 60), per_device=st.integers(1, 5), ways=st.integers(1, 9))
def test_batches_hold_every_sequence_once(count, per_device, ways):
    batches = list(even_batches(count, per_device, ways))
    assert np.concatenate([rows[:real] for rows, real in batches]).tolist() == list(range(count))
    for rows, real in batches:
        assert len(rows) % ways == 0
        assert 0 < real <= len(rows) <= per_device * ways or len(rows) == ways
        assert real == len(rows) or len(rows) == ways


@given(size=st.integers(1, 500), ways=st.integers(1, 16), block=st.integers(1, 64))
def test_padding_of_a_blocked_solve(size, ways, block):
    padded, width = padded_size(size, ways, block)
    assert padded >= size
    assert width <= block
    assert padded % (ways * width) == 0
    assert padded - size < ways * width


def test_the_choice_of_the_solve():
    assert fits_one_device(8192, memory=80 * 2**30)
    assert not fits_one_device(53248, memory=80 * 2**30)
