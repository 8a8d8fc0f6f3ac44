import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import decoders
from transformers import AutoTokenizer

from intraslice_jax.config import LayerShape, ModelConfig, RopeConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.model import LanguageModel
from intraslice_jax.models import cache
from intraslice_jax.models.cache import decode, prefill
from intraslice_jax.models.decoder import decoder_from_arrays, run_block
from intraslice_jax.models.generate import bucket, generate
from intraslice_jax.models.sampling import Sampling
from tests.models import reference
from tests.tiny import write_tokenizer

VOCAB = 258
DENSE = LayerShape((0, 0, 1, 1), 8, 8, 8, 20)
NARROW = LayerShape((0, 0, 1, 1), 6, 6, 3, 8)
RAGGED = LayerShape((0, 1, 1, 1, 2, 2), 4, 4, 5, 7)
PHI = {
    "norm": "layer",
    "parallel_block": True,
    "gated_mlp": False,
    "hidden_act": "gelu_new",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
}
KINDS = {
    "dense": ((DENSE, DENSE), {}),
    "narrow": ((NARROW, DENSE), {"tie_word_embeddings": True}),
    "ragged": ((RAGGED, NARROW, RAGGED), {}),
    "phi": ((dataclasses.replace(RAGGED, rotary_dim=2),), PHI),
    "window": (tuple(dataclasses.replace(s, sliding_window=5) for s in (DENSE, RAGGED)), {}),
}


def make(kind="dense", **changes) -> LanguageModel:
    layers, flavour = KINDS[kind]
    config = ModelConfig("llama", VOCAB, 12, 8, 8, layers, **{"max_position_embeddings": 64, **flavour, **changes})
    return LanguageModel(config, decoder_from_arrays(config, reference.random_arrays(config)), None, "tiny")


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCAB, length).tolist()


def full_logits(model: LanguageModel, row: list[int]) -> np.ndarray:
    """The last logits of a forward without a cache, filled up behind its end so that it compiles once."""
    decoder = model.decoder
    tokens = jnp.asarray([row + [5] * (32 - len(row))], jnp.int32)
    with jax.default_matmul_precision("highest"):
        x, rope = decoder.embed(tokens), decoder.rope(jnp.arange(32, dtype=jnp.int32)[None], len(row))
        for block in decoder.layers:
            x = run_block(block, x, rope)
        return np.asarray(decoder.logits(decoder.norm(x)))[0, len(row) - 1]


def greedy(model: LanguageModel, row: list[int], count: int) -> list[int]:
    """Greedy continuation without a cache."""
    row = list(row)
    for _ in range(count):
        row.append(int(full_logits(model, row).argmax()))
    return row[-count:]


class TestCache:
    @pytest.mark.parametrize("kind", KINDS)
    def test_ragged_rows_equal_full_forwards(self, kind):
        model = make(kind)
        rows = [prompt(9, 1), prompt(2, 2), prompt(6, 3)]
        tokens = np.full((3, 11), 99, np.int32)  # what stands behind a prompt must not matter
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
        with jax.default_matmul_precision("highest"):
            logits, caches = prefill(model.decoder, jnp.asarray(tokens), lengths, 24)
            for step in range(8):
                for i, row in enumerate(rows):
                    np.testing.assert_allclose(np.asarray(logits)[i], full_logits(model, row), atol=1e-4)
                    row.append(2 + 7 * step + i)
                positions = jnp.asarray([len(row) - 1 for row in rows], jnp.int32)
                new = jnp.asarray([row[-1] for row in rows], jnp.int32)
                logits, caches = decode(model.decoder, new, positions, caches)

    def test_caches_have_the_widths_of_their_layers(self):
        model = make("ragged")
        _, caches = prefill(model.decoder, jnp.zeros((2, 3), jnp.int32), jnp.asarray([3, 1], jnp.int32), 16)
        shapes = [(c.keys.shape, c.values.shape) for c in caches]
        assert shapes == [
            ((2, 16, 3, 4), (2, 16, 3, 5)),
            ((2, 16, 2, 6), (2, 16, 2, 3)),
            ((2, 16, 3, 4), (2, 16, 3, 5)),
        ]

    def test_a_used_cache_is_given_up(self):
        model = make()
        one = jnp.asarray([1], jnp.int32)
        _, old = prefill(model.decoder, one[None], one, 16)
        decode(model.decoder, one, one, old)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))

    def test_lengths_share_compiled_programs(self):
        model = make("ragged", max_position_embeddings=77)
        generate(model, [prompt(17)], max_new_tokens=5)
        counts = [f._cache_size() for f in (cache.prefill_block, cache.decode_block)]
        for length in (18, 19):
            generate(model, [prompt(length)], max_new_tokens=5)
        assert [f._cache_size() for f in (cache.prefill_block, cache.decode_block)] == counts

    def test_blocks_are_traced_once_per_distinct_shape(self):
        model = make("ragged", max_position_embeddings=78)  # three layers of two shapes
        functions = (cache.prefill_block, cache.decode_block)
        before = [f._cache_size() for f in functions]
        generate(model, [prompt(21)], max_new_tokens=7)
        assert [f._cache_size() for f in functions] == [size + model.config.distinct_shapes() for size in before]

    def test_buckets_waste_a_quarter_at_most(self):
        sizes = [bucket(n) for n in range(1, 5000)]
        assert all(size >= n for n, size in enumerate(sizes, 1))
        assert all(size <= 1.25 * n for n, size in enumerate(sizes, 1) if n > 16)
        assert len(set(sizes)) < 40


class TestGenerate:
    @pytest.mark.parametrize("kind", ["dense", "ragged", "window"])
    def test_greedy_equals_full_forwards_alone_and_in_a_batch(self, kind):
        model = make(kind)
        rows = [prompt(9, 1), prompt(2, 2), prompt(14, 3)]
        expected = [greedy(model, row, 10) for row in rows]
        assert generate(model, rows, 10).tokens == expected
        assert [generate(model, [row], 10).tokens[0] for row in rows] == expected

    def test_bfloat16_generates(self):
        model = make("ragged")
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, model.decoder)
        result = generate(dataclasses.replace(model, decoder=half), [prompt(4)], 5)
        assert len(result.tokens[0]) == 5

    def test_a_stop_token_ends_its_row_only(self):
        model = make()
        rows = [prompt(5, 1), prompt(7, 2)]
        expected = generate(model, rows, 12).tokens
        stop = expected[0][4]
        cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
        assert len(cut[0]) <= 5
        config = dataclasses.replace(model.config, eos_token_id=(stop,))
        assert generate(dataclasses.replace(model, config=config), rows, 12).tokens == cut
        for stops in (stop, [VOCAB - 1, stop]):
            chat = dataclasses.replace(model, generation_config={"eos_token_id": stops})
            assert generate(chat, rows, 12).tokens[0] == cut[0]

    def test_seeds(self):
        model, rows = make(), [prompt(5, 1), prompt(5, 1)]
        first = generate(model, rows, 12, temperature=2.0, seed=1)
        assert generate(model, rows, 12, temperature=2.0, seed=1) == first
        assert generate(model, rows, 12, temperature=2.0, seed=2) != first
        assert first.tokens[0] != first.tokens[1]  # equal prompts draw differently
        assert generate(model, rows[:1], 12, temperature=2.0, seed=1).tokens == first.tokens[:1]

    @pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}])
    def test_settings_that_leave_one_token_are_greedy(self, setting):
        model, rows = make("ragged"), [prompt(5, 1)]
        assert generate(model, rows, 10, **{"temperature": 3.0, **setting}).tokens == generate(model, rows, 10).tokens

    def test_text_in_and_out_and_streamed(self, tmp_path):
        write_tokenizer(tmp_path)
        model = dataclasses.replace(make(), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
        pieces, tokens = ["", ""], [[], []]

        def on_token(row: int, token: int, piece: str) -> None:
            pieces[row] += piece
            tokens[row].append(token)

        result = generate(model, ["ab", "river é"], 20, on_token=on_token)
        assert tokens == result.tokens
        assert result.texts == [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]
        replaced = "\N{REPLACEMENT CHARACTER}"
        assert [text.rstrip(replaced) for text in result.texts] == [text.rstrip(replaced) for text in pieces]
        alone = generate(model, "ab", 20)
        assert alone.tokens == result.tokens[:1]
        assert generate(make(), [prompt(3)], 2).texts == []

    def test_a_continuation_keeps_the_space_it_begins_with(self, tmp_path):
        """SentencePiece's decoders, Llama 2's for one, strip it from the beginning of a text."""
        write_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        model, pieces = dataclasses.replace(make(), tokenizer=tokenizer), []
        plain = generate(model, "ab", 6).texts[0]
        strip = decoders.Strip(content=plain[0], left=1, right=0)  # takes any character for a space
        tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), strip])
        assert tokenizer.decode(generate(model, "ab", 6).tokens[0]) == plain[1:]
        assert generate(model, "ab", 6, on_token=lambda row, token, piece: pieces.append(piece)).texts == [plain]
        assert "".join(pieces) == plain

    def test_longrope_switches_for_good_at_the_original_context(self):
        rng = np.random.default_rng(0)
        factors = {name: tuple(rng.uniform(1, 4, 4).tolist()) for name in ("short_factor", "long_factor")}
        rope = RopeConfig(
            100.0, "longrope", (("factor", 4.0), ("original_max_position_embeddings", 16), *factors.items())
        )
        model = make(rope=rope)
        rows = [prompt(12, 1), prompt(3, 2)]  # the first crosses, the second stays below
        expected = [greedy(model, row, 10) for row in rows]
        assert generate(model, rows, 10).tokens == expected

    def test_dynamic_scaling_goes_beyond_the_trained_context(self):
        model = make(rope=RopeConfig(100.0, "dynamic", (("factor", 2.0),)), max_position_embeddings=16)
        row = prompt(20)
        assert generate(model, [row], 1).tokens[0] == greedy(model, row, 1)
        assert generate(model, [row, prompt(3)], 6).tokens[0] == generate(model, [row], 6).tokens[0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompts": []}, "no prompt"),
            ({"prompts": [[1], []]}, "prompt 1 is empty"),
            ({"prompts": [""]}, "prompt 0 is empty"),
            ({"prompts": [[VOCAB]]}, f"token {VOCAB}, the model's vocabulary has {VOCAB}"),
            ({"prompts": ["text"]}, "has no tokenizer"),
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
            ({"max_new_tokens": 62}, r"3 tokens and 62 new .* 64 tokens; lower `max_new_tokens` to 61"),
            ({"prompts": [[1] * 64]}, "shorten the prompt"),
            ({"temperature": -0.1}, "temperature"),
            ({"temperature": math.nan}, "temperature"),
            ({"top_k": -1}, "top_k"),
            ({"top_p": 0.0}, "top_p"),
            ({"top_p": 1.5}, "top_p"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(InputError, match=message):
            generate(make(), **{"prompts": [[1, 2, 3]], **arguments})

    def test_a_nan_is_traced_to_its_layer(self):
        model = make()
        arrays = reference.random_arrays(model.config)
        arrays["layers.1.mlp.up_proj"][0, 0] = np.nan
        model = dataclasses.replace(model, decoder=decoder_from_arrays(model.config, arrays))
        with pytest.raises(RunError, match="layer 1, MLP"):
            generate(model, [[1, 2]], 2)


class TestSampling:
    PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])

    def frequencies(self, sampling: Sampling) -> np.ndarray:
        logits = jnp.asarray(np.tile(np.log(self.PROBABILITIES), (4000, 1)), jnp.float32)
        return np.bincount(np.asarray(sampling.choose(logits, 0)), minlength=5) / 4000

    @pytest.mark.parametrize(
        ("sampling", "kept"),
        [
            (Sampling(1.0), [0, 1, 2, 3, 4]),
            (Sampling(1.0, top_k=2), [1, 3]),
            (Sampling(1.0, top_k=9), [0, 1, 2, 3, 4]),
            (Sampling(1.0, top_p=0.6), [1, 3]),
            (Sampling(1.0, top_p=0.7), [1, 3, 4]),
            (Sampling(1.0, top_k=3, top_p=0.7), [1, 3]),  # after top_k the first two hold 0.76
        ],
    )
    def test_frequencies_follow_the_probabilities_that_are_kept(self, sampling, kept):
        expected = np.zeros(5)
        expected[kept] = self.PROBABILITIES[kept] / self.PROBABILITIES[kept].sum()
        found = self.frequencies(sampling)
        np.testing.assert_allclose(found, expected, atol=0.04)
        assert (found[expected == 0] == 0).all()

    def test_temperature_flattens(self):
        expected = self.PROBABILITIES**0.5 / (self.PROBABILITIES**0.5).sum()
        np.testing.assert_allclose(self.frequencies(Sampling(2.0)), expected, atol=0.04)

    def test_ties_go_to_the_first(self):
        logits = jnp.zeros((1, 5), jnp.float32)
        assert Sampling().choose(logits, 0).tolist() == Sampling(1.0, top_k=1).choose(logits, 0).tolist() == [0]
