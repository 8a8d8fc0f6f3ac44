"""Pictures and pages to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intraslice_jax.io.atomic import write_bytes
from intraslice_jax.report.pictures import draw_run


def draw(report: Mapping[str, Any]) -> dict[str, bytes] | None:
    """The pictures of a run, None if matplotlib is not installed."""
    try:
        return draw_run(report)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None


def write_page(folder: str | Path, html: str, images: Mapping[str, bytes]) -> None:
    """Writes `report.html`, and the pictures it holds as `pictures/*.png` too."""
    folder = Path(folder)
    for name, image in images.items():
        write_bytes(folder / "pictures" / f"{name}.png", image)
    write_bytes(folder / "report.html", html.encode("utf-8"))
