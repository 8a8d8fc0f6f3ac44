import random

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from intraslice_jax.calibrate.data import encode
from intraslice_jax.calibrate.documents import Documents, JoinedText
from intraslice_jax.calibrate.windows import (
    beginnings,
    calibration_windows,
    consecutive_windows,
    leading_token,
    sample_windows,
    with_bos,
)
from intraslice_jax.config import CalibrationConfig
from intraslice_jax.errors import InputError
from tests.tiny import write_tokenizer

BOS = 0


@pytest.fixture
def tokenizer(tmp_path):
    """One token per letter or so; it puts nothing before a text."""
    write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture
def llama(tokenizer):
    """The same, with BOS before a text."""
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


class TestSampled:
    def test_positions_are_the_fields(self):
        stream = np.arange(1000, dtype=np.int32)
        draw = random.Random(3)
        expected = [draw.randint(0, 1000 - 64 - 1) for _ in range(5)]
        windows = sample_windows(stream, 5, 64, seed=3)
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(windows, np.array(expected)[:, None] + np.arange(64))
        assert not np.array_equal(windows, sample_windows(stream, 5, 64, seed=4))

    def test_consecutive_windows_leave_the_remainder_out(self):
        stream = np.arange(25, dtype=np.int32)
        np.testing.assert_array_equal(consecutive_windows(stream, 10), np.arange(20).reshape(2, 10))
        np.testing.assert_array_equal(consecutive_windows(stream, 10, limit=1), np.arange(10)[None])
        assert consecutive_windows(stream, 5, limit=9).shape == (5, 5)

    def test_a_stream_of_one_window_and_a_constant_one(self):
        stream = np.full(16, 7, np.int32)
        np.testing.assert_array_equal(sample_windows(stream, 2, 16, seed=0), np.full((2, 16), 7))
        assert consecutive_windows(stream, 16).shape == (1, 16)

    @pytest.mark.parametrize("make", [lambda s: sample_windows(s, 1, 17, 0), lambda s: consecutive_windows(s, 17)])
    def test_a_stream_shorter_than_a_window(self, make):
        with pytest.raises(InputError, match=r"16 tokens, shorter than one window of 17"):
            make(np.zeros(16, np.int32))

    def test_numbers_out_of_range(self):
        stream = np.zeros(16, np.int32)
        with pytest.raises(InputError, match="samples must be at least 1, found 0"):
            sample_windows(stream, 0, 4, 0)
        with pytest.raises(InputError, match="sequence_length must be at least 2, found 1"):
            consecutive_windows(stream, 1)
        with pytest.raises(InputError, match="windows must be at least 1, found 0"):
            consecutive_windows(stream, 4, limit=0)


ROWS = Documents(["first one here", " ", "second two there", "third three", "x"], join=" ")


class TestBeginnings:
    def test_they_are_those_of_the_documents(self, tokenizer):
        text = ROWS.rendered(tokenizer)
        assert [text.text[start:][:3] for start in text.starts] == ["fir", "sec", "thi", "x"]
        found = beginnings(tokenizer, text, 3, 8, seed=0)
        expected = {tuple(encode(tokenizer, text.text[start:])[:8]) for start in text.starts[:3]}  # no room after "x"
        assert {tuple(window) for window in found} == expected
        assert found.dtype == np.int32

    def test_after_bos_where_the_tokenizer_puts_it(self, llama):
        text = ROWS.rendered(llama)
        found = beginnings(llama, text, 3, 8, seed=0)
        assert len(found) == 3
        assert found[:, 0].tolist() == [BOS] * 3
        firsts = {int(encode(llama, text.text[start:])[0]) for start in text.starts}
        assert set(found[:, 1].tolist()) <= firsts

    def test_bos_that_a_chat_template_wrote_is_not_doubled(self, llama):
        llama.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        chats = Documents([[{"role": "user", "content": f"{word} and more"}] for word in ("one", "two", "three")])
        found = beginnings(llama, chats.rendered(llama), 2, 6, seed=0)
        assert found.shape == (2, 6)
        assert (found == BOS).sum(1).tolist() == [1, 1]

    def test_blank_lines_count_where_documents_are_too_few(self, tokenizer):
        text = JoinedText("One thing.\n\nTwo things.\nStill two things.\n \n  Three things.")
        found = beginnings(tokenizer, text, 9, 6, seed=0)
        expected = {tuple(encode(tokenizer, part)[:6]) for part in ("One thing", "Two things", "Three things")}
        assert {tuple(window) for window in found} == expected

    def test_a_text_that_ends_in_a_million_blank_lines(self, tokenizer):
        text = JoinedText("One thing.\n\nTwo things." + "\n" * 10**6)
        found = beginnings(tokenizer, text, 4, 6, seed=0)
        assert {tuple(window) for window in found} == {
            tuple(encode(tokenizer, t)[:6]) for t in ("One thing", "Two things")
        }

    def test_a_long_document_is_not_encoded_whole(self, tokenizer, monkeypatch):
        seen = []

        def recorded(given, text):
            seen.append(len(text))
            return encode(given, text)

        monkeypatch.setattr("intraslice_jax.calibrate.windows.encode", recorded)
        found = beginnings(tokenizer, JoinedText("word " * 100_000), 1, 16, seed=0)
        np.testing.assert_array_equal(found[0], encode(tokenizer, "word " * 20)[:16])
        assert max(seen) <= 1024

    def test_no_place_for_a_whole_window(self, tokenizer):
        assert beginnings(tokenizer, JoinedText("short"), 4, 64, seed=0).shape == (0, 64)


class TestCalibration:
    def windows(self, tokenizer, sampling, samples=5):
        text = JoinedText("".join(f"Item {n} is a line.\n\n" for n in range(40)))
        config = CalibrationConfig(samples=samples, sequence_length=10, sampling=sampling, seed=4)
        tokens = encode(tokenizer, text.text)
        return calibration_windows(tokenizer, text, tokens, config), sample_windows(tokens, samples, 10, 4)

    def test_every_second_one_begins_with_a_document(self, llama):
        found, anywhere = self.windows(llama, "documents")
        np.testing.assert_array_equal(found[::2], anywhere[::2])
        item = encode(llama, "Item ")[:4]
        for window in found[1::2]:
            np.testing.assert_array_equal(window[:5], [BOS, *item])

    def test_the_fields_own(self, llama):
        found, anywhere = self.windows(llama, "random")
        np.testing.assert_array_equal(found, anywhere)

    def test_a_text_without_beginnings_gives_windows_from_anywhere(self, tokenizer):
        config = CalibrationConfig(samples=4, sequence_length=10, seed=4)
        text = JoinedText("\n" + "word " * 40, starts=())
        tokens = encode(tokenizer, text.text)
        found = calibration_windows(tokenizer, text, tokens, config)
        np.testing.assert_array_equal(found, sample_windows(tokens, 4, 10, 4))

    def test_one_window_is_from_anywhere(self, llama):
        found, anywhere = self.windows(llama, "documents", samples=1)
        np.testing.assert_array_equal(found, anywhere)


class TestBos:
    def test_it_takes_the_place_of_the_first_token(self, llama):
        windows = np.arange(12, dtype=np.int32).reshape(2, 6)
        found = with_bos(windows, llama)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found[:, 1:], windows[:, 1:])
        assert found[:, 0].tolist() == [BOS, BOS]

    def test_a_tokenizer_that_puts_none(self, tokenizer):
        assert leading_token(tokenizer) is None
        with pytest.raises(InputError, match="puts no BOS token before a text"):
            with_bos(np.zeros((1, 4), np.int32), tokenizer)
