"""Tokenizers rebuilt from GGUF metadata against slow references, and tokenizer files that are not right."""

import itertools
import json
import shutil

import pytest
import regex
import sentencepiece as spm
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from intraslice_jax.calibrate.data import encode
from intraslice_jax.convert.gguf_file import GgufFile
from intraslice_jax.convert.tokenizer import tokenizer_from_folder, tokenizer_from_gguf
from intraslice_jax.errors import InputError

TEXTS = [
    "Hello world",
    "The quick brown fox didn't jump over 12 lazy dogs, it walked 1234567.89 km!",
    "def f(x):\n    return x**2  # squared\n\n\n\tif x: pass\r\n",
    "  leading and trailing  spaces   ",
    "naïve café – “quotes” … Ελληνικά русский עברית العربية हिन्दी",
    "日本語のテキスト、中文文本，한국어 텍스트",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and symbols ∑∫√ ½ ² Ⅷ ٣",
    "don't DON'T we'll I'm they've he'd x's",
    "\n",
    " ",
    "a",
    "\x00\x01\x7f\u200b\ufeff",
]


def gpt2_alphabet():
    """How GPT-2 writes each byte as one printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def slow_byte_pairs(text, ids, ranks):
    """The tokens of a piece by merging the best pair until none is left."""
    spelling = gpt2_alphabet()
    parts = [spelling[b] for b in text.encode()]
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if tuple(parts[i : i + 2]) == best:
                merged.append("".join(best))
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return [ids[part] for part in parts]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return GgufFile(smollm2_gguf).metadata


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return tokenizer_from_gguf(smollm2, 8192)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_slow_reference(text, smollm2, tokenizer):
    ids = {token: i for i, token in enumerate(smollm2["tokenizer.ggml.tokens"])}
    merges = smollm2["tokenizer.ggml.merges"]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    expected = []
    for part in regex.split(r"(\p{N})", text):  # each digit alone, then GPT-2's pattern
        for piece in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", part):
            expected += slow_byte_pairs(piece, ids, ranks)
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.slow
def test_smollm2_facts(tokenizer, tmp_path):
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12").input_ids) == ["a", "Ġ", "1", "2"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(chat).input_ids
    assert ids.count(1) == 3
    assert tokenizer.decode(ids) == chat
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("user\nHi\nassistant\n")

    # What an export writes is the same tokenizer.
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), tokenizer_from_folder(tmp_path)):
        for text in [*TEXTS, chat]:
            assert again(text).input_ids == tokenizer(text).input_ids
        assert again.chat_template == tokenizer.chat_template
        assert again.eos_token_id == 2


@pytest.mark.slow
def test_smollm2_equals_transformers_where_no_digits_are(smollm2_gguf, tokenizer):
    architecture, parts, _ = get_gguf_tokenizer(str(smollm2_gguf))
    theirs, _ = convert_gguf_tokenizer(architecture, parts)
    for text in TEXTS:
        text = regex.sub(r"\p{N}", "", text)  # it does not know that this model splits digits
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer(text).input_ids


def byte_level(pre, **changes):
    tokens = [*gpt2_alphabet().values(), "he", "hel", "lo", "<|s|>", "<|e|>", "<think>"]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 259 + [3, 3, 4],
        "tokenizer.ggml.merges": ["h e", "l o"],
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 260,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    return tokenizer_from_gguf({key: value for key, value in metadata.items() if value is not None}, 64)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["He", "'s", " 12345", "!?", "\n\n", " ABCdef", " x", "'", "S"]),
        ("smollm", ["He", "'s", " ", "1", "2", "3", "4", "5", "!?", "\n\n", " ABCdef", " x", "'", "S"]),
        ("llama-bpe", ["He", "'s", " ", "123", "45", "!?\n\n", " ABCdef", " x", "'S"]),
        ("dbrx", ["He", "'s", " ", "123", "45", "!?\n\n", " ABCdef", " x", "'S"]),
        ("qwen2", ["He", "'s", " ", "1", "2", "3", "4", "5", "!?\n\n", " ABCdef", " x", "'S"]),
        ("gpt-4o", ["He's", " ", "123", "45", "!?\n\n", " ABCdef", " x'S"]),
        ("tekken", ["He", "'s", " ", "1", "2", "3", "4", "5", "!?\n\n", " ABCdef", " x", "'S"]),
    ],
)
def test_pre_tokenizers(pre, pieces):
    text = "He's 12345!?\n\n ABCdef x'S"
    back = {character: byte for byte, character in gpt2_alphabet().items()}
    found = byte_level(pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [bytes(back[c] for c in piece).decode() for piece, _ in found] == pieces


def test_whole_words_and_bos():
    # "hel" is a token that no merge leads to: taken whole only where the vocabulary says so.
    assert byte_level("llama-bpe")("hel").tokens() == ["<|s|>", "hel"]
    assert byte_level("llama-bpe", add_bos_token=False)("hello").tokens() == ["he", "l", "lo"]
    assert byte_level("qwen2")("hel").tokens() == ["he", "l"]
    assert byte_level("qwen2", add_bos_token=True, add_eos_token=True)("hel").tokens() == [
        "<|s|>",
        "he",
        "l",
        "<|e|>",
    ]
    assert byte_level("qwen2", bos_token_id=None, add_bos_token=True)("hel").tokens() == ["he", "l"]


def test_added_tokens():
    tokenizer = byte_level("smollm")
    ids = tokenizer("he<think><|e|>").input_ids
    assert ids == [256, 261, 260]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<think>"


def sentencepiece(**changes):
    pieces = ["▁a", "ab", "▁ab", "bc", "▁abc", "▁", "a", "b", "c", "é"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, "<|user|>"]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items() if key != "architecture"},
    }
    metadata["general.architecture"] = changes.get("architecture", "llama")
    return tokenizer_from_gguf({key: value for key, value in metadata.items() if value is not None}, 64)


def slow_sentencepiece(text, pieces, scores):
    """llama.cpp's way: of all neighbours whose joint is a piece, join those with the best score, first come."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joints = [(scores["".join(p)], -i) for i, p in enumerate(itertools.pairwise(parts)) if "".join(p) in scores]
        if not joints:
            break
        at = -max(joints)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return [t for part in parts for t in ([part] if part in pieces else [f"<0x{b:02X}>" for b in part.encode()])]


@pytest.mark.parametrize("text", ["abc", "a bc abcab", "  c", "é日b", "", "ab\n"])
def test_sentencepiece_equals_slow_reference(text):
    tokenizer = sentencepiece()
    names = ["▁a", "ab", "▁ab", "bc", "▁abc", "▁", "a", "b", "c", "é"]
    scores = {name: -float(i) for i, name in enumerate(names)}
    expected = slow_sentencepiece(text, set(names), scores) if text else []
    assert tokenizer(text).tokens() == ["<s>", *expected]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_sentencepiece_options():
    assert sentencepiece(add_space_prefix=False)("abc").tokens() == ["<s>", "ab", "c"]
    assert sentencepiece(add_bos_token=False, add_eos_token=True)("c").tokens() == ["▁", "c", "</s>"]
    given = sentencepiece(scores=None, merges=["b c", "▁ a"])
    assert given("abc").tokens() == ["<s>", "▁a", "bc"]
    # Phi-3 never sees the line break behind a special token.
    phi3 = sentencepiece(architecture="phi3")
    assert phi3.convert_ids_to_tokens(phi3("<|user|>\na").input_ids) == ["<s>", "<|user|>", "▁a"]
    assert "<0x0A>" in sentencepiece()("<|user|>\na").tokens()


def test_sentencepiece_of_a_real_model(shared_data):
    """A real Llama 2 style vocabulary: the same tokens as its own tokenizer.json."""
    theirs = AutoTokenizer.from_pretrained(shared_data / "stories260k")
    tokens = theirs.convert_ids_to_tokens(range(len(theirs)))
    special = {"<unk>": 2, "<s>": 3, "</s>": 3}
    types = [special.get(token, 6 if regex.fullmatch(r"<0x\w\w>", token) else 1) for token in tokens]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = tokenizer_from_gguf(metadata, 512)
    for text in [*TEXTS, "Once upon a time, there was a little girl named Lily. She said: “No!”"]:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (byte_level, {"pre": "unheard-of"}, r"pre 'unheard-of' is not supported; supported: command-r, "),
        (byte_level, {"pre": None}, r"pre None is not supported"),
        (byte_level, {"merges": None}, r"merges is missing"),
        (byte_level, {"merges": ["h e l"]}, r"merges holds 'h e l', expected two tokens"),
        (byte_level, {"merges": ["h q"]}, r"vocabulary is damaged"),
        (byte_level, {"bos_token_id": 262}, r"bos_token_id 262 is outside the vocabulary of 262"),
        (byte_level, {"token_type": [1]}, r"token_type has 1 entries, expected 262"),
        (byte_level, {"tokens": None}, r"tokens is missing or empty"),
        (byte_level, {"tokens": ["a", "a"]}, r"names a token twice"),
        (byte_level, {"model": "rwkv"}, r"model 'rwkv' is not supported; supported: gpt2, llama"),
        (sentencepiece, {"scores": [0.0]}, r"scores must hold 270 numbers"),
    ],
)
def test_bad_metadata(build, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        build(**({"pre": "gpt-2"} if build is byte_level else {}) | changes)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_is_none(tmp_path):
    assert tokenizer_from_folder(tmp_path) is None
    assert tokenizer_from_gguf({}, 64) is None


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_damaged_folders(tmp_path, kind):
    whole = tmp_path / "whole"
    byte_level("gpt-2").save_pretrained(whole)
    settings = json.loads((whole / "tokenizer_config.json").read_text())
    (whole / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))

    def damaged(name, content):
        folder = shutil.copytree(whole, tmp_path / name, dirs_exist_ok=True)
        path = folder / name
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError) as caught:
            tokenizer_from_folder(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not the tokenizer's vocabulary; copy tokenizer.json" in damaged("tokenizer.json", None)
    for content in ("", "{}", (whole / "tokenizer.json").read_text()[:900], '{"a": ' + "[" * 100_000):
        assert "cannot be read" in damaged("tokenizer.json", content)
    assert "cannot be read" in damaged("tokenizer_config.json", "{")
    assert "added_tokens.json: <pad> must be a whole number" in damaged("added_tokens.json", '{"<pad>": "1"}')
    special = {"eos_token": {"content": 3}}
    assert "special_tokens_map.json: eos_token" in damaged("special_tokens_map.json", json.dumps(special))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_max_length": "long"}, "model_max_length"),
        ({"bos_token": 7}, "bos_token"),
        ({"added_tokens_decoder": {"0": "<s>"}}, "added_tokens_decoder.0"),
        ({"chat_template": [1]}, "chat_template"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"tokenizer_class": ["LlamaTokenizer"]}, "tokenizer_class"),
    ],
)
def test_settings_of_a_wrong_type(tmp_path, changes, field):
    byte_level("gpt-2").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(InputError, match=rf"tokenizer_config\.json: {field}") as caught:
        tokenizer_from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [10**400, 1e30, -1, None])
def test_any_number_is_a_maximal_length(tmp_path, length):
    byte_level("gpt-2").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": length}))
    assert encode(tokenizer_from_folder(tmp_path), "ab").tolist() == byte_level("gpt-2")("ab").input_ids


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}},  # fails when it is read
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},  # fails when it is used
    ],
)
def test_a_panic_in_rust_is_a_refusal_of_one_line(tmp_path, capfd, changes):
    byte_level("gpt-2").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match="cannot be read") as caught:
        tokenizer_from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter([*TEXTS[:4], "the cat and the dog and the bird 1 2 3"] * 5),
        model_prefix=str(folder / "tokenizer"),
        model_type=request.param,
        vocab_size=340,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


class TestSentencepiece:
    """Folders with nothing but tokenizer.model, as Meta's Llama 1 and 2 came."""

    def test_the_ids_are_those_of_sentencepiece(self, sentencepiece_folder):
        reference = spm.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
        tokenizer = tokenizer_from_folder(sentencepiece_folder)
        for text in ["the cat", "The  quick dog\n12 3", *TEXTS[:7]]:
            assert encode(tokenizer, text).tolist() == reference.encode(text)
            assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)]

    def test_it_is_saved_and_read_again(self, sentencepiece_folder, tmp_path):
        tokenizer = tokenizer_from_folder(sentencepiece_folder)
        tokenizer.save_pretrained(tmp_path)
        assert tokenizer_from_folder(tmp_path)("the cat").input_ids == tokenizer("the cat").input_ids

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"\x00damaged", "is not a sentencepiece model"), (b"IQ== 0\nIg== 1\n", "a vocabulary for tiktoken.*copy")],
    )
    def test_what_is_none(self, tmp_path, content, message):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            tokenizer_from_folder(tmp_path)
        assert "\n" not in str(caught.value)


def test_code_from_the_folder_is_never_run(tmp_path):
    byte_level("gpt-2").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match=r"custom code"):
        tokenizer_from_folder(tmp_path)
