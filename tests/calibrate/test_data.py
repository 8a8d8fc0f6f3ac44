import dataclasses
import gzip
import json
import logging
import random

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from intraslice_jax.calibrate import data
from intraslice_jax.calibrate.data import (
    consecutive_windows,
    encode,
    read_dataset,
    read_text,
    sample_windows,
    text_hash,
)
from intraslice_jax.calibrate.sources import read_evaluation, read_sources
from intraslice_jax.errors import InputError
from tests.tiny import write_json, write_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def jsonl(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one", "n": 1}\n{"text": "two é", "n": 2}\n', encoding="utf-8")
    (folder / "test.jsonl").write_text('{"text": "three", "n": 3}\n', encoding="utf-8")
    return str(folder)


def write_table(path, **columns):
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(columns).to_parquet(path)


def write_gzip(path, documents):
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("".join(json.dumps({"text": d}) + "\n" for d in documents).encode()))


class TestFiles:
    def test_one_file_is_read_as_it_is(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("  é\r\n\n".encode() + b"end\n")
        assert read_text([tmp_path / "a.txt"]) == "  é\r\n\nend\n"

    def test_several_files_are_joined_by_an_empty_line(self, tmp_path):
        for name in "ab":
            (tmp_path / name).write_text(name)
        assert read_text([str(tmp_path / "b"), tmp_path / "a"]) == "b\n\na"

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "does not exist"), (b"", "is empty"), (b" \n", "is empty"), (b"ab\xff", r"byte 2: 0xff")],
    )
    def test_bad_files_are_refused(self, tmp_path, content, message):
        path = tmp_path / "bad.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_text([path])
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_folder_and_no_file_are_refused(self, tmp_path):
        with pytest.raises(InputError, match="is a folder"):
            read_text([tmp_path])
        with pytest.raises(InputError, match="no text file"):
            read_text([])


class TestDataSets:
    def test_jsonl(self, jsonl):
        assert read_dataset(jsonl) == "one\n\ntwo é"
        assert read_dataset(jsonl, split="test") == "three"
        assert read_dataset(jsonl, split=None) == "three"
        assert read_dataset(jsonl, split="train[:1]") == "one"

    def test_parquet_and_text(self, tmp_path):
        (tmp_path / "p").mkdir()
        datasets.Dataset.from_dict({"body": ["x", "y"]}).to_parquet(tmp_path / "p" / "train.parquet")
        assert read_dataset(str(tmp_path / "p"), column="body") == "x\n\ny"
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "train.txt").write_text("first line\nsecond line\n")
        assert read_dataset(str(tmp_path / "t")) == "first line\n\nsecond line"

    def test_what_save_to_disk_wrote(self, tmp_path):
        table = datasets.Dataset.from_dict({"text": ["x", "y"]})
        table.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"valid": table}).save_to_disk(tmp_path / "many")
        assert read_dataset(str(tmp_path / "one")) == "x\n\ny"
        assert read_dataset(str(tmp_path / "many"), split="valid") == "x\n\ny"
        with pytest.raises(InputError, match=r"no split 'train'; its splits are valid"):
            read_dataset(str(tmp_path / "many"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"column": "txt"}, r"no column 'txt' in split train; its columns are text, n"),
            ({"column": "n"}, r"holds int values, expected text"),
            ({"split": "valid"}, r"Unknown split .valid.*(train.*test|test.*train)"),
            ({"config": "big"}, r"big.*Available: \['default'\]"),
        ],
    )
    def test_what_a_data_set_lacks(self, jsonl, arguments, message):
        with pytest.raises(InputError, match=message) as caught:
            read_dataset(jsonl, **arguments)
        assert "\n" not in str(caught.value)

    def test_an_empty_column_is_refused(self, tmp_path):
        datasets.Dataset.from_dict({"text": ["", " "]}).save_to_disk(tmp_path / "d")
        with pytest.raises(InputError, match="holds no text"):
            read_dataset(str(tmp_path / "d"))

    def test_paths_that_are_no_data_set(self, tmp_path):
        (tmp_path / "f.txt").write_text("x")
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="is a file"):
            read_dataset(str(tmp_path / "f.txt"))
        with pytest.raises(InputError, match="does not exist"):
            read_dataset(str(tmp_path / "none"))
        with pytest.raises(InputError, match="empty"):
            read_dataset(str(tmp_path / "empty"))

    def test_offline_says_how_to_go_on(self):
        with pytest.raises(InputError, match=r"cannot be downloaded.*did you mean wikitext2.*local copy"):
            read_dataset("wikitext-2")

    def test_short_names_follow_their_recipe(self, tmp_path, monkeypatch):
        # A local copy with the hub's layout: named configurations in the card, one file per split.
        (tmp_path / "raw").mkdir()
        (tmp_path / "README.md").write_text(
            "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
            "  - split: test\n    path: raw/test.jsonl\n  - split: train\n    path: raw/train.jsonl\n---\n"
        )
        (tmp_path / "raw" / "test.jsonl").write_text('{"text": ""}\n{"text": " = A = \\n"}\n')
        (tmp_path / "raw" / "train.jsonl").write_text('{"text": "B"}\n')
        local = dataclasses.replace(data.KNOWN["wikitext2"], path=str(tmp_path))
        monkeypatch.setitem(data.KNOWN, "wikitext2", local)
        assert read_dataset("wikitext2", split=None) == "\n\n = A = \n"
        assert read_dataset("wikitext2") == "B"
        with pytest.raises(InputError, match="takes no configuration"):
            read_dataset("wikitext2", "wikitext-103-raw-v1")

    def test_a_local_copy_in_the_hubs_layout(self, tmp_path):
        card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        card += "  - split: test\n    path: wikitext-2-raw-v1/test-*\n---\n"
        copies = {name: tmp_path / name for name in data.KNOWN}
        for folder in copies.values():
            folder.mkdir()
        (copies["wikitext2"] / "README.md").write_text(card)
        write_table(copies["wikitext2"] / "wikitext-2-raw-v1/test-00000-of-00001.parquet", text=["", " = A = \n", "b"])
        write_gzip(copies["c4"] / "en/c4-validation.00000-of-00008.json.gz", [str(i) for i in range(1200)])
        write_table(copies["ptb"] / "penn_treebank/test/0000.parquet", sentence=["no it was n't", "<unk> N"])
        write_table(copies["alpaca"] / "data/train-00000-of-00001-a.parquet", text=["Below is", "an"], output=["", ""])
        wanted = {
            "wikitext2": "\n\n = A = \n\n\nb",
            "c4": " ".join(map(str, range(1100))),
            "ptb": "no it was n't <unk> N",
            "alpaca": "Below is\n\nan",
        }
        for name, folder in copies.items():
            found = read_evaluation((), f"{name}@{folder}", None, "text", None)
            assert (found.name, found.text) == (name, wanted[name])
            assert found.windows == (256 if name == "c4" else None)
            assert read_sources([f"{name}@{folder}"], data.KNOWN[name].evaluation_split, "text", "-") == wanted[name]
        assert read_evaluation((), f"c4@{copies['c4']}", None, "text", 7).windows == 7

    def test_a_local_copy_that_is_none(self, tmp_path):
        with pytest.raises(InputError, match=r"wikitext2@.*there is no such folder; expected a copy of Salesforce"):
            read_evaluation((), f"wikitext2@{tmp_path / 'none'}", None, "text", None)
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="ptb, split test: "):
            read_evaluation((), f"ptb@{tmp_path / 'empty'}", None, "text", None)

    def test_without_a_network_a_known_name_says_what_to_copy(self):
        with pytest.raises(InputError, match=r"cannot be downloaded.*a copy of allenai/c4 as c4@FOLDER"):
            read_dataset("c4", split=None)
        with pytest.raises(InputError, match=r"cannot be downloaded.*short names are wikitext2, c4, ptb, alpaca"):
            read_dataset("qqq/zzz")

    def test_short_names_with_files_and_a_limit(self, tmp_path, monkeypatch):
        (tmp_path / "en").mkdir()
        (tmp_path / "en" / "v.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(5)))
        monkeypatch.setitem(
            data.KNOWN,
            "c4",
            dataclasses.replace(
                data.KNOWN["c4"],
                path=str(tmp_path),
                files={"validation": "en/v.jsonl"},
                documents={"validation": 3},
            ),
        )
        assert read_dataset("c4", split=None) == "0 1 2"
        with pytest.raises(InputError, match="no split 'test'; its splits are validation"):
            read_dataset("c4", split="test")


class TestWindows:
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


def test_encode_adds_no_special_token_and_does_not_warn(tmp_path):
    write_tokenizer(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "model_max_length": 8}
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        stream = encode(tokenizer, "ab" * 100)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert stream.dtype == np.int32
    assert stream.shape == (200,)
    assert len(set(stream.tolist())) == 2
    assert not records


def test_text_hash():
    assert text_hash("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"
