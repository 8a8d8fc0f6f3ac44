"""What the benchmarks count and refuse; never how long anything takes."""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.cli import main
from intraslice_jax.config import LayerShape, ModelConfig, PruneConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate import arithmetic, speed
from intraslice_jax.evaluate.floor import first_layers, gradient_flops, loop_flops, measure_pruning
from intraslice_jax.evaluate.speed import Workload, bytes_per_sequence, cache_bytes, check_workload, common_context
from intraslice_jax.evaluate.timing import in_turn
from intraslice_jax.model import LanguageModel
from intraslice_jax.models import attention
from intraslice_jax.models.decoder import decoder_from_arrays, run_block
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.stages import measured_stages, stage
from tests.models import reference
from tests.tiny import write_tiny_llama

WIDE = LayerShape((0, 0, 1, 1), 16, 16, 16, 96)
NARROW = LayerShape((0, 1, 1), 12, 12, 8, 40)


def make(*layers: LayerShape, **changes) -> LanguageModel:
    config = ModelConfig(
        "llama", 97, 32, 16, 16, layers or (WIDE, NARROW), **{"max_position_embeddings": 64, **changes}
    )
    return LanguageModel(config, decoder_from_arrays(config, reference.random_arrays(config)), None, "tiny")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("bench") / "model")


class TestArithmetic:
    def test_a_layer_equals_what_the_compiler_counts(self, monkeypatch):
        monkeypatch.setattr(attention, "one_cpu", lambda: False)  # the compiler counts a loop's body once
        jax.clear_caches()
        model = make(WIDE)
        x = jnp.zeros((2, 16, 32), jnp.float32)
        compiled = run_block.lower(model.decoder.layers[0], x, model.decoder.rope_for(16)).compile()
        counted = compiled.cost_analysis()["flops"]
        ours = arithmetic.linear_layer(model.config, WIDE, 32)
        # One chunk of queries multiplies the masked half, too.
        ours += 2 * 2 * 16 * 16 * arithmetic.mixed_channels(WIDE)
        assert ours < counted < 1.35 * ours  # norms, RoPE and softmax

    @pytest.mark.parametrize("window", [None, 1, 3, 9])
    def test_visible_pairs(self, window):
        near = np.arange(7)[:, None] - np.arange(7)[None]
        seen = (near >= 0) & (near < (window or 7))
        assert arithmetic.visible_pairs(7, window) == seen.sum()

    def test_decode_with_a_full_window(self):
        windowed = dataclasses.replace(WIDE, sliding_window=4)
        model = make(WIDE)
        sliding, full = (arithmetic.decode_layer(model.config, s, 1, 16) for s in (windowed, WIDE))
        assert full - sliding == 2 * 12 * arithmetic.mixed_channels(WIDE)

    def test_an_unpruned_layer_costs_one_dense_pass_and_its_moments(self):
        config = make(WIDE).config
        total = sum(loop_flops(config, config, 3, 16).values())
        passes = arithmetic.prefill_layer(config, WIDE, 3, 16) + arithmetic.scores_and_mixing(WIDE, 3, 16)
        moments = 4 * arithmetic.gram(16, 48) + 2 * arithmetic.gram(64, 48) + 2 * 48 * 64**2 + arithmetic.gram(96, 48)
        assert total == passes + moments

    def test_backward_costs_more_than_forward(self):
        forward, loss, backward = gradient_flops(make().config, 2, 16).values()
        assert 1.5 * forward < backward < 3 * forward
        assert loss == 2 * 2 * 32 * 32 * 97


class TestSpeed:
    def test_facts_of_both_models(self):
        models = {"against": make(WIDE, WIDE), "model": make()}
        measured = speed.measure_speed(models, Workload(batch=2, context=8, layer=1, repeats=2))
        for name, found in measured.items():
            config = models[name].config
            assert found["cache_bytes"] == cache_bytes(config, 2, 8, 4)
            assert found["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(models[name].decoder))
            assert found["flops"]["decode"]["layer"] == arithmetic.decode_layer(config, config.layers[1], 2, 8)
            for phase in ("prefill", "decode"):
                assert set(found["seconds"][phase]) == {"model", "layers", "layer"}
                assert found["seconds"][phase]["model"] >= found["seconds"][phase]["layers"] > 0
                assert all(len(times) == 2 for times in found["rounds"][phase].values())
        dense, pruned = measured.values()
        assert pruned["flops"]["prefill"]["layers"] < dense["flops"]["prefill"]["layers"]

    def test_models_take_turns_and_the_first_round_is_dropped(self):
        order = []
        calls = {name: lambda name=name: order.append(name) or {"t": float(len(order))} for name in "ab"}
        assert in_turn(calls, 2) == {"a": {"t": [3, 5]}, "b": {"t": [4, 6]}}
        assert order == list("ababab")

    def test_context_is_capped_by_the_shortest_model(self):
        short, long = make().config, make(max_position_embeddings=9000).config
        assert common_context([long], None) == 4096
        assert common_context([long, short], None) == 64
        with pytest.raises(InputError, match=r"65 is longer .* 64 tokens; give `context=64`"):
            common_context([long, short], 65)

    def test_the_largest_batch_is_named(self):
        models = {"model": make()}
        each = bytes_per_sequence(models, 16)
        assert each > cache_bytes(models["model"].config, 1, 16, 4)
        check_workload(models, Workload(5, 16), 5 * each)
        with pytest.raises(InputError, match="the largest that fits is `batch_size=4`"):
            check_workload(models, Workload(5, 16), 5 * each - 1)
        with pytest.raises(InputError, match="shorter `context`"):
            check_workload(models, Workload(1, 16), each - 1)

    @pytest.mark.parametrize("work", [Workload(0, 8), Workload(1, 8, layer=2), Workload(1, 8, repeats=0)])
    def test_numbers_out_of_range(self, work):
        with pytest.raises(InputError, match="must be"):
            check_workload({"model": make()}, work)


class TestStages:
    def test_a_stage_does_not_count_what_is_inside(self):
        @stage("inner")
        def inner(x):
            time.sleep(0.05)
            return x + 1

        @stage("outer")
        def outer(x):
            return inner(x) * jax.jit(lambda y: jnp.sin(y))(x)

        outer(jnp.ones(3))  # not measured
        with measured_stages() as times:
            outer(jnp.ones(3))
        assert times.wall["inner"] >= 0.05
        assert times.compilations >= 1
        assert 0 < times.compiling("outer") <= times.wall["outer"]
        assert set(times.wall) == {"rest", "outer", "inner"}

    def test_all_work_is_in_a_stage_and_results_stay(self):
        model = make(WIDE, WIDE, max_position_embeddings=32)
        windows = np.random.default_rng(0).integers(0, 97, (4, 16), dtype=np.int32)
        config = PruneConfig(sparsity=0.4, ratios="fisher", align=2, iterative="never", max_ratio=1.0)
        cost, pruned = measure_pruning(model, windows, config)
        expected = prune_model(model, windows, config)
        assert pruned.config == expected.config
        for ours, theirs in zip(jax.tree.leaves(pruned.decoder), jax.tree.leaves(expected.decoder), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert [group.stage for group in cost.groups] == ["gradient stage", "pruning loop"]
        assert all(group.floor > 0 and group.seconds > 0 for group in cost.groups)
        named = {part.stage: part for part in cost.stages}
        for name, count in loop_flops(model.config, pruned.config, 4, 16).items():
            assert named[name].flops == count
        assert len(cost.rates) >= 4

    def test_first_layers(self):
        model = make()
        assert first_layers(model, 1).config.layers == (WIDE,)
        with pytest.raises(InputError, match="`layers` must be between 1 and 2, found 3"):
            first_layers(model, 3)


class TestCommands:
    def test_bench(self, source, tmp_path, capsys):
        out = tmp_path / "b.json"
        args = ["bench", source, "--against", source, "--context", 16, "--repeats", 1, "-o", out]
        assert main([str(arg) for arg in args]) == 0
        facts = json.loads(out.read_text())
        assert facts["ratios"]["flops"]["prefill"]["layers"] == facts["ratios"]["cache_bytes"] == 1
        assert facts["ratios"]["saved_time_by_saved_flops"]["prefill"]["layers"] is None
        assert facts["models"]["model"]["source"] == str(source)
        assert re.search(r"whole model .*\d x (faster|slower)", capsys.readouterr().out)

    def test_bench_of_one_model_has_no_ratios(self, source, tmp_path, capsys):
        out = tmp_path / "b.json"
        assert main(["bench", str(source), "--context", "16", "--repeats", "1", "-o", str(out)]) == 0
        assert json.loads(out.read_text())["ratios"] == {}
        assert "ratio" not in capsys.readouterr().out

    def test_bench_prune(self, source, tmp_path, capsys):
        out = tmp_path / "p.json"
        small = ["--samples", "2", "--sequence-length", "32", "--align", "2", "--layers", "1"]
        assert main(["bench", "prune", str(source), *small, "-o", str(out)]) == 0
        facts = json.loads(out.read_text())
        assert facts["layers"] == 1
        assert facts["command"].startswith("intraslice bench prune")
        assert facts["groups"][0]["ratio"] == pytest.approx(facts["groups"][0]["seconds"] / facts["groups"][0]["floor"])
        assert "matmul rate" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("args", "says"),
        [
            (["--context", "257"], "longer than the model's maximum of 256"),
            (["--batch-size", "1000000000"], "the largest that fits is --batch-size"),
            (["--layer", "2"], "--layer must be between 0 and 1"),
        ],
    )
    def test_bad_input(self, source, capsys, args, says):
        assert main(["bench", str(source), *args]) == 2
        assert says in capsys.readouterr().err

    def test_a_window_longer_than_the_context(self, source, capsys):
        assert main(["bench", "prune", str(source), "--sequence-length", "300"]) == 2
        assert "longer than the context" in capsys.readouterr().err
