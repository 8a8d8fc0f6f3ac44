"""Programs of layers that are done do not pile up, and layers of one shape share theirs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from intraslice_jax import programs
from intraslice_jax.config import LayerShape
from intraslice_jax.programs import MOST_SHAPES, ShapePrograms

SHAPE = LayerShape((0, 0), 8, 8, 8, 32)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(programs, "_BY_SHAPE", [])
    return programs.by_shape(jax.jit(lambda x: 2 * x))


def test_many_shapes_leave_few_programs(double):
    done, most = ShapePrograms(), 0
    for width in range(1, 4 * MOST_SHAPES):
        assert double(jnp.ones(width)).sum() == 2 * width
        done.done(SHAPE, dataclasses.replace(SHAPE, intermediate_size=width))
        most = max(most, double._cache_size())
    assert 0 < most <= MOST_SHAPES + 1


def test_layers_alike_share_their_programs(double):
    done = ShapePrograms()
    for _ in range(4 * MOST_SHAPES):
        double(jnp.ones(3))
        done.done(SHAPE, SHAPE)
        assert double._cache_size() == 1
