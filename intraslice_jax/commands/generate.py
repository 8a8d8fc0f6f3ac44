"""`intraslice generate`: continue a prompt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from intraslice_jax.commands._types import Checkpoint, Config, Dtype, JsonOutput


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue a prompt.

    Attributes:
        checkpoint: what `prune` or `convert` wrote, or any model.
        prompt: the text to continue.
        max_new_tokens: how many tokens at most.
        temperature: 0 takes the likeliest token each time; higher values sample.
        top_k: sample from this many likeliest tokens, 0 for all.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: seed of the sampling.
        dtype: dtype of the weights; as stored if not given.
        output: JSON file for the result.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace the JSON file if it exists.
    """

    checkpoint: Checkpoint
    prompt: Positional[Annotated[str, arg(metavar="PROMPT")]]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    dtype: Dtype | None = None
    output: JsonOutput = None
    config: Config = None
    overwrite: bool = False


def run(options: Options) -> None:
    """Loads, generates, prints prompt and continuation."""
    from intraslice_jax.commands._output import check_json_output, write_json

    check_json_output(options.output, options.overwrite)

    from intraslice_jax import api
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.settings import as_settings

    model = api.load(options.checkpoint, options.dtype)
    started = time.monotonic()
    text = api.generate(
        model,
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(options.prompt + text)
    if options.output is not None:
        facts = {
            "prompt": options.prompt,
            "continuation": text,
            "seconds": time.monotonic() - started,
            "settings": as_settings(options),
            "versions": versions(),
        }
        write_json(options.output, facts)
