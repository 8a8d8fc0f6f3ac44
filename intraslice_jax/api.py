"""The Python API: what the command line does, as functions on models in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from intraslice_jax import convert
from intraslice_jax.calibrate import data
from intraslice_jax.calibrate.documents import JoinedText, read_files
from intraslice_jax.calibrate.sources import TEXT_SUFFIXES
from intraslice_jax.calibrate.windows import calibration_windows, consecutive_windows, with_bos
from intraslice_jax.config import (
    CalibrationConfig,
    PruneConfig,
    PruneSettings,
    default_preset,
    window_length,
    with_layout,
)
from intraslice_jax.config import preset as named_preset
from intraslice_jax.convert.assemble import DTYPES
from intraslice_jax.convert.formats import Format, format_of
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.perplexity import perplexity as measure_perplexity
from intraslice_jax.identity import run_identity
from intraslice_jax.io.checkpoint import is_checkpoint, open_checkpoint, restore, save, versions
from intraslice_jax.io.journal import Journal
from intraslice_jax.model import LanguageModel, StoredModel, as_stored
from intraslice_jax.models.generate import generate as continue_prompts
from intraslice_jax.prune.pipeline import LayerRecord, OnStage, prune_model
from intraslice_jax.settings import closest

__all__ = ["export", "generate", "load", "perplexity", "prune", "restore", "save"]

Text = str | Path | Sequence[Path]
"""A text itself, or the files that hold it."""


def load(
    source: str | Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    residency: Literal["device", "host", "disk"] = "device",
) -> LanguageModel:
    """A model from a checkpoint of this program, a Hugging Face folder or hub id, or a .gguf file.

    Args:
        source: a path, or the id of a model on the hub.
        dtype: what the weights become (`float32`, `bfloat16`, `float16`); None keeps what is stored.
        mesh: devices to spread the weights over (`intraslice_jax.parallel.mesh.make_mesh`); each process reads only
            the parts of its own. What is done with the model then runs on the mesh.
        residency: where the layers are: all on the devices, or in host memory or their files until they are used.
            Then two of them at most are on the devices. Of several processes each has, there too, only the parts of
            its own devices.

    Raises:
        InputError: the source does not exist, is damaged, or is of an unsupported architecture.
    """
    if residency not in ("device", "host", "disk"):
        raise InputError(f"residency must be device, host or disk, found {residency!r}")
    if residency != "device":
        return open_stored(source, dtype).streamed(mesh, host=residency == "host")
    if is_checkpoint(source):
        return cast(restore(source, mesh), dtype)
    return convert.open_stored(source, dtype).in_memory(mesh)


def open_stored(source: str | Path, dtype: str | None = None) -> StoredModel:
    """`load` without reading the weights, to `save` or `export` a model that does not fit into memory.

    Args:
        source: as for `load`.
        dtype: as for `load`.

    Raises:
        InputError: as `load`; damaged numbers are found when they are read.
    """
    if not is_checkpoint(source):
        return convert.open_stored(source, dtype)
    _check_dtype(dtype)
    return open_checkpoint(source, dtype)


def cast(model: LanguageModel, dtype: str | None) -> LanguageModel:
    """The model with its floating-point weights in another dtype; None leaves them.

    Raises:
        InputError: the dtype is none of those that models come in.
    """
    _check_dtype(dtype)
    if dtype is None:
        return model

    def to_dtype(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return dataclasses.replace(model, decoder=jax.tree.map(to_dtype, model.decoder))


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; expected {', '.join(DTYPES)}")


def prune(
    model: LanguageModel,
    text: Text,
    sparsity: float | None = None,
    *,
    preset: Literal["fast", "paper", "quality"] | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    sampling: Literal["documents", "random"] = "documents",
    seed: int = 0,
    on_layer: Callable[[LayerRecord], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    journal: str | Path | None = None,
    **settings: Unpack[PruneSettings],
) -> LanguageModel:
    """A smaller model, calibrated on a text.

    Args:
        model: what to prune; it stays as it is.
        text: calibration text, of the kind that the model will see: the text itself, or a `pathlib.Path` or several
            that hold it.
        sparsity: fraction of the attention and MLP parameters of the decoder layers to remove, in [0, 1); 0.3 if not
            given, or what a file of `ratios` removes.
        preset: settings to begin with, which `**settings` change: `fast` does the least, `paper` is the paper's
            method, `quality` the best that is known. None is `quality`, or `fast` for the `method` of a baseline.
        samples: number of calibration windows.
        sequence_length: tokens per window, None for 2,048 or the model's context if that is shorter.
        sampling: `documents` lets every second window begin where a document begins (or after a blank line), with BOS
            if the tokenizer puts one before a text; `random` cuts out all anywhere, as the pruning literature does.
        seed: seed of the windows' positions.
        on_layer: called after each layer with its record.
        on_batch: called while the ratios are estimated (`ratios` other than `uniform`), and while the pruned model is
            refined, with the sequences or measurements done and their number.
        journal: a folder in which to keep every finished layer. An interrupted run is continued by the same call, to
            the same bits. The folder stays: remove it once the model is saved.
        **settings: further fields of `intraslice_jax.config.PruneConfig`, which says what they mean. `layout="uniform"`
            brings `ratios="uniform"` with it.

    Returns:
        The pruned model. Its `report` says what was kept in each layer, with which error, and which fractions
        of the parameters went.

    Raises:
        InputError: a setting is out of range, the text is the name of a file or has fewer tokens than one window, or
            the journal is of another run.
        RunError: an activation is not finite, or the journal cannot be written.
    """
    known = [field.name for field in dataclasses.fields(PruneConfig) if field.name != "sparsity"]
    for name in settings:
        if name not in known:
            raise InputError(f"prune has no setting {name!r}; {closest(name, known)}")
    words = as_text(model, text)
    name = preset or default_preset(settings.get("method", PruneConfig.method))
    config = dataclasses.replace(with_layout(named_preset(name), settings.get("layout")), sparsity=sparsity, **settings)
    calibrate = CalibrationConfig(samples=samples, sequence_length=sequence_length, sampling=sampling, seed=seed)

    def on_stage(stage: str, done: int, total: int) -> None:
        if on_batch is not None and stage != "layers" and done:
            on_batch(done, total)

    if journal is None:
        return prune_calibrated(model, words, config, calibrate, on_layer, on_stage)
    with closing(Journal(journal)) as kept:
        return prune_calibrated(model, words, config, calibrate, on_layer, on_stage, kept)


def prune_calibrated(
    model: LanguageModel,
    text: JoinedText,
    config: PruneConfig,
    calibrate: CalibrationConfig,
    on_layer: Callable[[LayerRecord], None] | None = None,
    on_stage: OnStage | None = None,
    journal: Journal | None = None,
) -> LanguageModel:
    """`prune` with its settings as dataclasses, as the command line has them."""
    length = window_length(calibrate.sequence_length, model.config.max_position_embeddings)
    calibrate = dataclasses.replace(calibrate, sequence_length=length)
    tokenizer = model.require_tokenizer()
    tokens = data.encode(tokenizer, text.text)
    windows = calibration_windows(tokenizer, text, tokens, calibrate)
    if journal is not None:
        journal.begin(run_identity(model, windows, data.text_hash(text.text), config, calibrate))
    pruned = prune_model(model, windows, config, on_layer, on_stage, run_log=journal)
    calibration = {
        "text_sha256": data.text_hash(text.text),
        "text_tokens": len(tokens),
        "samples": calibrate.samples,
        "sequence_length": length,
        "sampling": calibrate.sampling,
        "seed": calibrate.seed,
    }
    report = {"model": model.name, "calibration": calibration, **pruned.report, "versions": versions()}
    return dataclasses.replace(pruned, report=report)


def perplexity(
    model: LanguageModel,
    text: Text,
    sequence_length: int | None = None,
    *,
    windows: int | None = None,
    bos: bool = False,
    batch_size: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity on consecutive windows of a text: exp of the mean loss over all predicted tokens.

    Args:
        model: dense or pruned.
        text: what to predict: the text itself, or a `pathlib.Path` or several that hold it.
        sequence_length: tokens per window, None for 2,048 or the model's context if that is shorter; compare only
            perplexities of the same length.
        windows: how many windows from the start of the text, None for all.
        bos: begin each window with the BOS token, as prompts do, in place of its first one.
        batch_size: windows per step, 0 to choose it.
        on_batch: called with the windows done and their number.

    Raises:
        InputError: the text is the name of a file, or has fewer tokens than one window, or the tokenizer puts no BOS
            token before a text.
    """
    found = text_windows(model, as_text(model, text).text, sequence_length, windows, bos)
    return measure_perplexity(model, found, batch_size, on_batch).perplexity


def text_windows(
    model: LanguageModel, text: str, sequence_length: int | None, limit: int | None = None, bos: bool = False
) -> np.ndarray:
    """Consecutive windows of a text, int32 [windows, sequence_length]; None and `bos` as for `perplexity`.

    Raises:
        InputError: the text has fewer tokens than one window, the window exceeds the model's context, or the tokenizer
            puts no BOS token before a text.
    """
    length = window_length(sequence_length, model.config.max_position_embeddings)
    tokenizer = model.require_tokenizer()
    windows = consecutive_windows(data.encode(tokenizer, text), length, limit)
    return with_bos(windows, tokenizer) if bos else windows


def as_text(model: LanguageModel, given: Any) -> JoinedText:
    """A `Text` as one text: as it is, or that of the files that paths name.

    Raises:
        InputError: a file cannot be read, or what was given as a text is the name of a file.
    """
    if isinstance(given, str):
        short = len(given) < 256 and "\n" not in given
        if short and (Path(given).suffix.lower() in TEXT_SUFFIXES or os.path.isfile(given)):
            raise InputError(f"the text is {given!r}, the name of a file; give pathlib.Path({given!r}) to have it read")
        return JoinedText(given)
    files = [given] if isinstance(given, Path) else given
    if not isinstance(files, Sequence) or not files or not all(isinstance(file, Path) for file in files):
        raise InputError(
            f"the text must be a str, or a pathlib.Path or a list of them whose files hold it; found {given!r:.80}"
        )
    return read_files(files).rendered(model.require_tokenizer())


def export(
    model: LanguageModel | StoredModel,
    path: str | Path,
    *,
    format: Format | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes a model for PyTorch or llama.cpp; neither is needed here (docs/exports.md).

    Args:
        model: dense or pruned; one of `open_stored` is read as it is written.
        path: the folder or file to write; it appears under its name only when complete.
        format: `hf`, a Hugging Face folder: for the stock class where that can hold the model (unpruned, or pruned
            with `layout="uniform"`), else with a modelling file, for
            `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`. `padded`, such a folder for the
            stock class, with zeros where something was pruned. `gguf`, a file for llama.cpp. None is `gguf` for a
            path that ends in .gguf, else `hf`.
        dtype: of the weights in the files, None for the model's own: `float32`, `bfloat16`, `float16`, and `q8_0`
            for `gguf`.
        max_shard_size: above it the weights of a folder are split over several files: bytes, or text such as `5GB`.
        overwrite: replace what exists.

    Returns:
        `path`.

    Raises:
        InputError: `path` exists and `overwrite` is False, its ending is not that of the format, the format cannot
            express the model, or a weight is too large for the dtype.
    """
    form = format_of(path, format)
    return convert.export(
        as_stored(model), path, format=form, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
    )


def generate(
    model: LanguageModel,
    prompt: str,
    max_new_tokens: int | None = None,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[str], None] | None = None,
) -> str:
    """The continuation of a prompt, without the prompt.

    Args:
        model: dense or pruned.
        prompt: text; the tokenizer's special tokens are added.
        max_new_tokens: the most tokens to add, None for 64 or what the context leaves if that is less; a stop token of
            the model ends it earlier.
        temperature: 0 takes the likeliest token at every step, higher values sample.
        top_k: sample from so many of the likeliest tokens, 0 for all.
        top_p: sample from the fewest likeliest tokens whose probabilities reach this sum.
        seed: of the sampling.
        on_token: called with the new text as it comes.

    Raises:
        InputError: the prompt is empty, or exceeds the model's context with its continuation.
    """
    model.require_tokenizer()
    told = None if on_token is None else lambda prompt, token, new: on_token(new)
    return continue_prompts(model, prompt, max_new_tokens, temperature, top_k, top_p, seed, told).texts[0]
