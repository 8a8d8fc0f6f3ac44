"""Tokenizers: as a folder has them, or rebuilt from a GGUF file's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Required

from pydantic import Field
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging
from typing_extensions import TypedDict

from intraslice_jax.convert.tokenizer_files import check_tokenizer_files, panics_unprinted
from intraslice_jax.errors import InputError, refused
from intraslice_jax.reading import Finite, Index, check, read_json

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
_VOCABULARIES = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})
_PROBE = "a\u0301 \u00e9\n"  # some damage shows only when the tokenizer is used
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type; 1 is a usual piece

# How the pre-tokenizers cut text before byte-pair merging; each is the one that the model was trained with.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace(_CONTRACTION, "").replace(r"\p{N}{1,3}", r"\p{N}")


class Pre(NamedTuple):
    """A pre-tokenizer of byte-level BPE.

    Attributes:
        pattern: regular expression of the pieces; None for GPT-2's own.
        digits: whether every digit stands alone first.
        whole_words: whether a piece that is a token is taken without merging.
        add_bos: whether llama.cpp puts the BOS token in front where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    add_bos: bool = False


PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2"), Pre()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), Pre(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "falcon3"), Pre(_LLAMA3, whole_words=True, add_bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Pre(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Pre(_QWEN2)),
    "gpt-4o": Pre(_GPT4O),
    "tekken": Pre(_TEKKEN, whole_words=True, add_bos=True),
}
# Files written before the key existed: what their architecture's only vocabulary uses.
_PRE_OF_ARCHITECTURE = {"phi2": "phi-2", "qwen2": "qwen2"}


# Longer ones are in no vocabulary; every way to cut a token in two is looked at.
_Token = Annotated[str, Field(max_length=4096)]
_Vocabulary = TypedDict(
    "_Vocabulary",
    {
        "general.architecture": str,
        "tokenizer.ggml.model": Required[str],
        "tokenizer.ggml.pre": str,
        "tokenizer.ggml.tokens": list[_Token],
        "tokenizer.ggml.token_type": list[int],
        "tokenizer.ggml.scores": list[Finite],
        "tokenizer.ggml.merges": list[str],
        "tokenizer.ggml.bos_token_id": Index,
        "tokenizer.ggml.eos_token_id": Index,
        "tokenizer.ggml.unknown_token_id": Index,
        "tokenizer.ggml.padding_token_id": Index,
        "tokenizer.ggml.add_bos_token": bool,
        "tokenizer.ggml.add_eos_token": bool,
        "tokenizer.ggml.add_space_prefix": bool,
        "tokenizer.chat_template": str,
    },
    total=False,
)


def tokenizer_from_folder(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a Hugging Face folder, None where it has no tokenizer's file at all.

    Raises:
        InputError: its files are damaged or incomplete, or need code from the folder.
    """
    there = [name for name in _FILES if (folder / name).is_file()]
    if not there:
        return None
    if not any(files.issubset(there) for files in _VOCABULARIES):
        # Some of transformers' classes would make an empty tokenizer of the rest.
        raise InputError(
            f"{folder} holds {', '.join(there)} but not the tokenizer's vocabulary; copy tokenizer.json beside it"
        )
    check_tokenizer_files(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of model types that only the exported modelling file knows
    problem = f"{folder}: the tokenizer ({', '.join(there)}) cannot be read"
    try:
        with refused(problem, "copy all of the model's tokenizer files again"), panics_unprinted():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **_without_config(folder)
            )
            tokenizer.decode(tokenizer(_PROBE)["input_ids"])
    finally:
        logging.set_verbosity(verbosity)
    if there == ["tokenizer.model"]:
        tokenizer.add_bos_token = True  # as sentencepiece's Llama models were trained; nothing else says so
    return tokenizer


def _without_config(folder: Path) -> dict[str, Any]:
    """For this program's exports: transformers cannot check their `config.json` without their modelling file."""
    try:
        pruned = read_json(folder / "config.json", dict[str, Any]).get("model_type") == "intraslice"
    except InputError:
        pruned = False
    return {"config": PreTrainedConfig()} if pruned else {}


def tokenizer_from_gguf(metadata: Mapping[str, Any], context_length: int) -> PreTrainedTokenizerBase | None:
    """A tokenizer rebuilt from a GGUF file's `tokenizer.*` metadata, None where there is none.

    Args:
        metadata: the file's key/value pairs.
        context_length: the model's, for `model_max_length`.

    Raises:
        InputError: the kind of tokenizer is not supported, or its parts do not fit together.
    """
    if "tokenizer.ggml.model" not in metadata:
        return None
    found = {key: metadata[key] for key in _Vocabulary.__annotations__ if key in metadata}
    metadata = check(found, _Vocabulary, "the vocabulary")
    kind, tokens = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.tokens")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise InputError(f"tokenizer.ggml.model {kind[:40]!r} is not supported; supported: {', '.join(builders)}")
    if not tokens:
        raise InputError("tokenizer.ggml.tokens is missing or empty")
    if len(set(tokens)) != len(tokens):
        raise InputError("tokenizer.ggml.tokens names a token twice")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise InputError(f"tokenizer.ggml.token_type has {len(types)} entries, expected {len(tokens)}")
    special = {
        role: _special(metadata, tokens, key)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    try:
        tokenizer, add_bos = builders[kind](metadata, tokens, types, special["unk"])
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for a vocabulary that does not fit its merges
        raise InputError(f"the tokenizer's vocabulary is damaged ({_first_line(error)})") from error

    # Phi-3's template writes a line break behind each special token, which the model never saw.
    strips = metadata.get("general.architecture") == "phi3" and kind == "llama"
    keeps = {"<unk>", "<s>", "<|endoftext|>"}
    for wanted, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=is_special, rstrip=strips and is_special and token not in keeps)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == wanted
        ]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(added)

    add_bos = metadata.get("tokenizer.ggml.add_bos_token", add_bos) and special["bos"] is not None
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and special["eos"] is not None
    if add_bos or add_eos:
        front = [str(special["bos"])] if add_bos else []
        back = [str(special["eos"])] if add_eos else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*front, "$A", *back],
            pair=[*front, "$A", *back, *front, "$B", *back],
            special_tokens=[(token, tokens.index(token)) for token in front + back],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{role}_token": token for role, token in special.items() if token is not None},
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """GPT-2's kind: bytes as printable characters, merged by a ranked list."""
    del types, unknown  # every byte has a token, so nothing is unknown
    architecture = metadata.get("general.architecture", "")
    name = metadata.get("tokenizer.ggml.pre", _PRE_OF_ARCHITECTURE.get(architecture))
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise InputError(
            f"tokenizer.ggml.pre {name!r:.40} is not supported; supported: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    model = BPE(vocab=_vocabulary(tokens), merges=_merges(metadata), ignore_merges=pre.whole_words)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, pre.add_bos


def pre_tokenizer(pre: Pre) -> pre_tokenizers.PreTokenizer:
    """What cuts text into the pieces within which tokens are merged."""
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """Llama 1/2's kind: characters merged by the scores of the results, bytes where a character has no token."""
    if "tokenizer.ggml.merges" in metadata:
        merges = _merges(metadata)
    else:
        scores = metadata.get("tokenizer.ggml.scores", [])
        if len(scores) != len(tokens):
            raise InputError(f"tokenizer.ggml.scores must hold {len(tokens)} numbers, one per token")
        merges = merges_from_scores(tokens, scores, types)
    model = BPE(
        vocab=_vocabulary(tokens),
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1, right=0)] * prefix
    )
    return tokenizer, True


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The ranked merges of a sentencepiece vocabulary: every way to cut a piece in two, best score first."""
    usual = [t not in (UNKNOWN, CONTROL, BYTE) for t in types]
    rank = {token: i for i, token in enumerate(tokens) if usual[i]}
    found = []
    for token, index in rank.items():
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]
        halves = [(rank[a], rank[b], a, b) for a, b in cuts if a in rank and b in rank]
        found += [(-scores[index], index, *half) for half in sorted(halves)]
    return [(a, b) for *_, a, b in sorted(found)]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "tokenizer.ggml.merges" not in metadata:
        raise InputError("tokenizer.ggml.merges is missing")
    lines = metadata["tokenizer.ggml.merges"]
    merges = [tuple(line.split(" ")) for line in lines]
    bad = next((line for line, merge in zip(lines, merges, strict=True) if len(merge) != 2), None)
    if bad is not None:
        raise InputError(f"tokenizer.ggml.merges holds {bad[:40]!r}, expected two tokens with a space between")
    return [(a, b) for a, b in merges]


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _special(metadata: Mapping[str, Any], tokens: list[str], key: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if index >= len(tokens):
        raise InputError(f"tokenizer.ggml.{key}_token_id {index} is outside the vocabulary of {len(tokens)}")
    return tokens[index]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
