"""`intraslice demo`: the whole journey on a small real model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from intraslice_jax.commands._types import Config, Output
from intraslice_jax.config import CalibrationConfig, PruneConfig

DEFAULT_CONFIG = "demo"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prune SmolLM2-135M on this machine, export it, and show perplexity before and after.

    Attributes:
        output: the folder to write: checkpoint, hf (the export), report.json.
        config: YAML file with any of these options; the command line is stronger.
        overwrite: replace OUT if it exists.
        windows: evaluation windows of each text.
        prompt: what dense and pruned model continue.
        max_new_tokens: length of the continuations.
    """

    output: Output = Path("runs/demo")
    config: Config = None
    overwrite: bool = False
    windows: int = 8
    prompt: str = "The river rises in the mountains and"
    max_new_tokens: int = 32
    prune: OmitArgPrefixes[PruneConfig] = field(default_factory=PruneConfig)
    calibrate: OmitArgPrefixes[CalibrationConfig] = field(default_factory=CalibrationConfig)


def run(options: Options) -> None:
    """Prunes, measures, writes, prints."""
    from intraslice_jax.io.atomic import check_output

    check_output(options.output, options.overwrite)

    from intraslice_jax.commands._output import gibibytes, number, percent, print_table
    from intraslice_jax.demo import run_demo
    from intraslice_jax.progress import duration

    report = run_demo(options)
    dense, pruned = report["block_parameters"], report["total_parameters"]
    rows = [["", "dense", "pruned", "change"]]
    for name, text in report["texts"].items():
        before, after = text["dense_perplexity"], text["pruned_perplexity"]
        rows.append([f"perplexity, {name}", f"{before:.2f}", f"{after:.2f}", f"x {after / before:.2f}"])
    for name, count, removed in (
        ("parameters of the blocks", dense, report["removed_block_fraction"]),
        ("all parameters", pruned, report["removed_model_fraction"]),
    ):
        rows.append([name, number(count["dense"]), number(count["pruned"]), f"-{percent(removed)}"])
    print_table(rows)
    print(f"\nprompt: {options.prompt}")
    for name in ("dense", "pruned"):
        print(f"{name}: {' '.join(report['samples'][0][name].split())}")
    spent = f"{duration(report['seconds'])}, peak memory {gibibytes(report['peak_rss_bytes'])}"
    print(f"\n{options.output}: checkpoint, hf (for PyTorch) and report.json written in {spent}")
