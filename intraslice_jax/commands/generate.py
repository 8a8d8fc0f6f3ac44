"""`intraslice generate`: continue a prompt."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from intraslice_jax.commands._types import Checkpoint, Config, Dtype, JsonOutput
from intraslice_jax.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Continue a prompt.

    Attributes:
        checkpoint: what `prune` or `convert` wrote, or any model.
        prompt: the text to continue.
        max_new_tokens: how many tokens at most; 64, or what the context leaves if that is less, if not given.
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
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    dtype: Dtype | None = None
    output: JsonOutput = None
    config: Config = None
    overwrite: bool = False
    parallel: OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)


def run(options: Options) -> None:
    """Loads, generates, prints prompt and continuation."""
    from intraslice_jax.commands._output import check_json_output, write_json

    check_json_output(options.output, options.overwrite)

    from intraslice_jax import api
    from intraslice_jax.io.checkpoint import versions
    from intraslice_jax.models.generate import generate
    from intraslice_jax.parallel.distributed import is_first
    from intraslice_jax.parallel.mesh import make_mesh
    from intraslice_jax.settings import as_settings

    model = api.load(options.checkpoint, options.dtype, make_mesh(options.parallel.mesh))
    model.require_tokenizer()
    started = time.monotonic()
    stream = sys.stdout.isatty()
    if stream:
        print(options.prompt, end="", flush=True)
    result = generate(
        model,
        options.prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        (lambda _, __, text: print(text, end="", flush=True)) if stream else None,
    )
    print("" if stream else options.prompt + result.texts[0])
    if options.output is not None and is_first():
        facts = {
            "prompt": options.prompt,
            "continuation": result.texts[0],
            "tokens": result.tokens[0],
            "seconds": time.monotonic() - started,
            "settings": as_settings(options),
            "versions": versions(),
        }
        write_json(options.output, facts)
