"""What the dense and the pruned model make of a few prompts, for reports."""

from __future__ import annotations

import logging
from collections.abc import Callable

from intraslice_jax.model import LanguageModel
from intraslice_jax.models.generate import generate

log = logging.getLogger(__name__)

PROMPTS = ("The capital of France is", "Once upon a time", "The river rises in the mountains and")
NEW_TOKENS = 30


def sample_texts(
    dense: LanguageModel, pruned: LanguageModel, on_token: Callable[[int, int], None] | None = None
) -> list[dict[str, str]]:
    """Both models' likeliest continuations of `PROMPTS`: for each its `prompt`, `dense` and `pruned`.

    Empty, with a warning, where that fails (a context shorter than the texts, a logit that is not finite): the run
    that these texts illustrate is worth more than they are.

    Args:
        dense: a model with a tokenizer.
        pruned: another one, of the same tokenizer.
        on_token: called with the tokens done and the most that there can be.
    """
    done, most, tell = 0, 2 * len(PROMPTS) * NEW_TOKENS, on_token or (lambda done, most: None)

    def count(row: int, token: int, text: str) -> None:
        nonlocal done
        done += 1
        tell(done, most)

    tell(0, most)
    try:
        before, after = (generate(model, PROMPTS, NEW_TOKENS, on_token=count).texts for model in (dense, pruned))
    except Exception as error:  # whatever it is
        log.warning("no sample texts: %s", " ".join(str(error).split()) or type(error).__name__)
        return []
    return [{"prompt": p, "dense": b, "pruned": a} for p, b, a in zip(PROMPTS, before, after, strict=True)]
