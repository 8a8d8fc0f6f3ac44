import bz2
import codecs
import dataclasses
import gzip
import io
import json
import logging
import lzma
import os
import random
import zipfile

import datasets
import numpy as np
import pyarrow
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from intraslice_jax.calibrate import data, documents
from intraslice_jax.calibrate.data import encode, read_dataset, text_hash
from intraslice_jax.calibrate.documents import Documents, read_files
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
    path.write_bytes(gzip.compress("".join(json.dumps({"text": d}) + "\n" for d in documents).encode(), mtime=0))


SHAREGPT = [{"from": "human", "value": "Hi é"}, {"from": "gpt", "value": "Hello"}]
CHAT = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello"}]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def chatty(folder):
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def parquet(rows):
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


ROWS = [{"text": "one", "n": 1}, {"text": None, "n": 2}, {"text": "two é", "n": 3}]


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "content", "documents"),
        [
            ("a.txt", "  é\n\nend\n".encode(), ["  é\n\nend\n"]),
            ("windows", "\ufeffé\r\n\r\nend\rold".encode(), ["é\n\nend\nold"]),
            ("utf16.txt", "é 🦙\r\n".encode("utf-16"), ["é 🦙\n"]),
            ("utf32.txt", codecs.BOM_UTF32_BE + "é 🦙".encode("utf-32-be"), ["é 🦙"]),
            ("brackets.txt", b"[a] note\n{b}", ["[a] note\n{b}"]),
            ("rows.jsonl", b"\xef\xbb\xbf" + lines(*ROWS).replace(b"\n", b"\r\n"), ["one", "two é"]),
            ("rows without a suffix", lines(*ROWS), ["one", "two é"]),
            ("rows.json", json.dumps(ROWS, indent=1).encode(), ["one", "two é"]),
            ("strings.json", b'["one", "two"]', ["one", "two"]),
            ("columns.json", b'{"text": ["one", "two"], "n": [1, 2]}', ["one", "two"]),
            ("one.json", b'{"text": "one"}', ["one"]),
            ("line ends.jsonl", lines({"text": "a\u2028b\x85c"}), ["a\u2028b\x85c"]),
            ("chats.jsonl", lines({"messages": CHAT}, {"messages": None}), [CHAT]),
            ("chat.json", json.dumps({"messages": CHAT}).encode(), [CHAT]),
            ("sharegpt.json", json.dumps([{"conversations": SHAREGPT}]).encode(), [CHAT]),
            ("t.csv", b'n,text\r\n1,"one, ""two""\r\nthree"\r\n2,\r\n3,four\r\n', ['one, "two"\nthree', "four"]),
            ("t.tsv", b"text\tn\none\t1\n", ["one"]),
            ("long.csv", b"text\n" + b"x" * 200_000, ["x" * 200_000]),
            ("rows.parquet", parquet(ROWS), ["one", "two é"]),
            ("rows.unknown", parquet([{"messages": CHAT}]), [CHAT]),
            ("rows.jsonl.gz", gzip.compress(lines(*ROWS), mtime=0), ["one", "two é"]),
            ("a.txt.bz2", bz2.compress(b"words"), ["words"]),
            ("a.txt.xz", lzma.compress(b"words"), ["words"]),
            ("a.txt.zst", pyarrow.compress(b"words" * 9, codec="zstd", asbytes=True), ["words" * 9]),
            ("a.zip", zipped(**{"d/t.csv": b"text\none\n"}), ["one"]),
        ],
    )
    def test_each_is_read_for_what_it_is(self, tmp_path, name, content, documents):
        (tmp_path / name).write_bytes(content)
        assert read_files([tmp_path / name]).items == documents

    def test_documents_are_joined_by_an_empty_line(self, tmp_path):
        (tmp_path / "a").write_text("a")
        (tmp_path / "b.jsonl").write_bytes(lines({"body": "b"}, {"body": CHAT}))
        text = read_files([str(tmp_path / "b.jsonl"), tmp_path / "a"], "body").rendered(chatty(tmp_path)).text
        assert text == "b\n\n[user] Hi é\n[assistant] Hello\n\n\na"
        sources = read_sources([str(tmp_path / "b.jsonl"), str(tmp_path / "a")], "train", "body", "--calibration")
        evaluated = read_evaluation([str(tmp_path / "b.jsonl"), str(tmp_path / "a")], None, None, "body", 3)
        assert sources.rendered(chatty(tmp_path)).text == text
        assert evaluated.rendered(chatty(tmp_path)) == ("b.jsonl, a", text, 3)

    def test_rows_without_text_are_counted(self, tmp_path, caplog):
        (tmp_path / "a.jsonl").write_bytes(lines(*ROWS))
        read_files([tmp_path / "a.jsonl"])
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path / 'a.jsonl'}: 1 of 3 rows have no text and are left out"
        ]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "no chat template.*`column`"),
            ("{% for %}", "template cannot write a chat"),
            ("{{ raise_exception('only\none') }}", r"cannot write a chat of the text \(only one\)"),
            ("{{ messages.__class__.__mro__ }}", "cannot write a chat"),
        ],
    )
    def test_chats_that_the_template_does_not_take(self, tmp_path, template, message):
        tokenizer = chatty(tmp_path)
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=message) as caught:
            Documents([CHAT]).rendered(tokenizer)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a", None, "does not exist"),
            ("a", b"", "is empty"),
            ("a", b" \n", "is empty"),
            ("a", b"ab\xff ", r"not UTF-8 \(byte 2: 0xff\); convert"),
            ("a", "abé".encode()[:-1], r"byte 2: 0xc3\): cut off"),
            ("a", b"\xff\xfea\0b", r"not UTF-16 \(byte 4: 0x62\)"),
            ("a.txt", "ab".encode("utf-16-le"), "zero byte at 1.*UTF-16"),
            ("a.txt", b"some\x01\x02\x03\x04 words", "4 of its 14 characters are control"),
            ("a.txt", b"%PDF-1.7\n1 0 obj", "is a PDF document"),
            ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
            ("a.jsonl", lines({"body": "x", "n": 1}), r"no column 'text'; its columns are body, n \(`column` names"),
            ("a.txt", lines({"body": "x"}, {"n": 1}), "no column 'text'; its columns are body, n"),
            ("a.jsonl", lines({"text": "x"}) + b'{"text": "cut', "line 2 cannot be read as JSON"),
            ("a.jsonl", b"plain words", "cannot be read as JSON or JSON lines"),
            ("a.json", b"[" * 100_000, "cannot be read as JSON"),
            ("a.jsonl", lines({"text": 3}), "holds int values"),
            ("a.jsonl", lines({"text": None}, {}), "holds no text"),
            ("a.json", b"[]", "holds no text"),
            ("a.jsonl", lines({"messages": [{"role": "user"}]}), "expected text, or a list of messages"),
            ("a.csv", b"a,b\n1,2\n", "its columns are a, b"),
            ("a.csv", b'text\n"open', "as a table"),
            ("a.parquet", parquet(ROWS)[:-30], "as Parquet"),
            ("a.gz", gzip.compress(b"words" * 99, mtime=0)[:-9], "cannot be unpacked"),
            ("a.zip", zipped(a=b"x", b=b"y"), "an archive of 2 files"),
        ],
    )
    def test_bad_files_are_refused(self, tmp_path, name, content, message):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_files([path])
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_what_unpacks_to_too_much_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "MAX_TEXT_BYTES", 2**20)
        (tmp_path / "a.gz").write_bytes(gzip.compress(b"a" * 2**24, mtime=0))
        with pytest.raises(InputError, match="more than 1048576 bytes"):
            read_files([tmp_path / "a.gz"])

    def test_a_folder_a_pipe_and_no_file_are_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match="is a folder"):
            read_files([tmp_path])
        with pytest.raises(InputError, match="no text file"):
            read_files([])
        with pytest.raises(InputError, match="is no regular file"):
            read_sources([str(tmp_path / "pipe")], "train", "text", "--calibration")
        with pytest.raises(InputError, match="does not exist"):
            read_sources(["x" * 300 + ".txt"], "train", "text", "--calibration")


def joined(documents):
    assert all(isinstance(document, str) for document in documents.items)
    return documents.join.join(documents.items)


class TestDataSets:
    def test_jsonl(self, jsonl):
        assert joined(read_dataset(jsonl)) == "one\n\ntwo é"
        assert joined(read_dataset(jsonl, split="test")) == "three"
        assert joined(read_dataset(jsonl, split=None)) == "three"
        assert joined(read_dataset(jsonl, split="train[:1]")) == "one"

    def test_parquet_and_text(self, tmp_path):
        (tmp_path / "p").mkdir()
        datasets.Dataset.from_dict({"body": ["x", "y"]}).to_parquet(tmp_path / "p" / "train.parquet")
        assert joined(read_dataset(str(tmp_path / "p"), column="body")) == "x\n\ny"
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "train.txt").write_text("first line\nsecond line\n")
        assert joined(read_dataset(str(tmp_path / "t"))) == "first line\n\nsecond line"

    def test_what_save_to_disk_wrote(self, tmp_path):
        table = datasets.Dataset.from_dict({"text": ["x", "y"]})
        table.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"valid": table}).save_to_disk(tmp_path / "many")
        assert joined(read_dataset(str(tmp_path / "one"))) == "x\n\ny"
        assert joined(read_dataset(str(tmp_path / "many"), split="valid")) == "x\n\ny"
        with pytest.raises(InputError, match=r"no split 'train'; its splits are valid"):
            read_dataset(str(tmp_path / "many"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"column": "txt"}, r"split train has no column 'txt'; its columns are text, n"),
            ({"column": "n"}, r"column 'n' holds int values .row 0., expected text"),
            ({"split": "valid"}, r"Unknown split .valid.*(train.*test|test.*train)"),
            ({"config": "big"}, r"big.*Available: \['default'\]"),
        ],
    )
    def test_what_a_data_set_lacks(self, jsonl, arguments, message):
        with pytest.raises(InputError, match=message) as caught:
            read_dataset(jsonl, **arguments)
        assert "\n" not in str(caught.value)

    def test_nulls_are_left_out_and_chats_read(self, tmp_path, caplog):
        rows = [{"text": "x"}, {"text": None}, {"text": "y"}, {"text": None}]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
        assert joined(read_dataset(str(tmp_path / "d"))) == "x\n\ny"
        assert "2 of 4 rows have no text" in caplog.text
        datasets.Dataset.from_list([{"messages": CHAT}]).save_to_disk(tmp_path / "c")
        assert read_dataset(str(tmp_path / "c")).items == [CHAT]
        datasets.Dataset.from_dict({"text": [None, None]}).save_to_disk(tmp_path / "n")
        with pytest.raises(InputError, match="holds no text"):
            read_dataset(str(tmp_path / "n"))

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
        assert joined(read_dataset("wikitext2", split=None)) == "\n\n = A = \n"
        assert joined(read_dataset("wikitext2")) == "B"
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
            assert (found.name, joined(found.documents)) == (name, wanted[name])
            assert found.windows == (256 if name == "c4" else None)
            split = data.KNOWN[name].evaluation_split
            assert joined(read_sources([f"{name}@{folder}"], split, "text", "-")) == wanted[name]
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
        assert joined(read_dataset("c4", split=None)) == "0 1 2"
        with pytest.raises(InputError, match="no split 'test'; its splits are validation"):
            read_dataset("c4", split="test")


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


def merging(kind):
    """Tokenizers of the two usual kinds: with and without a rule that cuts words apart before they are merged."""
    pieces = ["th", "the", "aa", "aaaa", "Ġt", "▁t", "\n\n"]
    merges = [("t", "h"), ("th", "e"), ("a", "a"), ("aa", "aa"), ("\n", "\n")]
    alphabet = set(pre_tokenizers.ByteLevel.alphabet() if kind == "words" else "▁abcdehorstw .,\n")
    ids = {token: i for i, token in enumerate(["<unk>", *sorted(alphabet | set("\n▁")), *pieces])}
    space = "Ġ" if kind == "words" else "▁"
    tokenizer = Tokenizer(models.BPE(ids, [*merges, (space, "t")], unk_token="<unk>", fuse_unk=True))
    if kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["words", "no words"])
def test_a_long_text_has_the_ids_that_it_has_as_a_whole(kind, monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 4096)
    monkeypatch.setattr(data, "_OVERLAP", 512)
    draw = random.Random(0)
    words = ["the", "a", "aaaa", "hat", "🦙", "é", "those.", "\n\n", "  ", "a" * 40, "é" * 9, "\u0301"]
    text = " ".join(draw.choices(words, k=20_000))
    tokenizer = merging(kind)
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    np.testing.assert_array_equal(encode(tokenizer, text), whole)


@pytest.mark.parametrize("kind", ["words", "no words"])
def test_one_line_of_megabytes_takes_time_in_proportion(kind, monkeypatch):
    asked = []
    tokenizer = merging(kind)
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, t, **k: asked.append(len(t)) or call(self, t, **k))
    for text, tokens in (("a" * 500_000, 125_000), ("the those " * 20_000, None)):
        asked.clear()
        stream = encode(tokenizer, text)
        assert max(asked) <= 2**16
        assert sum(asked) < 1.1 * len(text)
        assert tokens is None or abs(len(stream) - tokens) < 100


def test_what_the_tokenizer_cannot_encode_is_refused():
    tokenizer = merging("words")
    with pytest.raises(InputError, match="cannot encode the text"):
        encode(tokenizer, "\ud800")
