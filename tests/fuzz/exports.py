"""The `config.json` of a pruned export."""

import json
from pathlib import Path

from intraslice_jax.convert.hf import read_config
from intraslice_jax.convert.pruned_config import pruned_config
from tests.convert.exported import make
from tests.fuzz.harness import Target, mutate_json


def _example(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(pruned_config(make("qwen2").config, "float32")))
    return path


def targets() -> list[Target]:
    """The formats of this part."""
    return [Target("config.json of an export", _example, read_config, (mutate_json,))]
