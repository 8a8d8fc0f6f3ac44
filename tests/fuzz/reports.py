"""Reports of runs and results of `eval`, read again to be shown or compared."""

import json
from pathlib import Path
from typing import Any

from intraslice_jax.report.comparison import comparison_facts, comparison_page, read_runs
from intraslice_jax.report.single import run_page
from tests.fuzz.harness import Target, mutate_bytes, mutate_json

HASH = "f" * 64


def report_example() -> dict[str, Any]:
    """A report of a run over two layers with everything that one can hold."""
    spectra = {"kv_heads": [0, 1], "shares": [[0.9, 0.1], [0.75, 0.25]]}
    layers = [
        {
            "layer": i, "kept_heads": [0, 1, 3], "query_heads": 3, "kv_heads": 2, "qk_head_dim": 2, "v_head_dim": 1,
            "intermediate_size": 12, "attention_error": 0.125, "mlp_error": 0.25,
            "notes": {"attention": {"solver": "cholesky", "value_spectra": spectra}, "mlp": {"solver": "cholesky"}},
            "seconds": 1.5,
        }
        for i in range(2)
    ]  # fmt: skip
    dense = {"query_to_kv": [0, 0, 1, 1], "qk_head_dim": 4, "v_head_dim": 2, "intermediate_size": 16}
    measured = {"dense_perplexity": 10.5, "pruned_perplexity": 12.25}
    measured |= {"dense_loss_by_position": {"1-3": 5.5, "4-63": 4.5}, "pruned_loss_by_position": {"1-3": 5.75}}
    return {
        "format_version": 1, "model": "models/tiny", "method": "intraslice", "sparsity": 0.25,
        "removed_block_fraction": 0.25, "removed_model_fraction": 0.125,
        "block_parameters": {"dense": 800, "pruned": 600}, "total_parameters": {"dense": 1600, "pruned": 1400},
        "calibration_samples": 4, "calibration_sequence_length": 64,
        "ratios": {"attention": [0.25, 0.25], "mlp": [0.25, 0.25], "heads": []},
        "layers": layers, "dense_layers": [dense, dense],
        "removed_by_layer": {"attention": [0.25, 0.5], "mlp": [0.25, 0.125]},
        "refinement": {"accepted": True, "held_out_divergence": {"before": 0.5, "after": 0.25}, "losses": [1.0]},
        "stages": [{"stage": "layers", "seconds": 3.0, "peak_rss_bytes": 2**30, "peak_device_bytes": 2**20}],
        "texts": {"a.txt": {**measured, "evaluated_tokens": 63, "sequence_length": 64, "text_sha256": HASH}},
        "samples": [{"prompt": "The capital of", "dense": " France", "pruned": " <b>"}],
        "command": "intraslice prune models/tiny -o out", "versions": {"jax": "0.10.2"},
        "settings": {"preset": "fast", "prune": {"ratios": "uniform"}, "calibrate": {"calibration": ["c.txt"]}},
        "seconds": 4.5, "peak_rss_bytes": 2**30,
    }  # fmt: skip


def evaluation_example() -> dict[str, Any]:
    """A result of `eval` about the pruned model of `report_example`."""
    task = {"task": "piqa", "items": 50, "num_fewshot": 0, "version": "1"}
    return {
        "format_version": 1, "perplexity": 12.5, "evaluated_tokens": 630, "sequence_length": 64, "mean_nll": 2.5,
        "loss_by_position": {"1-3": 5.5, "4-63": 4.5}, "bos": False,
        "text": "b.txt", "text_sha256": HASH, "parameters": 1400, "block_parameters": 600, "settings": {},
        "tasks": [{**task, "metrics": {"acc": 0.5}, "standard_errors": {"acc": 0.0625}}],
    }  # fmt: skip


def _write(folder: Path, damaged: str) -> Path:
    (folder / "report.json").write_text(json.dumps(report_example()))
    (folder / "eval.json").write_text(json.dumps(evaluation_example()))
    return folder / damaged


def _show(folder: Path) -> None:
    runs = read_runs([str(folder), str(folder)])
    for html in (run_page(runs[0], {}), comparison_page(runs, {})):
        html.encode("utf-8")
    json.dumps(comparison_facts(runs)).encode("utf-8")


def targets() -> list[Target]:
    """The two files, shown alone and beside others."""
    ways = (mutate_json, mutate_json, mutate_json, mutate_bytes)
    return [
        Target("report.json", lambda folder: _write(folder, "report.json"), _show, ways),
        Target("eval.json", lambda folder: _write(folder, "eval.json"), _show, ways),
    ]
