"""The command line through its own entry point: what it writes, and how it refuses bad input."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

import intraslice_jax as isl
from intraslice_jax.api import text_windows
from intraslice_jax.cli import find_commands, main
from intraslice_jax.config import preset
from intraslice_jax.evaluate.perplexity import perplexity as measure
from intraslice_jax.settings import as_settings
from tests.conftest import ROOT
from tests.tiny import tiny_config, tiny_text, tiny_weights, write_json, write_tiny_llama

# The same sizes everywhere, so that few shapes are compiled.
SMALL = ("--preset", "fast", "--samples", "4", "--sequence-length", "64", "--align", "2", "--sparsity", "0.25")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model folder and a text file."""
    folder = tmp_path_factory.mktemp("source")
    write_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(tiny_text())
    return folder


@pytest.fixture(scope="module")
def checkpoint(source):
    """The tiny model, pruned by the command."""
    out = source / "pruned"
    assert main(["prune", str(source / "model"), "-o", str(out), *calibrated(source)]) == 0
    return out


def calibrated(source):
    return ["--calibration", str(source / "text.txt"), *SMALL]


@pytest.fixture
def refuse(capsys, tmp_path):
    """Runs a command that must fail with one line and leave nothing at tmp_path / "out"."""

    def refuse(*args, code=2, says=()):
        before = sorted(tmp_path.rglob("*"))
        assert main([str(arg) for arg in args]) == code
        said = capsys.readouterr().err
        line = said.strip()
        assert line.startswith("intraslice")
        assert "\n" not in line
        assert "Traceback" not in line
        for part in (says,) if isinstance(says, str) else says:
            assert part in line
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return refuse


# What the commands do


def test_prune_writes_a_smaller_model_that_is_read_back(checkpoint, source):
    report = json.loads((checkpoint / "report.json").read_text())
    dense, pruned = isl.load(source / "model"), isl.load(checkpoint)
    removed = 1 - pruned.config.block_parameters() / dense.config.block_parameters()
    assert report["removed_block_fraction"] == pytest.approx(removed)
    assert removed == pytest.approx(0.25, abs=0.1)  # widths of a tiny model are coarse
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert report["settings"]["prune"]["sparsity"] == 0.25
    assert report["settings"]["calibrate"]["samples"] == 4
    assert report["calibration"]["text_tokens"] == len(tiny_text())
    assert report["peak_rss_bytes"] > 0
    assert report["seconds"] > 0


def test_progress_is_one_line_per_layer_where_there_is_no_terminal(source, tmp_path, capsys):
    assert main(["prune", str(source / "model"), "-o", str(tmp_path / "out"), *calibrated(source)]) == 0
    said = capsys.readouterr()
    estimate, *lines = said.err.splitlines()
    assert estimate.startswith("[about ")
    assert "layers" in estimate
    assert [line.split("]")[0] for line in lines] == ["[1/2", "[2/2"]
    assert "heads" in lines[0]
    assert "left" in lines[0]
    assert "block parameters" in said.out


def test_the_settings_of_a_run_are_a_config_for_the_next(checkpoint, source, tmp_path, capsys):
    settings = json.loads((checkpoint / "report.json").read_text())["settings"]
    settings["output"] = str(tmp_path / "again")
    write_json(tmp_path / "settings.yaml", settings)  # JSON is YAML
    assert main(["prune", "--config", str(tmp_path / "settings.yaml")]) == 0
    first, second = (isl.load(path) for path in (checkpoint, tmp_path / "again"))
    assert first.config == second.config


def test_the_command_line_is_stronger_than_the_file(source, tmp_path):
    config, out = tmp_path / "c.yaml", tmp_path / "out"
    config.write_text("sparsity: 0.25\nalign: 2\nsamples: 3\nsequence_length: 64\n")
    text = ["--calibration", str(source / "text.txt"), "--samples", "4"]
    assert main(["prune", str(source / "model"), f"--output={out}", "--config", str(config), *text]) == 0
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["prune"]["sparsity"] == 0.25
    assert settings["calibrate"]["samples"] == 4
    assert settings["calibrate"]["sequence_length"] == 64


def test_the_best_settings_are_the_usual_ones(source, tmp_path, capsys):
    text = ["--calibration", str(source / "text.txt"), *SMALL[2:]]
    assert main(["prune", str(source / "model"), "-o", str(tmp_path / "out"), *text]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["prune"] == as_settings(dataclasses.replace(preset("quality"), sparsity=0.25, align=2))
    assert set(report["refinement"]) == {"accepted", "held_out_divergence", "losses"}
    assert "--ratios" not in report["command"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("learned further" in page, "Nothing was retrained" in page) == (True, False)
    assert report["refinement"]["accepted"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("]")[0] for line in lines] == [
        lines[0].partition("]")[0],
        *(f"[ratios {done}/8" for done in (2, 4, 6, 8)),
        *("[1/2", "[2/2"),
        *(f"[refinement {done}/6" for done in (2, 3, 5, 6)),
    ]
    assert all(stage in lines[0] for stage in ("ratios", "layers", "refinement"))
    assert max(map(len, lines)) <= 80


def test_calibration_files_may_be_listed_or_repeated(source, tmp_path):
    (tmp_path / "more.txt").write_text(tiny_text(200, seed=1))
    files = [str(source / "text.txt"), str(tmp_path / "more.txt")]
    tokens = []
    for i, given in enumerate((files, [files[0], "--calibration", files[1]])):
        out = tmp_path / f"out{i}"
        assert main(["prune", str(source / "model"), "--calibration", *given, "-o", str(out), *SMALL]) == 0
        tokens.append(json.loads((out / "report.json").read_text())["calibration"]["text_tokens"])
    assert tokens == [len(tiny_text()) + 2 + 200] * 2


@pytest.mark.parametrize("which", ["model", "pruned"])
def test_eval_prints_and_writes_the_perplexity(checkpoint, source, tmp_path, capsys, which):
    out = tmp_path / "eval.json"
    args = ["--text", str(source / "text.txt"), "--sequence-length", "64", "--windows", "3", "--output", str(out)]
    assert main(["eval", str(source / which), *args]) == 0
    facts = json.loads(out.read_text())
    assert facts["perplexity"] > 1
    assert facts["evaluated_tokens"] == 3 * 63
    assert facts["sequence_length"] == 64
    assert len(facts["text_sha256"]) == 64
    assert f"{facts['perplexity']:.4f}" in capsys.readouterr().out
    expected = isl.perplexity(isl.load(source / which), tiny_text(), 64, windows=3)
    assert facts["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_perplexity_after_bos(source, tmp_path, capsys):
    folder = shutil.copytree(source / "model", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    args = ["--text", str(source / "text.txt"), "--sequence-length", "64", "--windows", "2"]
    found = {}
    for name, more in (("plain", []), ("bos", ["--bos"])):
        assert main(["eval", str(folder), *args, *more, "--output", str(tmp_path / f"{name}.json")]) == 0
        facts = json.loads((tmp_path / f"{name}.json").read_text())
        assert facts["bos"] == (name == "bos")
        found[name] = facts["perplexity"]
    assert re.search(rf"loss after 1-3 tokens +{facts['loss_by_position']['1-3']:.4f}\n", capsys.readouterr().out)
    model = isl.load(folder)
    windows = text_windows(model, tiny_text(), 64, 2)
    windows[:, 0] = 0
    assert found["bos"] == pytest.approx(measure(model, windows).perplexity, rel=1e-6)
    assert found["bos"] == pytest.approx(isl.perplexity(model, tiny_text(), 64, windows=2, bos=True), rel=1e-6)
    assert abs(found["bos"] - found["plain"]) > 1e-3


def test_export_and_convert_write_models_with_the_same_perplexity(checkpoint, source, tmp_path, capsys):
    out, again = tmp_path / "hf", tmp_path / "orbax"
    assert main(["export", str(checkpoint), str(out)]) == 0
    assert json.loads((out / "export.json").read_text())["weight_bytes"] > 0
    assert main(["convert", str(out), str(again)]) == 0
    models = [isl.load(path) for path in (checkpoint, out, again)]
    values = [isl.perplexity(model, tiny_text(500), 64) for model in models]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6)


def test_generate_continues_the_prompt(checkpoint, tmp_path, capsys):
    out = tmp_path / "g.json"
    assert main(["generate", str(checkpoint), "the river", "--max-new-tokens", "5", "--output", str(out)]) == 0
    facts = json.loads(out.read_text())
    assert capsys.readouterr().out == "the river" + facts["continuation"] + "\n"


def test_overwrite_replaces_the_output(checkpoint, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    assert main(["convert", str(source / "model"), str(out), "--overwrite", "--dtype", "bfloat16"]) == 0
    assert not (out / "old").exists()
    assert isl.load(out).decoder.embed_tokens[...].dtype == "bfloat16"


# Bad input


def test_every_command_has_help(capsys):
    for name in find_commands():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "--overwrite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [([], "{bench,bench prune,"), (["help"], "{bench,bench prune,"), (["help", "prune"], "--sparsity")],
)
def test_help_without_asking_for_it_the_usual_way(capsys, args, says):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    assert says in capsys.readouterr().out


def test_what_a_flag_turns_off_is_what_its_help_says():
    """`--no-NAME` stands beside the help of NAME, which must not promise the opposite."""
    for name, module in find_commands().items():
        for field in dataclasses.fields(module.Options):
            if field.default is True:
                told = re.search(rf"\b{field.name}: (.*)", module.Options.__doc__)
                assert told, (name, field.name)
                assert told[1].startswith("do without "), (name, field.name)


def test_help_is_instant():
    """No heavy import: jax, flax and transformers each take longer than the whole command may."""
    code = "import sys; from intraslice_jax.cli import main; main(['prune', '--help'])"
    check = "; print(*sys.modules)"
    wrapped = f"import sys\ntry:\n    {code.removeprefix('import sys; ')}\nexcept SystemExit:\n    pass\n{check[2:]}"
    loaded = subprocess.run([sys.executable, "-c", wrapped], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(loaded.stdout.split())
    assert "tyro" in modules
    assert not modules & {"jax", "flax", "transformers", "numpy", "orbax", "datasets"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["prune"], "MODEL"),
        (["prune", "m"], "--output"),
        (["prnue", "m"], "no command 'prnue'; did you mean 'prune'?"),
        (["prune", "m", "-o", "x", "--sparsty", "0.3"], "no option --sparsty; did you mean --sparsity?"),
        (["prune", "--sparsty=0.3"], "did you mean --sparsity?"),
        (["bench", "prune", "m", "--jornal"], "no option --jornal"),
        (["prune", "m", "-o", "x", "--samples", "many"], "--samples"),
        (["prune", "m", "-o", "x", "--dtype", "float8"], "bfloat16"),
        (["prune", "m", "-o", "x", "--sparsity", "1"], "sparsity must be in [0, 1), found 1.0"),
        (["prune", "m", "-o", "x", "--sparsity", "-0.1"], "sparsity must be in [0, 1), found -0.1"),
        (["prune", "m", "-o", "x", "--sparsity", "nan"], "sparsity must be in [0, 1)"),
        (["prune", "m", "-o", "x", "--config", "none.yaml"], "none.yaml does not exist"),
        (["prune", "m", "-o", "x", "--config", "x" * 300], "xxx does not exist; ready recipes are"),
        (["prune", "m", "-o", "x"], "--calibration is missing"),
        (["prune", "m", "-o", "x", "--calibration", "none.txt"], "none.txt does not exist"),
        (["eval", "m"], "--text FILE or --dataset NAME"),
        (["eval", "m", "--text", "none.txt"], "none.txt does not exist"),
    ],
)
def test_wrong_options(refuse, args, says):
    refuse(*args, says=says)


def test_unknown_yaml_key(refuse, source, tmp_path):
    (tmp_path / "c.yaml").write_text("sampels: 4\n")
    says = ("unknown key 'sampels'", "did you mean 'samples'?", "c.yaml")
    refuse("prune", source / "model", "-o", tmp_path / "out", "--config", tmp_path / "c.yaml", says=says)


def test_a_uniform_layout_refuses_other_ratios_at_once_and_has_uniform_ones(refuse, source, tmp_path):
    says = ("found ratios 'kl'", "use ratios uniform")
    layout = ["--calibration", source / "text.txt", *SMALL[2:], "--layout", "uniform", "--refine", "0"]
    refuse("prune", source / "model", "-o", tmp_path / "out", *layout, "--ratios", "kl", says=says)
    (tmp_path / "c.yaml").write_text("ratios: kl\n")
    refuse("prune", source / "model", "-o", tmp_path / "out", *layout, "--config", tmp_path / "c.yaml", says=says)
    assert not (tmp_path / "out.journal").exists()
    assert main([str(arg) for arg in ("prune", source / "model", "-o", tmp_path / "out", *layout)]) == 0
    assert isl.load(tmp_path / "out").config.distinct_shapes() == 1


def test_nothing_to_remove_is_nothing_to_measure_or_learn(source, tmp_path, capsys):
    text = ["--calibration", str(source / "text.txt"), *SMALL[2:-2]]
    assert main(["prune", str(source / "model"), "-o", str(tmp_path / "out"), *text, "--sparsity", "0"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["removed_block_fraction"] == 0
    assert "refinement" not in report
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("]")[0] for line in lines[1:]] == ["[1/2", "[2/2"]
    assert "refinement" not in lines[0]


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("intraslice 0.")


@pytest.mark.parametrize(("verbosity", "times"), [({}, 0), ({"HF_HUB_VERBOSITY": "warning"}, 1)])
def test_the_hub_says_nothing_twice(verbosity, times):
    code = (
        "from intraslice_jax import cli; cli._prepare_process(); "
        "from huggingface_hub.utils import logging; logging.get_logger('huggingface_hub.x').warning('Retrying')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"} | verbosity
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr.count("Retrying") == times, done.stderr


def test_existing_output(refuse, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    for name in ("r.json", "q.gguf.json"):
        (tmp_path / name).touch()
    model, text = source / "model", source / "text.txt"
    for args in (
        ["prune", model, "-o", out, *calibrated(source)],
        ["convert", model, out],
        ["export", model, out],
        ["export", model, tmp_path / "q.gguf", "--format", "gguf"],
        ["demo", "-o", out],
        ["eval", model, "--text", text, "-o", tmp_path / "r.json"],
        ["generate", model, "prompt", "-o", tmp_path / "r.json"],
    ):
        refuse(*args, says=("exists already", "--overwrite"))


def test_missing_models(refuse, source, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none.gguf", "none/deep/er", "empty"):
        path = tmp_path / name
        refuse("prune", path, "-o", tmp_path / "out", *calibrated(source), says=str(path))
        refuse("eval", path, "--text", source / "text.txt", says=str(path))


def test_unsupported_architecture(refuse, source, tmp_path):
    model = write_tiny_llama(tmp_path / "m", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    refuse("prune", model, "-o", tmp_path / "out", *calibrated(source), says=("GPT2LMHeadModel", "LlamaForCausalLM"))


def test_truncated_safetensors(refuse, source, tmp_path):
    model = write_tiny_llama(tmp_path / "m")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse("prune", model, "-o", tmp_path / "out", *calibrated(source), says="model.safetensors")


def test_corrupted_gguf(refuse, source, tmp_path):
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 200)
    refuse("prune", file, "-o", tmp_path / "out", *calibrated(source), says="bad.gguf")


def test_nan_in_a_weight(refuse, source, tmp_path):
    weights = tiny_weights(tiny_config())
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    model = write_tiny_llama(tmp_path / "m", weights=weights)
    args = ("prune", model, "-o", tmp_path / "out", *calibrated(source))
    refuse(*args, says=("model.layers.1.mlp.up_proj.weight", "nan"))


def test_missing_tokenizer(refuse, source, tmp_path):
    model = write_tiny_llama(tmp_path / "m", tokenizer=False)
    refuse("prune", model, "-o", tmp_path / "out", *calibrated(source), says="tokenizer")


def test_text_shorter_than_a_window(refuse, source, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    text = tmp_path / "short.txt"
    model = source / "model"
    says = ("9 tokens", "--sequence-length")
    refuse("prune", model, "-o", tmp_path / "out", "--calibration", text, *SMALL, says=says)
    refuse("eval", model, "--text", text, "--sequence-length", "64", says=says)


def test_window_longer_than_the_context(refuse, source, tmp_path):
    says = ("sequence_length 2048", "256", "leave --sequence-length out")
    text, length = source / "text.txt", ("--sequence-length", "2048")
    refuse("eval", source / "model", "--text", text, *length, says=says)
    refuse("plan", source / "model", *length, says=says)
    for command in ("prune", "compare"):
        held_out = () if command == "prune" else ("--text", text)
        args = (command, source / "model", "-o", tmp_path / "out", "--calibration", text, *held_out, *length)
        refuse(*args, says=says)


def test_windows_are_as_long_as_a_short_context(source, tmp_path, capsys):
    """The tiny model has 256 tokens, the usual length is 2,048."""
    text, out = str(source / "text.txt"), tmp_path / "out"
    args = ["prune", str(source / "model"), "-o", str(out), "--calibration", text, "--text", text, "--preset", "fast"]
    assert main([*args, "--samples", "2", "--windows", "1"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["sequence_length"] == 256
    assert report["texts"]["text.txt"]["sequence_length"] == 256
    assert "--sequence-length" not in report["command"]
    assert main(["eval", str(out), "--text", text, "--windows", "1", "-o", str(tmp_path / "eval.json")]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["sequence_length"] == 256


def test_a_held_out_text_that_is_too_short_is_found_before_the_run(refuse, source, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    args = ("prune", source / "model", "-o", tmp_path / "out", *calibrated(source), "--text", tmp_path / "short.txt")
    refuse(*args, says="9 tokens")


def test_a_full_disk_is_a_failure_of_the_run(refuse, source, tmp_path, monkeypatch):
    import intraslice_jax.api

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(intraslice_jax.api, "save", full)
    refuse("convert", source / "model", tmp_path / "out", code=1, says="No space left on device")


def test_an_error_that_nobody_foresaw_keeps_its_traceback(source, tmp_path, monkeypatch):
    import intraslice_jax.api

    monkeypatch.setattr(intraslice_jax.api, "save", lambda *_: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        main(["convert", str(source / "model"), str(tmp_path / "out")])


def test_an_interrupted_run_leaves_its_journal_alone(source, tmp_path):
    model = write_tiny_llama(tmp_path / "m", num_hidden_layers=20)
    out = tmp_path / "out"
    # SIGINT is ignored in what a background shell starts; a person's terminal does not.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from intraslice_jax.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "prune", str(model), "-o", str(out), *calibrated(source)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    assert any(line.startswith("[1/20]") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    lines = [line for line in stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1
    assert "interrupted" in lines[0]
    assert str(out) in lines[0]
    assert stdout == ""
    assert "--resume goes on from" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out.journal"]


def test_termination_is_an_interruption(refuse, source, tmp_path, monkeypatch):
    import intraslice_jax.io.checkpoint

    def terminated(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(intraslice_jax.io.checkpoint, "write_streamed", terminated)
    refuse("convert", source / "model", tmp_path / "out", code=1, says=("interrupted", str(tmp_path / "out")))
    assert signal.getsignal(signal.SIGTERM) == before
