"""Tokenizers written so that every release of transformers reads them, not only the one that writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

# Where tokenizer.json says how text is cut and joined, this is all that the configuration beside it has to say.
_KEPT = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("model_max_length", "clean_up_tokenization_spaces", "padding_side", "truncation_side", "model_input_names"),
    "chat_template",
)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer's files into a folder.

    transformers 5 names classes and keys that 4.x does not know (`TokenizersBackend`, `local_files_only`, a list of
    `extra_special_tokens`, templates in files of their own). A tokenizer that `tokenizer.json` describes whole gets a
    configuration with the class and the keys that both know; others stay as transformers writes them.

    Args:
        tokenizer: any.
        folder: exists.
    """
    if not tokenizer.is_fast:
        tokenizer.save_pretrained(folder)
        return
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text("utf-8"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {key: written[key] for key in _KEPT if key in written}
    config |= {key: _text(value) for key, value in config.items() if key.endswith("_token")}
    config["clean_up_tokenization_spaces"] = bool(tokenizer.clean_up_tokenization_spaces)  # 4.x takes true for missing
    extra = written.get("extra_special_tokens") or written.get("additional_special_tokens")
    if extra:
        config["additional_special_tokens"] = [_text(token) for token in extra]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _text(token: str | dict[str, Any]) -> str:
    """A token without its flags, which stand in tokenizer.json."""
    return token if isinstance(token, str) else token["content"]
