"""A model in memory with all that travels with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from intraslice_jax.config import ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import Decoder


@dataclass(frozen=True)
class LanguageModel:
    """A decoder, its description, its tokenizer, and where it came from.

    Attributes:
        name: what the user named to get it (a folder, a hub id, a file).
        generation_config: the original's generation settings (stop tokens, sampling), for exports.
        report: what the pruning run recorded, empty for an unpruned model.
    """

    config: ModelConfig
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    generation_config: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, or an InputError that says how to add one."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer; put the model's tokenizer.json and tokenizer_config.json beside it"
            )
        return self.tokenizer
