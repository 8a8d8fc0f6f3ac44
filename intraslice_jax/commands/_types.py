"""Options that several commands spell the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

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


def _listed(kind: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec:
    """Values with commas or spaces between them."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda given: tuple(kind(part) for item in given for part in item.split(",") if part),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


Names = Annotated[tuple[str, ...], _listed(str, "NAME,NAME,...")]
Numbers = Annotated[tuple[float, ...], _listed(float, "FRACTION,FRACTION,...")]
