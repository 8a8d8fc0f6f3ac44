"""What `report.json` and the results of `eval` hold, as far as this program reads them again.

Every key may be missing here: reports of older versions lack some, and a checkpoint of an unpruned model has none at
all. What a reader cannot do without it asks for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from intraslice_jax.errors import InputError
from intraslice_jax.reading import Count, Finite, Index, check

VERSION = 1
"""`format_version` of what is written; files of before there was one have none."""

Parameters = Annotated[int, Field(ge=0, le=2**60)]
Bytes = Annotated[int, Field(ge=0, le=2**60)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Removed = Annotated[float, Field(ge=-1e6, le=1)]
"""A fraction of parameters; negative where more were added."""

Error = Annotated[float, Field(ge=-1e100, le=1e100)]
PositiveOrInfinite = Annotated[float, Field(gt=0)]
"""A perplexity; of a ruined model it is infinite."""

Losses = dict[Annotated[str, Field(max_length=32)], float]
"""Nats per token by band of positions, as `1-3`."""

MAX_LAYERS = MAX_HEADS = 1024
_open = with_config(ConfigDict(extra="allow"))
"""Keys that nobody reads are kept."""


class BeforeAndAfter(TypedDict):
    """Numbers of parameters of the dense and of the pruned model."""

    dense: Parameters
    pruned: Parameters


@_open
class DenseLayer(TypedDict):
    """A layer's widths before."""

    query_to_kv: Annotated[list[Index], Field(min_length=1, max_length=MAX_HEADS)]
    qk_head_dim: Index
    v_head_dim: Index
    intermediate_size: Index


@_open
class Spectra(TypedDict):
    """Shares of the values' energy, [KV heads, components]."""

    shares: Annotated[list[Annotated[list[Finite], Field(min_length=1)]], Field(min_length=1, max_length=MAX_HEADS)]


@_open
class ModuleNotes(TypedDict, total=False):
    """What a method notes about one module."""

    solver: str
    value_spectra: Spectra | None


@_open
class Notes(TypedDict, total=False):
    """What a method notes about a layer."""

    attention: ModuleNotes
    mlp: ModuleNotes


@_open
class Layer(TypedDict):
    """What happened to a layer."""

    layer: Index
    kept_heads: Annotated[list[Index], Field(max_length=MAX_HEADS)]
    query_heads: Index
    kv_heads: Index
    qk_head_dim: Index
    v_head_dim: Index
    intermediate_size: Index
    attention_error: Error
    mlp_error: Error
    notes: Notes
    seconds: Seconds


@_open
class ByModule(TypedDict):
    """A number per layer for each kind of module."""

    attention: list[Removed]
    mlp: list[Removed]


@_open
class Stage(TypedDict):
    """A stage of the run."""

    stage: str
    seconds: Seconds
    peak_rss_bytes: Bytes
    peak_device_bytes: NotRequired[Bytes]


@_open
class MeasuredText(TypedDict):
    """Perplexities on one text."""

    dense_perplexity: PositiveOrInfinite
    pruned_perplexity: PositiveOrInfinite
    dense_loss_by_position: NotRequired[Losses]
    pruned_loss_by_position: NotRequired[Losses]
    evaluated_tokens: Count
    sequence_length: Count
    text_sha256: str


class Sample(TypedDict):
    """A prompt and what both models made of it."""

    prompt: str
    dense: str
    pruned: str


class Divergence(TypedDict):
    """Nats per token before and after the refinement; a NaN where it failed."""

    before: float
    after: float


@_open
class Refinement(TypedDict, total=False):
    """What the refinement did."""

    accepted: bool
    held_out_divergence: Divergence


@_open
class PruneSettings(TypedDict, total=False):
    """Of the section `prune`."""

    ratios: str


@_open
class CalibrateSettings(TypedDict, total=False):
    """Of the section `calibrate`."""

    calibration: list[str]


@_open
class Settings(TypedDict, total=False):
    """The options of the run."""

    preset: str
    prune: PruneSettings
    calibrate: CalibrateSettings


@_open
class StoredReport(TypedDict, total=False):
    """What is read of the report of any checkpoint; whoever made the model may have put anything else in."""

    removed_block_fraction: Removed
    removed_model_fraction: Removed
    calibration_samples: Count
    calibration_sequence_length: Count


@_open
class Report(StoredReport, total=False):
    """What a run recorded."""

    model: str
    method: str
    sparsity: Finite
    block_parameters: BeforeAndAfter
    total_parameters: BeforeAndAfter
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MAX_LAYERS)]
    dense_layers: Annotated[list[DenseLayer], Field(min_length=1, max_length=MAX_LAYERS)]
    removed_by_layer: ByModule
    ratios: ByModule
    refinement: Refinement
    stages: list[Stage]
    texts: dict[str, MeasuredText]
    samples: list[Sample]
    command: str
    settings: Settings
    versions: dict[str, str]
    seconds: Seconds
    peak_rss_bytes: Bytes


@_open
class TaskScores(TypedDict):
    """What `eval` found for a task."""

    task: str
    items: Index | None
    metrics: dict[str, float]
    standard_errors: dict[str, float]


@_open
class Evaluation(TypedDict):
    """What `eval --output` writes."""

    parameters: Parameters
    block_parameters: Parameters
    perplexity: NotRequired[PositiveOrInfinite]
    text: NotRequired[str]
    text_sha256: NotRequired[str]
    sequence_length: NotRequired[Count]
    evaluated_tokens: NotRequired[Count]
    loss_by_position: NotRequired[Losses]
    bos: NotRequired[bool]
    tasks: NotRequired[list[TaskScores]]


def check_report(data: Any, path: Path) -> dict[str, Any]:
    """A parsed `report.json`, checked; its lists agree about the number of layers.

    Raises:
        InputError: something is of a wrong type, out of range, or contradicts the rest.
    """
    check_version(data, path)
    report = cast(dict[str, Any], check(data, Report, str(path)))
    _check_lengths(report, path)
    for i, layer in enumerate(report.get("layers", [])):
        if layer["layer"] != i:
            raise InputError(f"{path}: entry {i} of layers is about layer {layer['layer']}; the file is damaged")
        spectra = layer["notes"].get("attention", {}).get("value_spectra")
        if spectra and len({len(shares) for shares in spectra["shares"]}) > 1:
            raise InputError(f"{path}: the value_spectra of layer {i} differ in length; the file is damaged")
    return report


def _check_lengths(report: Mapping[str, Any], path: Path) -> None:
    by_layer = {name: report[name] for name in ("layers", "dense_layers") if name in report}
    for name in ("removed_by_layer", "ratios"):
        if name in report:
            by_layer |= {f"{name}.{module}": report[name][module] for module in ("attention", "mlp")}
    if len({len(entries) for entries in by_layer.values()}) > 1:
        counts = ", ".join(f"{len(entries)} in {name}" for name, entries in by_layer.items())
        raise InputError(f"{path} has entries of different numbers of layers: {counts}; the file is damaged")


def check_evaluation(data: Any, path: Path) -> Evaluation:
    """A parsed result of `eval`, checked.

    Raises:
        InputError: something is missing, of a wrong type or out of range.
    """
    check_version(data, path)
    found = check(data, Evaluation, str(path))
    for name in ("text_sha256", "sequence_length", "evaluated_tokens"):
        if "perplexity" in found and name not in found:
            raise InputError(f"{path} has a perplexity and no {name}; measure it again with `intraslice eval`")
    return found


def check_version(data: Any, path: Path) -> None:
    """Raises InputError for a file of a later version of the format."""
    version = data.get("format_version", VERSION) if isinstance(data, Mapping) else VERSION
    if version != VERSION:
        shown = repr(version)[:40]
        raise InputError(
            f"{path} has format version {shown}, this program reads {VERSION}; use the program that wrote it"
        )
