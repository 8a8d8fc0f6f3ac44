"""What the dense and the pruned model make of a few prompts, for reports."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from intraslice_jax.models.generate import generate
from intraslice_jax.models.padding import pad_attention, pad_mlp
from intraslice_jax.parallel.placement import mesh_of, put_weights, to_host
from intraslice_jax.prune.calibration import part

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
        models = dense, in_shapes_of(dense, pruned)
        before, after = (generate(model, PROMPTS, NEW_TOKENS, on_token=count).texts for model in models)
    except Exception as error:  # whatever it is
        log.warning("no sample texts: %s", " ".join(str(error).split()) or type(error).__name__)
        return []
    return [{"prompt": p, "dense": b, "pruned": a} for p, b, a in zip(PROMPTS, before, after, strict=True)]


def in_shapes_of(dense: LanguageModel, pruned: LanguageModel) -> LanguageModel:
    """The pruned model with zeros for what went, in the dense one's shapes.

    It computes the same with the programs of one layer, where the small model takes those of each shape: compiling them
    costs more than a few short texts.
    """
    config = pruned.config.with_layers(dense.config.layers)
    arrays = dict(decoder_to_arrays(pruned.decoder))
    for i, (narrow, wide) in enumerate(zip(pruned.config.layers, dense.config.layers, strict=True)):
        layer = {name: to_host(array) for name, array in decoder_to_arrays(pruned.decoder.layers[i]).items()}
        layer |= {f"attention.{n}": a for n, a in pad_attention(part(layer, "attention"), narrow, wide).items()}
        layer |= {f"mlp.{n}": a for n, a in pad_mlp(part(layer, "mlp"), wide.intermediate_size).items()}
        arrays |= {f"layers.{i}.{name}": array for name, array in layer.items()}
    mesh = mesh_of(pruned.decoder)
    decoder = decoder_from_arrays(config, arrays if mesh is None else put_weights(arrays, mesh))
    return dataclasses.replace(pruned, config=config, decoder=decoder)
