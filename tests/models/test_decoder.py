import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intraslice_jax.config import LayerShape, ModelConfig, RopeConfig, uniform_query_to_kv
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import (
    abstract_arrays,
    block_from_arrays,
    decoder_from_arrays,
    decoder_to_arrays,
    run_block,
)
from tests.models import reference

VOCAB = 23
DENSE = LayerShape((0, 0, 1, 1), 8, 8, 8, 20)
NARROW = LayerShape((0, 1, 1, 1), 6, 6, 3, 7)  # ragged groups, fewer pairs, V narrower than Q and K, odd MLP


def make_config(*layers: LayerShape, **changes) -> ModelConfig:
    return ModelConfig("llama", VOCAB, 12, 8, 8, layers or (DENSE, NARROW, DENSE), **changes)


def tokens_of(batch: int, seq: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (batch, seq), dtype=np.int32)


def assert_parity(config: ModelConfig, seq: int, seed: int = 0) -> None:
    arrays = reference.random_arrays(config, seed)
    tokens = tokens_of(2, seq)
    with jax.default_matmul_precision("highest"):
        found = decoder_from_arrays(config, arrays)(jnp.asarray(tokens))
    expected = reference.logits(config, arrays, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5 * np.abs(expected).max())


def layer_shape(groups: list[int], rotary: int, rest: int, v: int, inner: int, window: int | None) -> LayerShape:
    query_to_kv = tuple(kv for kv, size in enumerate(groups) for _ in range(size))
    return LayerShape(query_to_kv, max(1, rotary + rest), rotary, v, inner, window)


LAYER = st.tuples(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from([0, 2, 4, 6]),
    st.integers(0, 3),
    st.integers(1, 7),
    st.integers(1, 13),
    st.sampled_from([None, 1, 3, 50]),
)
FLAGS = (
    "parallel_block",
    "gated_mlp",
    "tie_word_embeddings",
    "attention_bias",
    "attention_output_bias",
    "mlp_bias",
    "lm_head_bias",
)
FIELDS = st.fixed_dictionaries(
    {flag: st.booleans() for flag in FLAGS}
    | {
        "hidden_size": st.integers(3, 11),
        "norm": st.sampled_from(["rms", "layer"]),
        "hidden_act": st.sampled_from(["silu", "gelu_new"]),
    }
)


def given_config(examples: int):
    """Runs a test on drawn models. They are built outside the strategy: beartype's checks use `random`."""

    def decorate(test):
        @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
        @given(st.lists(LAYER, min_size=1, max_size=2), FIELDS)
        def run(self, layers, fields):
            shapes = tuple(layer_shape(*layer) for layer in layers)
            test(self, ModelConfig("llama", VOCAB, head_dim=8, rotary_dim=6, layers=shapes, **fields))

        return run

    return decorate


class TestParity:
    @given_config(12)
    def test_any_shape_equals_the_reference(self, config):
        assert_parity(config, seq=7)

    @pytest.mark.parametrize("window", [None, 20, 200])
    def test_queries_taken_in_several_chunks(self, window):
        config = make_config(dataclasses.replace(NARROW, sliding_window=window))
        assert_parity(config, 150)

    def test_the_phi_flavour(self):
        shape = LayerShape((0, 1, 2), 8, 4, 8, 20)
        config = make_config(
            shape,
            shape,
            norm="layer",
            parallel_block=True,
            gated_mlp=False,
            hidden_act="gelu_new",
            attention_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
            lm_head_bias=True,
        )
        assert_parity(dataclasses.replace(config, rotary_dim=4), 12)

    def test_bfloat16_keeps_its_dtype_and_stays_near(self):
        config = make_config()
        arrays = reference.random_arrays(config)
        half = {p: jnp.asarray(a, None if p.endswith("pairs") else jnp.bfloat16) for p, a in arrays.items()}
        decoder = decoder_from_arrays(config, half)
        tokens = tokens_of(1, 10)
        assert decoder.hidden_states(jnp.asarray(tokens)).dtype == jnp.bfloat16
        expected = reference.logits(config, arrays, tokens)
        found = np.asarray(decoder(jnp.asarray(tokens)))
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_block_is_traced_once_per_distinct_shape():
    config = make_config(DENSE, NARROW, DENSE, NARROW, DENSE)
    assert config.distinct_shapes() == 2
    decoder = decoder_from_arrays(config, reference.random_arrays(config))
    before = run_block._cache_size()
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (3, 17), dtype=np.int32)
        decoder.hidden_states(jnp.asarray(tokens))
    assert run_block._cache_size() - before == 2


class TestArrays:
    @given_config(25)
    def test_the_parameter_count_is_that_of_the_arrays(self, config):
        shapes = abstract_arrays(config, jnp.bfloat16)
        counted = sum(np.prod(s.shape) for p, s in shapes.items() if not p.endswith("rope_pairs"))
        assert counted == config.total_parameters()
        blocks = sum(np.prod(s.shape) for p, s in shapes.items() if ".attention." in p or ".mlp." in p)
        pairs = sum(np.prod(s.shape) for p, s in shapes.items() if p.endswith("rope_pairs"))
        assert blocks - pairs == config.block_parameters()
        assert {s.dtype for p, s in shapes.items() if not p.endswith("rope_pairs")} == {jnp.dtype(jnp.bfloat16)}

    def test_paths_are_dotted(self):
        shapes = abstract_arrays(make_config(NARROW, tie_word_embeddings=True))
        assert {path: want.shape for path, want in shapes.items()} == {
            "embed_tokens": (VOCAB, 12),
            "norm.weight": (12,),
            "layers.0.input_norm.weight": (12,),
            "layers.0.post_norm.weight": (12,),
            "layers.0.attention.q_proj": (12, 4, 6),
            "layers.0.attention.k_proj": (12, 2, 6),
            "layers.0.attention.v_proj": (12, 2, 3),
            "layers.0.attention.o_proj": (4, 3, 12),
            "layers.0.attention.rope_pairs": (2, 3),
            "layers.0.mlp.gate_proj": (12, 7),
            "layers.0.mlp.up_proj": (12, 7),
            "layers.0.mlp.down_proj": (7, 12),
        }

    @pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
    def test_round_trip(self, dtype):
        config = make_config(norm="layer", attention_bias=True, lm_head_bias=True)
        arrays = {
            path: jnp.asarray(array, None if path.endswith("pairs") else dtype)
            for path, array in reference.random_arrays(config).items()
        }
        back = decoder_to_arrays(decoder_from_arrays(config, arrays))
        assert back.keys() == arrays.keys() == abstract_arrays(config).keys()
        for path, array in arrays.items():
            assert back[path].dtype == array.dtype
            np.testing.assert_array_equal(np.asarray(back[path]), np.asarray(array))

    def test_a_block_is_a_part_of_the_decoder(self):
        config = make_config()
        arrays = reference.random_arrays(config)
        decoder = decoder_from_arrays(config, arrays)
        block = decoder.layers[1]
        part = decoder_to_arrays(block)
        for path, array in part.items():
            np.testing.assert_array_equal(np.asarray(array), arrays[f"layers.1.{path}"])
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 12)), jnp.float32)
        rope = decoder.rope_for(5)
        again = block_from_arrays(config, NARROW, part)
        np.testing.assert_array_equal(np.asarray(run_block(again, x, rope)), np.asarray(run_block(block, x, rope)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.pop("embed_tokens"), "missing embed_tokens, left over nothing"),
            (lambda a: a.update({"layers.9.extra": np.zeros(1)}), r"missing nothing, left over layers\.9\.extra"),
            (lambda a: [a.pop(p) for p in list(a) if "mlp" in p], r"missing .* and 5 more"),
            (
                lambda a: a.update({"layers.0.mlp.up_proj": np.zeros((12, 21), np.float32)}),
                r"layers\.0\.mlp\.up_proj has shape \(12, 21\), expected \(12, 20\)",
            ),
        ],
    )
    def test_arrays_that_do_not_fit(self, change, message):
        config = make_config()
        arrays = reference.random_arrays(config)
        change(arrays)
        with pytest.raises(InputError, match=message):
            decoder_from_arrays(config, arrays)


class TestConfig:
    @given_config(30)
    def test_json_round_trip(self, config):
        rope = RopeConfig(5e5, "longrope", (("factor", 8.0), ("short_factor", (1.0, 1.5))))
        config = dataclasses.replace(config, rope=rope, eos_token_id=(1, 2), source='{"a": 1}')
        text = json.dumps(config.to_json())
        assert ModelConfig.from_json(json.loads(text)) == config
        assert hash(ModelConfig.from_json(json.loads(text))) == hash(config)

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.pop("hidden_size"),
            lambda d: d.update(colour="red"),
            lambda d: d.update(layers=[{"query_to_kv": [0]}]),
            lambda d: d.update(layers=7),
            lambda d: d.update(layers=[]),
            lambda d: d.update(hidden_size=10**400),
            lambda d: d.update(norm_eps=float("nan")),
            lambda d: d.update(vocab_size="96"),
            lambda d: d["rope"].update(parameters=[["factor", None]]),
        ],
    )
    def test_malformed_json(self, change):
        data = make_config().to_json()
        change(data)
        with pytest.raises(InputError, match="not a model configuration of this program"):
            ModelConfig.from_json(data)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"query_to_kv": ()}, "count up from 0"),
            ({"query_to_kv": (0, 2)}, "count up from 0"),
            ({"query_to_kv": (1, 0)}, "count up from 0"),
            ({"rotary_dim": 3}, "not an even number up to 8"),
            ({"rotary_dim": 10}, "not an even number up to 8"),
            ({"v_head_dim": 0}, "width below 1"),
            ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ],
    )
    def test_impossible_layers(self, shape, message):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(DENSE, **shape)

    def test_groups(self):
        assert uniform_query_to_kv(6, 2) == (0, 0, 0, 1, 1, 1)
        with pytest.raises(InputError, match=r"6.*multiple of.*4"):
            uniform_query_to_kv(6, 4)
        assert (NARROW.group_sizes, NARROW.num_key_value_groups) == ((1, 3), None)
        assert (DENSE.group_sizes, DENSE.num_key_value_groups) == ((2, 2), 2)
