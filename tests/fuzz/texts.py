"""Texts in every form that is read, and the files of tokenizers."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from intraslice_jax.calibrate.data import encode
from intraslice_jax.calibrate.documents import read_files
from intraslice_jax.convert.tokenizer import tokenizer_from_folder
from tests.fuzz.harness import Target, mutate_bytes, mutate_json

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é 🦙"}]
ROWS = [{"text": "one\r\ntwo", "n": 1}, {"text": None}, {"text": "three é", "n": 2.5}]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def targets() -> list[Target]:
    """Texts, through the function that commands call, and tokenizers, of which each also reads something."""
    files = {
        "text.txt": "some words\r\nand é\n".encode(),
        "utf16.txt": "some words é\n".encode("utf-16"),
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "chats.jsonl": (json.dumps({"messages": CHAT}) + "\n").encode() * 2,
        "text.csv": b'n,text\n1,"one ""two""\n"\n2,\n3,three\n',
        "text.txt.gz": gzip.compress(b"some words\n" * 30, mtime=0),
        "text.parquet": _parquet(),
    }
    texts = [Target(name, _writes(name, content), _read_text, (mutate_bytes,)) for name, content in files.items()] + [
        Target("rows.json", _writes("rows.json", json.dumps(ROWS).encode()), _read_text, (mutate_json,)),
        Target(
            "chats.json", _writes("chats.json", json.dumps([{"messages": CHAT}]).encode()), _read_text, (mutate_json,)
        ),
    ]
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    tokenizers = [
        Target(
            f"{kind} {name}", _writes_tokenizer(kind, name), _read_tokenizer, (mutate_json, mutate_json, mutate_bytes)
        )
        for kind in ("byte-level", "unigram")
        for name in names
    ]
    template = Target(
        "chat_template.jinja", _writes_tokenizer("byte-level", "chat_template.jinja"), _read_tokenizer, (mutate_bytes,)
    )
    model = Target("tokenizer.model", _writes_sentencepiece, _read_tokenizer, (mutate_bytes,))
    return [*texts, *tokenizers, template, model]


def _writes(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _read_text(folder: Path) -> str:
    file = next(path for path in folder.iterdir() if path.is_file())
    return read_files([file]).rendered(_tokenizer()).text


_KEPT: list[PreTrainedTokenizerFast] = []


def _tokenizer() -> PreTrainedTokenizerFast:
    if not _KEPT:
        _KEPT.append(_byte_level())
    return _KEPT[0]


def _parquet() -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_list(ROWS).to_parquet(buffer)
    return buffer.getvalue()


def _byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(tokens, [("t", "h"), ("th", "e")]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE, model_max_length=64
    )


def _unigram() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("th", -3.0), ("▁the", -1.0), ("<0x0A>", -9.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=TEMPLATE)


def _writes_tokenizer(kind: str, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        tokenizer = {"byte-level": _byte_level, "unigram": _unigram}[kind]()
        tokenizer.save_pretrained(folder)
        if not (folder / "special_tokens_map.json").exists():  # written by transformers 4
            special = {"eos_token": "</s>", "pad_token": {"content": "<pad>", "lstrip": False, "normalized": False}}
            (folder / "special_tokens_map.json").write_text(
                json.dumps(special | {"additional_special_tokens": ["<x>"]})
            )
        if not (folder / "added_tokens.json").exists():
            (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 300, "<x>": 301}))
        return folder / name

    return write


def _writes_sentencepiece(folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as made:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["the words of a text", "and more of the words"] * 20),
            model_prefix=f"{made}/tokenizer",
            vocab_size=290,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        shutil.copy(f"{made}/tokenizer.model", folder)
    return folder / "tokenizer.model"


def _read_tokenizer(folder: Path) -> object:
    tokenizer = tokenizer_from_folder(folder)
    if tokenizer is None:
        return None
    encode(tokenizer, "the words of é 🦙 text </s>\n" * 3)
    return read_files([_chats(folder)]).rendered(tokenizer).text if tokenizer.chat_template else None


def _chats(folder: Path) -> Path:
    path = folder / "chats of the test.json"
    if not path.exists():
        path.write_text(json.dumps([{"messages": CHAT}]))
    return path
