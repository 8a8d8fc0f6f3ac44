"""Damaged GGUF files: wrong values and counts in their metadata, wrong shapes and places of tensors, wrong bytes."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from intraslice_jax.convert.load import open_stored
from tests.fuzz.harness import Mutation, Target, mutate_bytes

_KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_HIDDEN, _VOCAB, _INNER, _HEADS, _KV_HEADS, _WIDTH = 8, 9, 12, 2, 1, 4

# Of a pair: the value's type and the value; of an array's value: the type of its items and the items.
Pairs = list[tuple[bytes, int, Any]]
Places = list[tuple[bytes, tuple[int, ...], int, int]]


def targets() -> list[Target]:
    """Files of each kind of vocabulary and architecture."""
    return [
        Target(f"gguf {architecture} {kind}", _example(architecture, kind), _read, (_mutate, _mutate, _header(0.4)))
        for architecture, kind in (("llama", "gpt2"), ("deci", "llama"), ("phi3", "llama"), ("phi2", "gpt2"))
    ]


def _read(folder: Path) -> object:
    stored = open_stored(folder / "model.gguf")
    return {path: stored.arrays[path].shape for path in stored.arrays}, stored.tokenizer


def _example(architecture: str, kind: str) -> Any:
    def write(folder: Path) -> Path:
        pairs, places, data = _pairs(architecture, kind), *_tensors(architecture)
        file = folder / "model.gguf"
        file.write_bytes(_join(pairs, places, data))
        return file

    return write


def _pairs(architecture: str, kind: str) -> Pairs:
    tokens = ["<s>", "</s>", "<unk>", "a", "b", "ab", "▁", "▁a", "<0x0A>"]
    many = architecture == "deci"
    numbers = {
        "context_length": 64,
        "embedding_length": _HIDDEN,
        "block_count": 2,
        "feed_forward_length": [_INNER] * 2 if many else _INNER,
        "attention.head_count": [_HEADS] * 2 if many else _HEADS,
        "attention.head_count_kv": [_KV_HEADS] * 2 if many else _KV_HEADS,
        "attention.key_length": _WIDTH,
        "attention.value_length": _WIDTH,
        "rope.dimension_count": _WIDTH,
    }
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 1e4}
    floats |= {"rope.scaling.factor": 2.0}
    ids = {"bos": 0, "eos": 1, "unknown": 2, "padding": 1}
    strings = {
        "general.architecture": architecture,
        f"{architecture}.rope.scaling.type": "yarn" if architecture == "llama" else "none",
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.chat_template": "{{ messages }}",
    }
    pairs: list[tuple[str, int, Any]] = [(key, _STRING, value.encode()) for key, value in strings.items()]
    pairs.append(("general.alignment", 4, 32))
    for key, value in numbers.items():
        is_list = isinstance(value, list)
        pairs.append((f"{architecture}.{key}", _ARRAY if is_list else 4, (4, value) if is_list else value))
    pairs += [(f"{architecture}.{key}", 6, value) for key, value in floats.items()]
    pairs += [(f"tokenizer.ggml.{key}_token_id", 4, value) for key, value in ids.items()]
    pairs += [(f"tokenizer.ggml.add_{key}", 7, True) for key in ("bos_token", "eos_token", "space_prefix")]
    lists = {
        "tokens": (_STRING, [token.encode() for token in tokens]),
        "token_type": (5, [3, 3, 2, 1, 1, 1, 1, 4, 6]),
        "scores": (6, [0.0, 0.0, 0.0, -4.0, -5.0, -1.0, -6.0, -2.0, 0.0]),
    }
    if kind == "gpt2":
        lists["merges"] = (_STRING, [b"a b"])
    pairs += [(f"tokenizer.ggml.{key}", _ARRAY, value) for key, value in lists.items()]
    return [(key.encode(), kind, value) for key, kind, value in pairs]


def _tensors(architecture: str) -> tuple[Places, bytes]:
    q, kv = _HEADS * _WIDTH, _KV_HEADS * _WIDTH
    qkv = {"attn_q": (q, _HIDDEN), "attn_k": (kv, _HIDDEN), "attn_v": (kv, _HIDDEN)}
    mlp = {"ffn_up": (_INNER, _HIDDEN), "ffn_down": (_HIDDEN, _INNER)}
    if architecture == "phi3":
        qkv, mlp = {"attn_qkv": (q + 2 * kv, _HIDDEN)}, mlp | {"ffn_up": (2 * _INNER, _HIDDEN)}
    elif architecture != "phi2":
        mlp |= {"ffn_gate": (_INNER, _HIDDEN)}
    maps = qkv | {"attn_output": (_HIDDEN, q)} | mlp
    norms = ("attn_norm",) if architecture == "phi2" else ("attn_norm", "ffn_norm")
    layer = {f"{name}.weight": shape for name, shape in maps.items()}
    layer |= {f"{name}.weight": (_HIDDEN,) for name in norms}
    if architecture == "phi2":
        layer |= {f"{name}.bias": shape[:1] for name, shape in maps.items()} | {"attn_norm.bias": (_HIDDEN,)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (_VOCAB, _HIDDEN), "output_norm.weight": (_HIDDEN,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    if architecture == "phi2":
        shapes |= {"output_norm.bias": (_HIDDEN,), "output.weight": (_VOCAB, _HIDDEN), "output.bias": (_VOCAB,)}
    else:
        shapes["rope_freqs.weight"] = (_WIDTH // 2,)
    places: Places = []
    data = b""
    for name, shape in shapes.items():
        places.append((name.encode(), shape, int(gguf.GGMLQuantizationType.F32), len(data)))
        data += np.ones(shape, "<f4").tobytes()
        data += b"\0" * (-len(data) % 32)
    return places, data


def _join(pairs: Pairs, places: Places, data: bytes) -> bytes:
    """The file of these parts."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(places), len(pairs))
    for key, kind, value in pairs:
        header += _text(key) + struct.pack("<I", kind) + _packed(kind, value)
    for name, shape, kind, offset in places:
        axes = [_within(size, "Q") for size in reversed(shape)]
        header += _text(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
        header += struct.pack("<IQ", _within(kind, "I"), _within(offset, "Q"))
    return header + b"\0" * (-len(header) % 32) + data


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _packed(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    if kind == _ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(_packed(item, v) for v in values)
    return struct.pack("<" + _KINDS[kind], _within(value, _KINDS[kind]))


def _within(value: Any, kind: str) -> Any:
    """The number, or the nearest of its type."""
    if kind in "fd?":
        return value
    bits, signed = 8 * struct.calcsize(kind), kind.islower()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return min(max(int(value), low), high)


def _value(rng: random.Random, depth: int = 0) -> tuple[int, Any]:
    """A hostile value and its type."""
    kind = rng.choice((*_KINDS, _STRING, _STRING, _ARRAY, _ARRAY))
    if kind == _STRING:
        texts = (b"", b" ", b"llama", b"a\nb", b"\xff\xfe", b"\0", b"x" * 5000, "🦙".encode(), b"$A", b"{% for %}")
        return kind, rng.choice(texts)
    if kind == _ARRAY:
        item, value = _value(rng, depth + 1)
        if item == _ARRAY and depth > 2:
            item, value = 4, 1
        return kind, (item, [value] * rng.choice((0, 1, 2, 9, 9, 300)))
    if kind in (6, 12):
        return kind, rng.choice((0.0, -1.0, 1e30, float("inf"), float("nan"), 1e-40))
    if kind == 7:
        return kind, rng.random() < 0.5
    return kind, rng.choice((0, 1, 2, 3, 4, 7, 9, 100, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -1))


def _mutate(rng: random.Random, content: bytes) -> bytes:
    """One to three values, items, sizes, types, places or names replaced, left out or repeated."""
    pairs, places, data = _split(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, tensor = rng.randrange(len(pairs)), rng.randrange(len(places))
        key, kind, value = pairs[at]
        name, shape, stored, offset = places[tensor]
        number = rng.choice((0, 1, 2, 3, 5, 31, 2**20, 2**31, 2**32, 2**61, 2**62, 2**63, 2**64 - 1))
        match rng.randrange(12):
            case 0 | 1 | 2:
                pairs[at] = (key, *_value(rng))
            case 3 | 4 if kind == _ARRAY and value[1]:
                item, values = value
                values = list(values)
                new = _value(rng)
                while new[0] != item:
                    new = _value(rng)
                values[rng.randrange(len(values))] = new[1]
                pairs[at] = (key, kind, (item, values))
            case 3 | 4 if kind in _KINDS and kind not in (6, 7, 12):
                pairs[at] = (key, kind, number)
            case 5:
                pairs = pairs[:at] + pairs[at + 1 :] or pairs
            case 6:
                pairs.append(rng.choice(((key, kind, value), (b"\xff", 4, 1), (b"", _STRING, b""))))
            case 7:
                axes = rng.choice(((), (number,), (*shape, number), (number, *shape[1:]), shape[::-1], (1,) * 5))
                places[tensor] = (name, axes, stored, offset)
            case 8:
                places[tensor] = (
                    name,
                    shape,
                    rng.choice((0, 1, 2, 4, 5, 8, 12, 16, 24, 28, 30, 31, 99, number)),
                    offset,
                )
            case 9:
                places[tensor] = (name, shape, stored, rng.choice((number, offset + 1, 0)))
            case 10:
                names = (
                    b"",
                    b"a\nb",
                    b"\xff",
                    b"blk.99999999999.attn_q.weight",
                    places[0][0],
                    name + b"x",
                    b"blk.0.attn_q.bias",
                )
                places[tensor] = (rng.choice(names), shape, stored, offset)
            case _:
                places = places[:tensor] + places[tensor + 1 :] or places
    return _join(pairs, places, data)


def _split(content: bytes) -> tuple[Pairs, Places, bytes]:
    """A valid file's parts."""
    at = 8

    def number(kind: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, content, at)
        at += struct.calcsize("<" + kind)
        return value

    def text() -> bytes:
        nonlocal at
        length = number("Q")
        at += length
        return content[at - length : at]

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            item, count = number("I"), number("Q")
            return item, [value(item) for _ in range(count)]
        return number(_KINDS[kind])

    tensors, count = number("Q"), number("Q")
    pairs = []
    for _ in range(count):
        key, kind = text(), number("I")
        pairs.append((key, kind, value(kind)))
    places = []
    for _ in range(tensors):
        name, axes = text(), number("I")
        shape = tuple(number("Q") for _ in range(axes))[::-1]
        places.append((name, shape, number("I"), number("Q")))
    return pairs, places, content[at + -at % 32 :]


def _header(part: float) -> Mutation:
    """Bytes of the first part of a file changed."""

    def mutate(rng: random.Random, content: bytes) -> bytes:
        end = int(len(content) * part)
        return mutate_bytes(rng, content[:end]) + content[end:]

    return mutate
