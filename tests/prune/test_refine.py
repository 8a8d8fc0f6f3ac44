import dataclasses
import itertools
import math
import types
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.config import PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.io import journal as journal_module
from intraslice_jax.io.journal import Journal
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.models.head import predictions, token_kl, token_kl_gradient
from intraslice_jax.prune import refine as refine_module
from intraslice_jax.prune.pipeline import prune_model
from intraslice_jax.prune.refine import STATE, RefineSettings, refine
from tests.prune.flavours import make, windows
from tests.prune.test_residency import streamed

PLAIN = PruneConfig(0.4, align=2, iterative="never")
SETTINGS = RefineSettings(passes=3, learning_rate=0.01)


def pruned_and_dense(flavour, tokens, **changes):
    model = make(flavour, **changes)
    return model, prune_model(model, tokens, PLAIN).decoder


def divergence(dense, decoder, tokens):
    """The loss by its definition, in float64."""
    reference, judged = (
        np.asarray(jax.nn.log_softmax(d(jnp.asarray(tokens)).astype(jnp.float32), -1), np.float64)
        for d in (dense.decoder, decoder)
    )
    return np.mean((np.exp(reference) * (reference - judged)).sum(-1))


@pytest.mark.parametrize("flavour", ["ragged", "phi"])
def test_predictions_come_nearer_on_windows_that_were_not_learned_on(flavour):
    tokens, told = windows(32), []
    model, pruned = pruned_and_dense(flavour, tokens)
    refined = refine(model, pruned, tokens, SETTINGS, lambda *done: told.append(done))
    found, held = refined.notes["held_out_divergence"], tokens[28:]
    assert found["before"] == pytest.approx(divergence(model, pruned, held), rel=1e-3)
    assert found["after"] == pytest.approx(divergence(model, refined.decoder, held), rel=1e-3)
    assert refined.notes["accepted"]
    assert found["after"] < 0.95 * found["before"]
    losses = refined.notes["losses"]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert told == [(i, 84) for i in range(85)]
    before = decoder_to_arrays(pruned)
    for name, array in decoder_to_arrays(refined.decoder).items():
        assert bool((array == before[name]).all()) != name.endswith("_proj"), name


def test_one_step_goes_down_the_gradient_of_the_divergence():
    """Adam's first step is the sign of each gradient; the loss is differentiated by JAX as a whole here."""
    tokens = windows(2)
    model, pruned = pruned_and_dense("gqa", tokens)
    settings = RefineSettings(passes=1, learning_rate=1e-3)
    refined = decoder_to_arrays(refine(model, pruned, tokens, settings).decoder)
    name = "layers.1.mlp.down_proj"
    leaves, treedef = jax.tree.flatten(pruned)
    learned_on = jnp.asarray(tokens[:1])
    place = list(decoder_to_arrays(pruned)).index(name)

    def loss(weight):
        decoder = jax.tree.unflatten(treedef, [*leaves[:place], weight, *leaves[place + 1 :]])
        reference = jax.nn.log_softmax(model.decoder(learned_on), -1)
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(decoder(learned_on), -1))).sum(-1).mean()

    weight = leaves[place]
    gradient, moved = jax.grad(loss)(weight), refined[name] - weight
    clear = jnp.abs(gradient) > 1e-2 * jnp.abs(gradient).max()
    assert bool((jnp.sign(moved) == -jnp.sign(gradient))[clear].all())
    # Adam divides by |g| + 1e-8, which tells for the smallest.
    step = 1e-3 * float(jnp.sqrt(jnp.mean(jnp.square(weight))))
    np.testing.assert_allclose(jnp.abs(moved)[clear], step, rtol=2e-2)


def test_the_divergence_has_the_gradient_of_its_definition():
    model, rng = make("biases", lm_head_bias=True), np.random.default_rng(0)
    one, other = (jnp.asarray(rng.standard_normal((2, 150, 16)), jnp.float32) for _ in range(2))

    def plain(other):
        reference, judged = (jax.nn.log_softmax(model.decoder.logits(h), -1) for h in (one, other))
        return (jnp.exp(reference) * (reference - judged)).sum(-1)

    kl, gradient = token_kl_gradient(model.decoder, one, other)
    np.testing.assert_allclose(kl, plain(other), rtol=1e-4, atol=1e-6)
    reference = predictions(model.decoder, one)
    np.testing.assert_allclose(token_kl(model.decoder, reference, other), kl, rtol=1e-5, atol=1e-5)
    nearly = token_kl(model.decoder, reference, one + 1e-3 * other)  # where little is left of large logits
    np.testing.assert_allclose(nearly.mean(), plain(one + 1e-3 * other).mean(), rtol=0.05)
    np.testing.assert_allclose(gradient, jax.grad(lambda h: plain(h).sum())(other), rtol=1e-3, atol=1e-5)


def test_what_does_not_help_is_refused():
    tokens = windows(8)
    model, pruned = pruned_and_dense("gqa", tokens)
    refined = refine(model, pruned, tokens, RefineSettings(passes=1, learning_rate=30.0))
    assert not refined.notes["accepted"]
    for name, array in decoder_to_arrays(pruned).items():
        np.testing.assert_array_equal(decoder_to_arrays(refined.decoder)[name], array)


def test_one_window_cannot_be_split():
    model, pruned = pruned_and_dense("gqa", windows(1))
    assert refine(model, pruned, windows(1), SETTINGS).notes == {
        "accepted": False,
        "reason": "one window cannot be split",
    }


def test_bfloat16_learns_in_float32():
    """The sum of many small steps must not vanish in the roundings of the weights."""
    tokens = windows(16)
    model, pruned = pruned_and_dense("gqa", tokens, dtype=jnp.bfloat16)
    refined = refine(model, pruned, tokens, RefineSettings(passes=4, learning_rate=3e-4)).decoder
    found, before = decoder_to_arrays(refined), decoder_to_arrays(pruned)
    assert all(found[name].dtype == array.dtype for name, array in before.items())
    name = "layers.0.mlp.up_proj"
    assert float((found[name] != before[name]).mean()) > 0.3


def test_an_option_of_the_run():
    model, tokens = make("gqa"), windows(16)
    config = dataclasses.replace(PLAIN, refine=2)
    plain, first, second = (prune_model(model, tokens, c) for c in (PLAIN, config, config))
    assert "refinement" not in plain.report
    assert first.report["refinement"]["accepted"]
    assert first.config == plain.config
    assert [stage["stage"] for stage in first.report["stages"]][-1] == "refinement"
    for name, array in decoder_to_arrays(first.decoder).items():
        np.testing.assert_array_equal(decoder_to_arrays(second.decoder)[name], array)
    with pytest.raises(InputError, match="refine learns all layers at once"):
        prune_model(streamed(model), tokens, config)


def test_a_negative_number_of_passes():
    with pytest.raises(InputError, match="refine must be 0"):
        PruneConfig(refine=-1)


class Stop(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def every_state(monkeypatch):
    """States are kept however little time has passed."""
    monkeypatch.setattr(refine_module, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(refine_module, "WRITING", math.inf)


def learned(model, pruned, tokens, folder, last=None):
    """The refined model, and the windows told; a run that is stopped when it tells of the last of them."""
    told = []

    def on_batch(done, _):
        told.append(done)
        if done == last:
            raise Stop

    with closing(Journal(folder)) as journal:
        journal.begin({})
        return refine(model, pruned, tokens, SETTINGS, on_batch, journal), told


def assert_same(found, expected):
    assert found.notes == expected.notes
    arrays = decoder_to_arrays(found.decoder)
    for name, array in decoder_to_arrays(expected.decoder).items():
        assert np.asarray(arrays[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.mark.usefixtures("every_state")
@pytest.mark.parametrize(("dtype", "stops"), [(jnp.float32, [40, 59]), (jnp.bfloat16, [56])])
def test_a_stopped_run_goes_on_to_the_same_bits(dtype, stops, tmp_path, caplog):
    tokens = windows(32)  # 28 to learn on: a state after every seventh step
    model, pruned = pruned_and_dense("gqa", tokens, dtype=dtype)
    expected = refine(model, pruned, tokens, SETTINGS)
    assert expected.notes["accepted"]  # else its weights say nothing
    for stop in stops:
        with pytest.raises(Stop):
            learned(model, pruned, tokens, tmp_path / "journal", stop)
        assert [path.name for path in (tmp_path / "journal" / STATE).iterdir()] == [f"{stop // 7 * 7:05d}"]
    found, told = learned(model, pruned, tokens, tmp_path / "journal")
    assert told[0] == stops[-1] // 7 * 7
    assert f"going on behind step {told[0]} of the refinement" in caplog.text
    assert_same(found, expected)


@pytest.mark.usefixtures("every_state")
def test_a_damaged_state_is_not_used(tmp_path, caplog):
    tokens = windows(16)  # 14 to learn on: a state after every third step
    model, pruned = pruned_and_dense("gqa", tokens)
    with pytest.raises(Stop):
        learned(model, pruned, tokens, tmp_path / "journal", 20)
    state = tmp_path / "journal" / STATE / "00018"
    files = [path for path in state.rglob("*") if path.is_file()]
    for file in (max(files, key=lambda path: path.stat().st_size), state / "entry.json", state / "SHA256SUMS"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        caplog.clear()
        with closing(Journal(tmp_path / "journal")) as journal:
            journal.begin({})
            assert journal.get_state(STATE, dict[str, Any]) is None
        assert "00018 is damaged" in caplog.text
        assert "learned again" in caplog.text
        file.write_bytes(whole)
    (state / "entry.json").write_bytes(b"")
    found, told = learned(model, pruned, tokens, tmp_path / "journal")
    assert told[0] == 0
    assert_same(found, refine(model, pruned, tokens, SETTINGS))


@pytest.mark.usefixtures("every_state")
def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch):
    tokens = windows(16)
    model, pruned = pruned_and_dense("gqa", tokens)
    written, count = journal_module.write_streamed, itertools.count(1)

    def full(*arguments):
        if next(count) == 3:
            raise OSError(28, "No space left on device")
        written(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_streamed", full)
        with pytest.raises(RunError, match=r"refinement/00009 cannot be written: no space left.*is intact"):
            learned(model, pruned, tokens, tmp_path / "journal")
    assert [path.name for path in (tmp_path / "journal" / STATE).iterdir()] == ["00006"]
    found, told = learned(model, pruned, tokens, tmp_path / "journal")
    assert told[0] == 6
    assert_same(found, refine(model, pruned, tokens, SETTINGS))


def test_writing_states_takes_a_tenth_of_the_time_at_most(monkeypatch):
    """A step takes 30 s and a state 20 s here: the first is kept after a minute, the next 200 s later."""
    clock, kept = [0.0], []
    monkeypatch.setattr(refine_module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    class Log(Journal):
        def put_state(self, name, step, arrays, facts):
            kept.append(step)
            clock[0] += 20

    keeper = refine_module._Keeper(Log("nowhere"), 3)
    progress = refine_module._Progress(0.0)
    for _ in range(12):
        progress.steps += 1
        keeper.keep([], progress)
        clock[0] += 30
    assert kept == [3, 10]
