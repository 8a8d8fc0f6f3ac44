"""Options that several commands spell the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Model = Positional[Annotated[str, arg(metavar="MODEL")]]
"""A folder, a hub id, a .gguf file or a checkpoint."""

Checkpoint = Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
"""What `prune` or `convert` wrote, or any MODEL."""

Out = Positional[Annotated[Path, arg(metavar="OUT")]]
Output = Annotated[Path, arg(aliases=["-o"], metavar="OUT")]
JsonOutput = Annotated[Path | None, arg(aliases=["-o"], metavar="FILE.json")]
Config = Annotated[Path | None, arg(metavar="FILE.yaml")]
Files = Annotated[tuple[str, ...], arg(metavar="FILE")]
Dtype = Literal["float32", "bfloat16", "float16"]
