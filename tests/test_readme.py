"""The README's commands and its Python snippet, run as they stand, on small things under the names that it uses."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from intraslice_jax.cli import main
from intraslice_jax.settings import load_settings
from tests.conftest import ROOT
from tests.tiny import tiny_text, write_tiny_llama

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    """The indented blocks, without their indentation."""
    found = re.findall(r"\n\n((?:    .*\n|\n(?=    ))+)", README)
    return [re.sub(r"(?m)^    ", "", block).strip() for block in found]


def commands() -> list[list[str]]:
    """The arguments of every `intraslice` command, comments left out and continued lines joined."""
    lines = "\n".join(blocks()).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("intraslice ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the README's names exist: a local path goes before a name on the hub."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("meta-llama/Llama-3.2-1B", "MODEL"):
        write_tiny_llama(folder / name, max_position_embeddings=64, vocab_size=259)
        tokenizer = folder / name / "tokenizer.json"
        content = json.loads(tokenizer.read_text())
        content["model"]["vocab"]["th"], content["model"]["merges"] = 258, [["t", "h"]]  # GGUF files need one
        tokenizer.write_text(json.dumps(content))
    for name in ("wikitext2", "calibration.txt", "wiki.txt", "code.txt"):
        (folder / name).write_text(tiny_text(12_000))
    (folder / "held_out.txt").write_text(tiny_text(9_000, seed=1))
    # What --dataset wikitext2 asks the hub for.
    hub = folder / "Salesforce" / "wikitext"
    hub.mkdir(parents=True)
    (hub / "test.jsonl").write_text('{"text": "' + tiny_text(6_000, seed=2).replace("\n", " ") + '"}\n')
    card = {"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": [{"split": "test", "path": "test.jsonl"}]}]}
    (hub / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return folder


def test_the_blocks_are_found():
    assert [words[0] for words in commands()] == ["prune", "eval", "eval", "export", "generate", "compare"]
    assert sum("make demo" in block for block in blocks()) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for words in commands():
        if "--tasks" in words:  # asks the hub for its questions; tests/evaluate has its own
            continue
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert {"pruned", "pruned-hf", "perplexity.json", "comparison"} <= {path.name for path in place.iterdir()}
    # The line for PyTorch, in a process of its own: custom code is imported there.
    pytest.importorskip("torch")
    line = next(block for block in blocks() if block.startswith("AutoModelForCausalLM"))
    code = f"from transformers import AutoModelForCausalLM\n{line}"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_python(place, monkeypatch, capsys, tmp_path):
    for path in place.iterdir():
        if path.name in ("meta-llama", "calibration.txt", "held_out.txt"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks() if block.startswith("import intraslice_jax"))
    exec(compile(code, "README.md", "exec"), {})
    assert {"pruned", "pruned-hf", "pruned.gguf"} <= {path.name for path in tmp_path.iterdir()}
    removed = float(capsys.readouterr().out.split(" ", 1)[0])
    assert removed == pytest.approx(0.3, abs=0.02)  # a step of this model is 1.5 %


def test_configuration_file(tmp_path):
    from intraslice_jax.commands.prune import Options

    path = tmp_path / "prune.yaml"
    path.write_text(next(block for block in blocks() if block.startswith("prune:")))
    read = load_settings(path, Options)
    assert read["prune"].head_align == 64
    assert read["calibrate"].calibration == ("wiki.txt", "code.txt")
