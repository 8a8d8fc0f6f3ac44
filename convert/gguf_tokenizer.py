"""Tokenizers as GGUF metadata: what `tokenizer.py` rebuilds them from, written the other way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from intraslice_jax.config import ModelConfig
from intraslice_jax.convert.tokenizer import BYTE, CONTROL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED, pre_tokenizer
from intraslice_jax.errors import InputError

_NORMAL, _UNUSED = 1, 5
# Text on which every known pre-tokenizer cuts differently from the others.
_PROBE = (
    "Hello,  world!\n\n  It's 12345 o'CLOCK; we'LL see\t3.14 x² naïve Straße café 東京は晴れ! HTTPServer/fooBar\r\n "
    "...//  [x]=2024\n/ end \n"
)


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> dict[str, Any]:
    """The `tokenizer.*` keys.

    Args:
        tokenizer: of the `tokenizers` library: byte-level BPE, or sentencepiece's BPE with bytes as fallback.
        config: the model, whose vocabulary may be larger than the tokenizer's and whose end tokens count.

    Raises:
        InputError: it is another kind, or cuts text in a way that has no name in llama.cpp.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = spec["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer is of the kind {model['type']}; GGUF files can hold BPE tokenizers")
    tokens, types = _tokens(tokenizer, spec, config)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": types}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        keys |= {"model": "llama", "scores": _scores(tokens, types, merges), "pre": "default"}
        keys["add_space_prefix"] = tokenizer.convert_ids_to_tokens(_encode(tokenizer, "a"))[0].startswith("▁")
    else:
        if not merges:
            raise InputError("the tokenizer has no merges; llama.cpp does not read such vocabularies")
        keys |= {"model": "gpt2", "merges": [" ".join(merge) for merge in merges], "pre": _pre_name(backend, spec)}
    ids = {
        "bos": config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos": next(iter(config.eos_token_id), tokenizer.eos_token_id),
        "eot": next(iter(config.eos_token_id[1:]), None),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    keys |= {f"{role}_token_id": int(index) for role, index in ids.items() if index is not None}
    whole = tokenizer("a").input_ids
    keys["add_bos_token"] = bool(whole) and whole[0] == ids["bos"]
    keys["add_eos_token"] = bool(whole) and whole[-1] == ids["eos"]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    template = getattr(tokenizer, "chat_template", None)
    return metadata | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _tokens(
    tokenizer: PreTrainedTokenizerBase, spec: Mapping[str, Any], config: ModelConfig
) -> tuple[list[str], list[int]]:
    """Token texts and their kinds by id; ids that the tokenizer does not use get a name of their own."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(texts) >= config.vocab_size:
        raise InputError(f"the tokenizer has token {max(texts)}, the model's vocabulary only {config.vocab_size}")
    added = {entry["id"]: entry["special"] for entry in spec["added_tokens"]}
    unknown, fallback = spec["model"].get("unk_token"), spec["model"].get("byte_fallback")
    tokens, types = [], []
    for index in range(config.vocab_size):
        text = texts.get(index)
        tokens.append(f"[UNUSED{index}]" if text is None else text)
        if text is None:
            kind = _UNUSED
        elif text == unknown:
            kind = UNKNOWN
        elif index in added:
            kind = CONTROL if added[index] else USER_DEFINED
        elif fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = BYTE
        else:
            kind = _NORMAL
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Sentencepiece's scores: the earlier a piece is merged the higher; single characters come last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [
        -float(ranks.get(token, len(merges) + index)) if kind in (_NORMAL, USER_DEFINED) else 0.0
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _pre_name(backend: Any, spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer cuts text: the first that cuts a probing text alike."""
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer in (None, "NFC"):  # llama.cpp applies none; NFC leaves nearly all text as it is
        cut = backend.pre_tokenizer.pre_tokenize_str(_PROBE) if backend.pre_tokenizer else None
        whole = bool(spec["model"].get("ignore_merges"))
        for name, pre in PRE_TOKENIZERS.items():
            if pre.whole_words == whole and pre_tokenizer(pre).pre_tokenize_str(_PROBE) == cut:
                return name
    raise InputError(
        "the tokenizer cuts text in a way that has no known name in llama.cpp; "
        f"known: {', '.join(sorted(PRE_TOKENIZERS))}"
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
