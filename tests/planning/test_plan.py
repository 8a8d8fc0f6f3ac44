"""Plans against what `tests/parallel/measure_scaling.py` measured, and the command's refusals."""

import json

import pytest

from intraslice_jax.cli import main
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.parallel.rules import RULES
from intraslice_jax.planning.describe import describe
from intraslice_jax.planning.memory import MeshSizes, gram_moment_bytes, map_moment_bytes, shard_bytes
from tests.parallel.measure_scaling import CONFIG
from tests.tiny import tiny_config, write_json


@pytest.mark.parametrize(
    ("data", "model", "parameters", "attention", "mlp", "layer"),
    [
        (1, 1, 20_981_760, 788_480, 2_362_368, 3_148_032),
        (8, 1, 2_631_680, 788_480, 2_362_368, 3_148_032),
        (2, 4, 2_630_912, 197_120, 590_592, 788_544),
        (1, 8, 3_549_184, 98_560, 295_296, 624_896),
    ],
)
def test_bytes_are_the_measured_ones(data, model, parameters, attention, mlp, layer):
    mesh, arrays = MeshSizes(data, model), abstract_arrays(CONFIG)
    first = {name: array for name, array in arrays.items() if name.startswith("layers.0.")}
    assert shard_bytes(arrays, mesh) == parameters
    assert shard_bytes(first, mesh, RULES.in_use()) == layer
    assert map_moment_bytes(256, mesh) == attention
    assert gram_moment_bytes(768, mesh) == mlp


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-405b", 405_853_388_800),
        ("phi-4", 14_659_507_200),
    ],
)
def test_ready_models_have_the_published_parameters(name, parameters):
    assert describe(name).total_parameters() == parameters


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "config.json", tiny_config(hidden_size=256, intermediate_size=768, head_dim=64))
    return tmp_path


def test_flops_are_those_of_the_arithmetic(folder, tmp_path):
    out = tmp_path / "plan.json"
    assert (
        main(["plan", str(folder), "--samples", "4", "--sequence-length", "256", "--sparsity", "0", "-o", str(out)])
        == 0
    )
    plan, tokens, hidden, inner = json.loads(out.read_text()), 4 * 256, 256, 768
    # Both passes project and attend (chunks of 128 see 3/4 of the pairs); 5/8 of the Gram matrix is computed.
    attention = 2 * tokens * hidden * (256 + 128 + 128) + 2 * 2 * tokens * 256 * 256 * 0.75
    once = attention + 2 * tokens * 256 * hidden + 2 * tokens * hidden * 2 * inner + 2 * tokens * inner**2 * 0.625
    flops = plan["flops_per_device"]
    assert flops["attention"] + flops["MLP"] == pytest.approx(2 * (attention + once), rel=0.05)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nothing-like-it"], "ready names are llama-2-7b"),
        (["--mesh", "data=2,tensor=4"], "expected data=D,model=M"),
        (["--devices", "v5e-16", "--mesh", "data=3"], "do not divide the 16"),
        (["--devices", "abacus"], "expected for example v5e-16"),
        (["--flops", "many"], "--flops takes"),
        (["--sequence-length", "4096"], "--sequence-length"),
        (["--device-memory", "1KiB", "--samples", "4", "--sequence-length", "256"], "a device has 0.00 GiB"),
    ],
)
def test_refusals(folder, capsys, args, says):
    given = args if args[0][0] != "-" else [str(folder), *args]
    assert main(["plan", *given]) == 2
    line = capsys.readouterr().err.strip()
    assert says in line
    assert "\n" not in line


def test_a_missing_field_is_named(tmp_path, capsys):
    write_json(tmp_path / "config.json", {k: v for k, v in tiny_config().items() if k != "hidden_size"})
    assert main(["plan", str(tmp_path)]) == 2
    assert "hidden_size" in capsys.readouterr().err
