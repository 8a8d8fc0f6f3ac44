"""The demo's steps on a tiny model, and the real data where the packages are installed."""

import json

import pytest

import intraslice_jax as isl
from intraslice_jax import demo
from intraslice_jax.cli import main
from tests.tiny import tiny_text, write_tiny_llama

WIKI = "".join(
    f'<doc id="{i}" url="https://x?curid={i}" title="T">\nT{i}\n\n{tiny_text(300, i)}\n\n</doc>\n' for i in range(10)
)


@pytest.fixture
def tiny_data(tmp_path, monkeypatch):
    """The demo's data, tiny."""
    model = write_tiny_llama(tmp_path / "model")
    (tmp_path / "wiki.txt").write_text(WIKI)
    (tmp_path / "web.txt").write_text(tiny_text(1000, seed=7))
    data = demo.DemoData(model, tmp_path / "wiki.txt", tmp_path / "web.txt")
    monkeypatch.setattr(demo, "find_data", lambda: data)


def test_the_demo_writes_checkpoint_export_and_report(tiny_data, tmp_path, capsys):
    out = tmp_path / "out"
    sizes = ["--samples", "4", "--sequence-length", "64", "--align", "2", "--windows", "3", "--max-new-tokens", "4"]
    assert main(["demo", "--output", str(out), *sizes]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "hf", "pictures", "report.html", "report.json"]
    report = json.loads((out / "report.json").read_text())
    assert report["evaluated_tokens"] == 3 * 63
    assert report["sequence_length"] == 64
    assert report["settings"]["prune"]["sparsity"] == 0.3
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > 0
    assert set(report["texts"]) == {"wiki", "web"}
    for layer in report["layers"]:
        assert {"kept_heads", "qk_head_dim", "v_head_dim", "intermediate_size"} <= set(layer)
        assert {"attention_error", "mlp_error"} <= set(layer)

    exported, checkpoint = isl.load(out / "hf"), isl.load(out / "checkpoint")
    held_out = demo.split_wiki(WIKI)[1]
    for model in (exported, checkpoint):
        assert isl.perplexity(model, held_out, 64, windows=3) == pytest.approx(report["pruned_perplexity"], rel=1e-6)
    dense = isl.load(tmp_path / "model").config.block_parameters()
    counted = 1 - exported.config.block_parameters() / dense
    assert report["removed_block_fraction"] == pytest.approx(counted)
    printed = capsys.readouterr().out
    assert f"{report['pruned_perplexity']:.2f}" in printed


def test_calibration_and_evaluation_share_no_text():
    calibration, held_out = demo.split_wiki(WIKI)
    assert "<doc" not in calibration + held_out
    assert "</doc" not in calibration + held_out
    assert calibration.startswith("T0\n")
    assert held_out.startswith(("T8\n", "T9\n"))
    assert len(calibration) > 2 * len(held_out)


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("the package exllamav2 is not installed; `make demo` installs the demo's model and texts")
    assert not (tmp_path / "out").exists()


def test_the_installed_packages_hold_the_data(smollm2_gguf, calibration_texts):
    data = demo.find_data()
    assert data.model == smollm2_gguf
    assert data.wiki == calibration_texts / "wiki.utf8"
    calibration, held_out = demo.split_wiki(data.wiki.read_text(encoding="utf-8"))
    assert min(len(calibration), len(held_out)) > 300_000
