"""YAML options: strict, and weaker than the command line."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from intraslice_jax.cli import _parse, find_commands
from intraslice_jax.commands._command_line import command_line
from intraslice_jax.config import CalibrationConfig, PruneConfig, preset
from intraslice_jax.errors import InputError
from intraslice_jax.settings import as_settings, load_settings, with_defaults


@dataclass(frozen=True, kw_only=True)
class Options:
    """As a command has them."""

    model: str
    output: Path
    config: Path | None = None
    overwrite: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    windows: int | None = None
    prune: PruneConfig = field(default_factory=PruneConfig)
    calibrate: CalibrationConfig = field(default_factory=CalibrationConfig)


@pytest.fixture
def load(tmp_path):
    def load(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return load_settings(path, Options)

    return load


def test_flat_and_nested_keys_are_the_same(load):
    flat = load("sparsity: 0.2\nsamples: 4\nbatch-size: 2\ncalibration: a.txt\n")
    nested = load("prune:\n  sparsity: 0.2\n  batch_size: 2\ncalibrate: {samples: 4, calibration: [a.txt]}\n")
    assert flat == nested
    assert flat["prune"] == PruneConfig(sparsity=0.2, batch_size=2)
    assert flat["calibrate"] == CalibrationConfig(samples=4, calibration=("a.txt",))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("overwrite: true", "overwrite", True),
        ("dtype: bfloat16", "dtype", "bfloat16"),
        ("dtype: null", "dtype", None),
        ("windows: 8", "windows", 8),
        ("output: runs/x", "output", Path("runs/x")),
        ("output: 2024-01-02", "output", Path("2024-01-02")),
    ],
)
def test_values_become_the_annotated_type(load, text, name, value):
    assert load(text) == {name: value}


def test_numbers_are_read_as_people_write_them(load):
    assert load("damping: 1e-3")["prune"].damping == 0.001
    assert load("sparsity: 0")["prune"].sparsity == 0.0
    assert load("") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparsty: 0.2", "unknown key 'sparsty'; did you mean 'sparsity'?"),
        ("prune: {sparsty: 0.2}", "unknown key 'sparsty' under prune; did you mean 'sparsity'?"),
        ("config: other.yaml", "unknown key 'config'"),
        ("zzz: 1", "unknown key 'zzz'; known are"),
        ("sparsity: much", "sparsity must be a number, found 'much' (text)"),
        ("sparsity: true", "sparsity must be a number, found True (true/false)"),
        ("damping:", "damping must be a number, found nothing"),
        ("samples: 1.5", "samples must be a whole number, found 1.5 (a number)"),
        ("overwrite: 1", "overwrite must be true or false, found 1 (a number)"),
        ("dtype: float8", "dtype must be one of float32, bfloat16; found 'float8' (text)"),
        ("calibration: [1]", "calibration must be text, found 1 (a number)"),
        ("sparsity: 1.0", "sparsity must be in [0, 1), found 1.0"),
        ("prune: 0.3", "prune must hold `key: value` lines, found 0.3"),
        ("- sparsity", "must hold `key: value` lines"),
        ("sparsity: 0.1\nsparsity: 0.2", "'sparsity' is given twice (line 2)"),
        ("damping: .nan", "damping must be 0 or more, found nan"),
        ("selection_noise: .inf", "selection_noise must be 0 or more, found inf"),
        ("memory_budget: 0", "memory_budget must be at least 1 byte, found 0"),
        ("samples: !!int ''", "'' cannot be read as int (line 1)"),
        ("overwrite: !!bool x", "'x' cannot be read as bool (line 1)"),
        (
            "model: !!timestamp x",
            "for the tag 'tag:yaml.org,2002:timestamp' (line 1)",
        ),
        ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("samples: " + "9" * 5_000, "cannot be read as int (line 1)"),
        ("samples: 0x" + "f" * 5_000, "a number has more than 63 bits (line 1)"),
        ("a: &a [x]\nb: [*a, *a]", "references (*name) are not read here"),
        ("a: &a [*a]", "references (*name) are not read here"),
        ("a: " + "[" * 3_000, "it is nested too deeply (line 1)"),
        ("[a]: 1", "a list or mapping cannot be a key (line 1)"),
        ('output: "a\\0b"', "text holds what is no character (line 1)"),
        ("x" * 300_000, "has 300000 bytes, expected at most 262144"),
        ("dtype: " + "x" * 3_000, "dtype must be one of float32, bfloat16; found 'xxx"),
        ("sparsity: 0.1\nprune: {sparsity: 0.2}", "sparsity is given twice"),
        ("sparsity: [0.1", "is not readable as YAML"),
    ],
)
def test_a_mistake_is_one_clear_line(load, tmp_path, text, said):
    with pytest.raises(InputError) as raised:
        load(text)
    message = str(raised.value)
    assert said in message
    assert str(tmp_path / "settings.yaml") in message
    assert "\n" not in message
    assert len(message) < 700


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml is missing; `config` takes a YAML file"):
        load_settings(tmp_path / "none.yaml", Options)
    with pytest.raises(InputError, match="Is a directory"):
        load_settings(tmp_path, Options)


def test_defaults_are_replaced_and_nothing_else():
    kind = with_defaults(Options, {"prune": PruneConfig(sparsity=0.1), "overwrite": True, "output": Path("o")})
    options = kind(model="m")
    assert isinstance(options, Options)
    assert (options.prune.sparsity, options.overwrite, options.output) == (0.1, True, Path("o"))
    assert options.calibrate == CalibrationConfig()


def test_the_settings_of_a_run_read_back_as_the_same_options(load):
    options = Options(model="m", output=Path("o"), prune=PruneConfig(sparsity=0.15), dtype="bfloat16")
    again = with_defaults(Options, load(yaml.safe_dump(as_settings(options))))()
    assert as_settings(again) == as_settings(options)
    assert again.prune == options.prune


@pytest.mark.parametrize(("given", "expected"), [("gpu", 64), ("tpu", 128), ("cpu", 8), (24, 24)])
def test_alignments_have_names(tmp_path, given, expected):
    path = tmp_path / "c.yaml"
    for text in (f"align: {given}", f"prune:\n  align: {given}"):
        path.write_text(text)
        options = load_settings(path, find_commands()["prune"].Options)
        assert options["prune"].align == expected
    words = ["prune", "m", "-o", "out"]
    for flag in (["--align", str(given)], [f"--align={given}"]):
        assert _parse([*words, *flag], find_commands())[1].prune.align == expected


def test_alignments_of_heads_have_names(tmp_path):
    (tmp_path / "c.yaml").write_text("head_align: cpu")
    assert load_settings(tmp_path / "c.yaml", find_commands()["prune"].Options)["prune"].head_align == 16
    words = ["prune", "m", "-o", "out", "--head-align"]
    assert _parse([*words, "gpu"], find_commands())[1].prune.head_align == 64


def test_an_unknown_alignment(tmp_path):
    with pytest.raises(InputError, match="align"):
        _parse(["prune", "m", "-o", "out", "--align", "npu"], find_commands())


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        (None, [], preset("quality")),
        (None, ["--preset", "paper"], preset("paper")),
        (None, ["--preset=fast", "--ratios", "kl"], dataclasses.replace(preset("fast"), ratios="kl")),
        ("preset: paper\nsparsity: 0.2", [], dataclasses.replace(preset("paper"), sparsity=0.2)),
        (
            "preset: paper\nratios: uniform",
            ["--preset", "quality"],
            dataclasses.replace(preset("quality"), ratios="uniform"),
        ),
        ("refine: 0", ["--refine", "1"], dataclasses.replace(preset("quality"), refine=1)),
    ],
)
def test_a_preset_is_weaker_than_single_options(text, flags, expected, tmp_path):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
        flags = [*flags, "--config", str(tmp_path / "c.yaml")]
    options = _parse(["prune", "m", "-o", "out", *flags], find_commands())[1]
    assert options.prune == expected
    words = shlex.split(command_line("prune", options))
    assert _parse(words[1:], find_commands())[1].prune == expected


def test_an_unknown_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: best")
    with pytest.raises(InputError, match="preset must be one of fast, paper, quality"):
        _parse(["prune", "m", "-o", "out", "--config", str(tmp_path / "c.yaml")], find_commands())
    with pytest.raises(InputError, match="no preset 'best'; known are fast, paper, quality"):
        _parse(["prune", "m", "-o", "out", "--preset", "best"], find_commands())
