"""What the dense and the pruned model make of a few prompts, for reports."""

from __future__ import annotations

import logging
from typing import TypedDict

from intraslice_jax.model import LanguageModel
from intraslice_jax.models.cache import decode_block, prefill_block
from intraslice_jax.models.generate import generate
from intraslice_jax.progress import window_progress

log = logging.getLogger(__name__)

PROMPTS = ("The capital of France is", "Once upon a time", "Water boils when")
NEW_TOKENS = 30


class Sample(TypedDict):
    """A prompt and its continuations."""

    prompt: str
    dense: str
    pruned: str


def sample_texts(dense: LanguageModel, pruned: LanguageModel) -> list[Sample]:
    """Both models' likeliest continuations of `PROMPTS`, token by token.

    Empty, with a warning, where that fails (a context shorter than the texts, a logit that is not finite): the run
    that these texts illustrate is worth more than they are.
    """
    try:
        texts = {label: _continue(label, model) for label, model in (("dense", dense), ("pruned", pruned))}
    except Exception as error:  # whatever it is
        log.warning("no sample texts: %s", " ".join(str(error).split()) or type(error).__name__)
        return []
    finally:
        for function in (prefill_block, decode_block):
            function.clear_cache()  # a program for every distinct layer, megabytes each
    return [
        {"prompt": prompt, "dense": before, "pruned": after}
        for prompt, before, after in zip(PROMPTS, texts["dense"], texts["pruned"], strict=True)
    ]


def _continue(label: str, model: LanguageModel) -> list[str]:
    done = 0

    def count(row: int, token: int, text: str) -> None:
        nonlocal done
        done += 1
        on_batch(done, len(PROMPTS) * NEW_TOKENS)

    with window_progress(f"sample texts, {label}") as on_batch:
        return generate(model, PROMPTS, NEW_TOKENS, on_token=count).texts
