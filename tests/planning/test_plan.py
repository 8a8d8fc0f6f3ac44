"""Plans against what `tests/parallel/measure_scaling.py` measured, and the command's refusals."""

import json

import pytest

from intraslice_jax.cli import main
from intraslice_jax.config import LayerShape, ModelConfig, uniform_query_to_kv
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import abstract_arrays
from intraslice_jax.parallel.rules import RULES
from intraslice_jax.planning.describe import describe
from intraslice_jax.planning.fitting import refuse
from intraslice_jax.planning.memory import MeshSizes, gram_moment_bytes, map_moment_bytes, shard_bytes
from intraslice_jax.planning.plan import Run
from intraslice_jax.planning.whole_stages import forward_flops, head_flops, whole_model_work
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


SHORT = ("--samples", "4", "--sequence-length", "256")


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / "config.json", tiny_config(hidden_size=256, intermediate_size=768, head_dim=64))
    return tmp_path


def test_flops_are_those_of_the_arithmetic(folder, tmp_path):
    out = tmp_path / "plan.json"
    assert main(["plan", str(folder), "--preset", "fast", *SHORT, "--sparsity", "0", "-o", str(out)]) == 0
    plan, tokens, hidden, inner = json.loads(out.read_text()), 4 * 256, 256, 768
    # Both passes project and attend (chunks of 128 see 3/4 of the pairs), and compute 3/4 of a Gram matrix.
    attention = 2 * tokens * hidden * (256 + 128 + 128) + 2 * 2 * tokens * 256 * 256 * 0.75
    once = attention + 2 * tokens * 256 * hidden + 2 * tokens * hidden * 2 * inner + 2 * tokens * inner**2 * 0.75
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
        (["--device-memory", "1KiB", "--preset", "fast", *SHORT], "a device has 0.00 GiB"),
        (["--residency", "disk"], "give --refine 0 with --residency disk"),
        (["--ratios", "fish", *SHORT], "unknown ratios 'fish'"),
        (["--preset", "best"], "--preset"),
    ],
)
def test_refusals(folder, capsys, args, says):
    given = args if args[0][0] != "-" else [str(folder), *args]
    assert main(["plan", *given]) == 2
    line = capsys.readouterr().err.strip()
    assert says in line
    assert "\n" not in line


def test_a_malformed_field_is_named(tmp_path, capsys):
    write_json(tmp_path / "config.json", tiny_config() | {"hidden_size": "64"})
    assert main(["plan", str(tmp_path)]) == 2
    assert "hidden_size must be a whole number, found '64'" in capsys.readouterr().err


def plan_of(folder, tmp_path, *args):
    out = tmp_path / "plan.json"
    assert main(["plan", str(folder), *SHORT, *args, "-o", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_default_preset_is_planned_and_what_to_leave_out_is_named(folder, tmp_path):
    plan, config = plan_of(folder, tmp_path), describe(str(folder))
    assert (plan["run"]["ratios"], plan["run"]["refine"]) == ("kl", 2)
    assert {"kl", "refinement"} <= plan["phase_bytes"].keys() & plan["flops_per_device"].keys()
    without = plan_of(folder, tmp_path, "--refine", "0", "--overwrite")
    learned = (plan["disk_bytes"]["journal"] - without["disk_bytes"]["journal"]) / 24  # two states, 12 bytes a weight
    assert plan["pruned_parameters"] - learned == config.total_parameters() - config.block_parameters()
    loop = [size for phase, size in plan["phase_bytes"].items() if phase != "refinement"]
    with pytest.raises(InputError, match=r"; `refine=0` fits"):
        refuse("m", config, plan | {"device_bytes": 2 * max(loop)}, max(loop), None)
    host = max(loop) // 2  # as of a model of more layers
    plan["device_bytes_by_residency"]["host"] = host
    with pytest.raises(InputError, match=r"; `residency=host` `refine=0` fits"):
        refuse("m", config, plan, host, None)


def test_flops_of_whole_models_are_those_of_their_programs(folder, tmp_path):
    plan = plan_of(folder, tmp_path, "--ratios", "fisher", "--refine", "1", "--sparsity", "0.3")
    config, flops = describe(str(folder)), plan["flops_per_device"]
    programs = {name: program["flops"] for name, program in plan["programs"].items()}
    layers, head = config.num_layers, 2 * 256 * config.vocab_size * config.hidden_size
    found = layers * (programs["gradients: forward"] + programs["gradients: backward"]) + 2 * 4 * head
    assert flops["gradients"] == pytest.approx(found, rel=0.1)
    # Three training windows and one that is held out: its predictions take two products with the head.
    forward, back = layers * programs["gradients: forward"], layers * programs["refinement: backward"]
    found = forward + 3 * (4 / 3 * back + 3 * head) + 2 * (back / 3 + 3 * head)
    assert flops["refinement"] == pytest.approx(found, rel=0.1)


def test_divergences_take_the_loop_and_the_layers_behind():
    shape = LayerShape(uniform_query_to_kv(2, 1), 8, 8, 8, 32)
    config = ModelConfig("llama", 64, 16, 8, 8, (shape,) * 2)
    run = Run("data=1", "device", 16, 64, 2**20, "float32", ratios="kl")
    work = whole_model_work(config, config, run, MeshSizes(1, 1))["kl"]
    loop = {"attention": 1.0, "head moments": 2.0, "kept attention": 4.0, "MLP": 8.0, "output": 16.0, "solves": 32.0}
    assert work.of(loop) - work.flops == 7 / 8 * (1 + 2 + 2 * 4 + 8 + 16) + 2 * 32
    # 14 windows: four measurements of two layers, four of one, the dense pass of two, and on to the second layer.
    layer, head = forward_flops(config, 64) / 2, head_flops(config, 64)
    assert work.flops == pytest.approx(14 * ((4 * 2 + 4 + 2 + 1) * layer + (8 + 2) * head))
