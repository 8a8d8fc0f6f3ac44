"""The pictures of a run, as PNG files' bytes.

They are small and of high resolution, so that their labels stay readable on a telephone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ATTENTION, MLP, GREY, CUT = "#2563a8", "#c8641b", "#777777", "#e03131"
"""Blue and orange keep apart for the colour-blind."""

WIDTH, DPI = 5.0, 200
LEAST_SHARE = 1e-6
"""Shares below are drawn here, as zero has no logarithm."""

PANELS = 6
"""Layers whose spectra are drawn one by one."""


def draw_run(report: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG bytes by name, without the pictures that the run has no data for.

    Raises:
        ImportError: matplotlib is not installed (the extra `report` brings it).
    """
    drawings: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
        "ratios": _ratios,
        "heads": _heads,
        "spectra": _spectra,
        "spectra-by-layer": _spectra_by_layer,
        "errors": _errors,
        "time": _time,
    }
    figures = {name: draw(report) for name, draw in drawings.items()}
    return {name: to_png(figure) for name, figure in figures.items() if figure is not None}


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _axes(height: float = 2.9, ylabel: str = "") -> tuple[Figure, Axes]:
    figure = _figure(height)
    axes = figure.subplots()
    axes.set_ylabel(ylabel)
    axes.set_xlabel("layer")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return figure, axes


def _ratios(report: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(ylabel="removed, %")
    for module, colour in (("attention", ATTENTION), ("mlp", MLP)):
        removed = 100 * np.asarray(report["removed_by_layer"][module])
        name = module if module == "attention" else "MLP"
        axes.plot(removed, color=colour, marker="o", markersize=3, label=name)
        if "ratios" in report:
            axes.plot(100 * np.asarray(report["ratios"][module]), color=colour, linestyle=":", alpha=0.8)
    axes.plot([], [], color=GREY, linestyle=":", label="asked")
    axes.update_datalim([(0.0, 0.0)])  # so that zero is shown, with the usual margins around the curves
    axes.autoscale_view()
    axes.legend(fontsize=8)
    return figure


def _heads(report: Mapping[str, Any]) -> Figure:
    """Rows are layers, columns query heads; a kept head has the colour of its KV head."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    layers, dense = report["layers"], report["dense_layers"]
    widest = max(len(shape["query_to_kv"]) for shape in dense)
    image = np.ones((len(layers), widest, 3))
    shades = colormaps["viridis"]
    for row, (layer, shape) in enumerate(zip(layers, dense, strict=True)):
        groups = shape["query_to_kv"]
        kept = set(layer["kept_heads"])
        for head, kv in enumerate(groups):
            colour = shades(0.1 + 0.7 * (kv % 8) / min(7, max(1, groups[-1])))[:3]
            image[row, head] = colour if head in kept else to_rgb("#e4e4e4")
    figure = _figure(min(7.0, 1.2 + 0.11 * len(layers)))
    axes = figure.subplots()
    axes.pcolormesh(
        np.arange(widest + 1) - 0.5, np.arange(len(layers) + 1) - 0.5, image, edgecolors="white", linewidth=0.6
    )
    axes.invert_yaxis()
    axes.set_xlabel("query head; grey: dropped, colours: KV heads")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return figure


def _layer_spectra(report: Mapping[str, Any]) -> dict[int, np.ndarray]:
    """[KV heads, components] of each layer that has spectra."""
    notes = {layer["layer"]: layer["notes"].get("attention", {}).get("value_spectra") for layer in report["layers"]}
    return {layer: np.asarray(note["shares"]) for layer, note in notes.items() if note}


def _spectra(report: Mapping[str, Any]) -> Figure | None:
    spectra = _layer_spectra(report)
    if not spectra:
        return None
    widest = max(shares.shape[1] for shares in spectra.values())
    image = np.full((len(report["layers"]), widest), np.nan)
    for layer, shares in spectra.items():
        image[layer, : shares.shape[1]] = np.log10(np.maximum(shares.mean(0), LEAST_SHARE))
    figure = _figure(min(6.5, 2.2 + 0.09 * len(image)))
    axes = figure.subplots()
    colours = axes.imshow(image, aspect="auto", cmap="viridis", interpolation="nearest", extent=_extent(image))
    cuts = [layer["v_head_dim"] if layer["layer"] in spectra else np.nan for layer in report["layers"]]
    edges = np.arange(len(cuts) + 1) - 0.5
    ends = np.stack([edges[:-1], edges[1:]], 1).ravel()  # the upper and the lower edge of each row
    axes.plot(np.repeat(cuts, 2), ends, color=CUT, linewidth=1.5)
    axes.yaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    axes.set_xlabel("principal component of the values")
    axes.set_ylabel("layer")
    figure.colorbar(colours, ax=axes, label="log10 of the share")
    return figure


def _extent(image: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = image.shape
    return 0.0, float(columns), rows - 0.5, -0.5


def _spectra_by_layer(report: Mapping[str, Any]) -> Figure | None:
    spectra = _layer_spectra(report)
    if not spectra:
        return None
    layers = sorted(spectra)
    shown = [layers[i] for i in sorted({round(k) for k in np.linspace(0, len(layers) - 1, PANELS)})]
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(0.4 + 1.6 * rows)
    grid: Sequence[Axes] = np.ravel(figure.subplots(rows, columns, sharey=True, squeeze=False))  # pyright: ignore
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, layer in zip(grid, shown, strict=False):
        for shares in spectra[layer]:
            axes.semilogy(np.arange(1, len(shares) + 1), np.maximum(shares, LEAST_SHARE), linewidth=1)
        axes.axvline(report["layers"][layer]["v_head_dim"] + 0.5, color=CUT, linestyle="--", linewidth=1.2)
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    figure.supxlabel("component; a line per KV head, kept left of the dashes", fontsize=9)
    figure.supylabel("share of the energy", fontsize=9)
    return figure


def _errors(report: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(ylabel="relative squared error")
    for module, colour in (("attention", ATTENTION), ("mlp", MLP)):
        values = [layer[f"{module}_error"] for layer in report["layers"]]
        name = module if module == "attention" else "MLP"
        axes.plot(np.maximum(values, LEAST_SHARE), color=colour, marker="o", markersize=3, label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


def _time(report: Mapping[str, Any]) -> Figure:
    figure, axes = _axes(ylabel="seconds")
    seconds = [layer["seconds"] for layer in report["layers"]]
    axes.bar(range(len(seconds)), seconds, color=ATTENTION)
    return figure
