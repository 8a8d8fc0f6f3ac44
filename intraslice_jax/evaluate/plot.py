"""A comparison as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from intraslice_jax.evaluate.compare import Row

LARGEST = 1e30
"""Perplexities from here on are of ruined models and would flatten the picture."""


def plot_rows(rows: Sequence[Row], title: str, path: str | Path | BytesIO) -> bool:
    """Draws perplexity over the removed fraction, a line per method and estimator, into an image file.

    Args:
        rows: of a comparison; those without a perplexity, or one beyond `LARGEST`, are left out.
        title: what stands above.
        path: where to; the ending says the format, an open file gets a PNG.

    Returns:
        False if matplotlib is not installed (the extra `report` brings it); then nothing is written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError:
        return False
    lines: dict[str, list[tuple[float, float]]] = {}
    dense = None
    for row in rows:
        if row.perplexity is None or row.removed_block_fraction is None or not row.perplexity < LARGEST:
            continue
        if row.method == "dense":
            dense = row.perplexity
        else:
            label = f"{row.method}, {row.ratios}" if row.ratios else row.method
            lines.setdefault(textwrap.fill(label, 40), []).append((100 * row.removed_block_fraction, row.perplexity))
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    if dense is not None:
        axes.axhline(dense, color="black", linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 30, not 3 x 10^1
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.set_xlabel("removed from the decoder layers, %")
    axes.set_ylabel("perplexity")
    axes.set_title(textwrap.fill(title, 60), parse_math=False)  # names may hold dollar signs
    axes.grid(alpha=0.3, which="both")
    if lines or dense is not None:
        for label in axes.legend().get_texts():
            label.set_parse_math(False)
    figure.savefig(path, dpi=150)
    return True
