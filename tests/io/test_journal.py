"""A run that is stopped goes on to the same bits, or says why it cannot."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import subprocess
from contextlib import closing

import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.config import CalibrationConfig, PruneConfig
from intraslice_jax.errors import InputError, RunError
from intraslice_jax.identity import run_identity
from intraslice_jax.io import journal as journal_module
from intraslice_jax.io.digests import write_digests
from intraslice_jax.io.journal import Journal
from intraslice_jax.io.streaming import write_failure
from intraslice_jax.models.decoder import decoder_to_arrays
from intraslice_jax.prune import pipeline
from intraslice_jax.prune.estimators import GRADIENTS, estimate_ratios
from intraslice_jax.prune.pipeline import prune_model
from tests.prune.flavours import GQA, make, windows, with_arrays

FINE = PruneConfig(sparsity=0.3, align=1, batch_size=3)
LAYERS = 4
RUN = {"prune": {"sparsity": 0.3}}


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_at(layer):
    def on_layer(record):
        if record.layer == layer:
            raise Stop

    return on_layer


def run(model, config, folder, on_layer=None, **identity):
    journal = Journal(folder)
    try:
        journal.begin(RUN | identity)
        return prune_model(model, windows(), config, on_layer, run_log=journal)
    finally:
        journal.close()


def interrupted(model, config, folder, layer, **identity):
    with pytest.raises(Stop):
        run(model, config, folder, stop_at(layer), **identity)


def assert_same_bits(found, expected):
    assert found.config == expected.config
    one, two = decoder_to_arrays(found.decoder), decoder_to_arrays(expected.decoder)
    assert one.keys() == two.keys()
    for name in two:
        assert np.asarray(one[name]).tobytes() == np.asarray(two[name]).tobytes(), name
    for a, b in zip(found.report["layers"], expected.report["layers"], strict=True):
        assert json.dumps({**a, "seconds": 0}) == json.dumps({**b, "seconds": 0})


@pytest.fixture(scope="module")
def expected():
    return prune_model(make("gqa", layers=LAYERS), windows(), FINE)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The journal of a run that was stopped behind layer 2."""
    folder = tmp_path_factory.mktemp("stopped") / "journal"
    interrupted(make("gqa", layers=LAYERS), FINE, folder, 2)
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "journal")
    return tmp_path / "journal"


@pytest.mark.parametrize(
    ("flavour", "settings"),
    [
        ("phi", {}),
        ("biases", {"method": "flap"}),
        ("gqa", {"ratios": "fisher_pca"}),
        ("mha", {"layout": "uniform"}),
        ("no_rope", {}),  # arrays of size zero
        ("gqa", {"loss_weight": 0.5}),
        ("phi", {"dense_targets": 1.0}),
    ],
)
def test_a_continued_run_gives_the_same_bits(flavour, settings, tmp_path):
    config = dataclasses.replace(FINE, **settings)
    unrotated = dataclasses.replace(GQA, rotary_dim=0)
    model = make("gqa", layers=3, shape=unrotated) if flavour == "no_rope" else make(flavour, layers=3)
    interrupted(model, config, tmp_path / "journal", 1)
    seen = []
    found = run(model, config, tmp_path / "journal", seen.append)
    assert [record.layer for record in seen] == [2]
    assert_same_bits(found, prune_model(model, windows(), config))


def test_bfloat16(tmp_path):
    model = make("gqa", layers=3, dtype=jnp.bfloat16)
    interrupted(model, FINE, tmp_path / "journal", 0)
    assert_same_bits(run(model, FINE, tmp_path / "journal"), prune_model(model, windows(), FINE))


def test_a_run_that_was_stopped_behind_the_last_layer(tmp_path):
    model = make("gqa", layers=2)
    interrupted(model, FINE, tmp_path / "journal", 1)
    assert_same_bits(run(model, FINE, tmp_path / "journal"), prune_model(model, windows(), FINE))


def test_what_took_a_pass_over_the_text_is_not_done_again(tmp_path, monkeypatch):
    model = make("gqa", layers=2)
    for settings, function in (
        ({"ratios": "fisher"}, "estimate_ratios"),
        ({"layout": "uniform"}, "plan_uniform_layout"),
        ({"loss_weight": 0.5}, "token_gradients"),
    ):
        config, folder = dataclasses.replace(FINE, **settings), tmp_path / next(iter(settings))
        interrupted(model, config, folder, 0)
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, function, lambda *_, **__: pytest.fail("done again"))
            run(model, config, folder)


class Passes:
    """Told of the batches of a stage; ends the run at one of them."""

    def __init__(self, last=None):
        self.done, self.last = [], last
        self.begun = False

    def __call__(self, done, _):
        if not self.begun:  # what was done before
            self.begun = True
            return
        self.done.append(done)
        if done == self.last:
            raise Stop


def run_of_ratios(config, folder, on_batch):
    with closing(Journal(folder)) as journal:
        journal.begin(RUN)
        return estimate_ratios(make("gqa", layers=3), windows(12), config, on_batch, journal)


@pytest.mark.parametrize(
    ("settings", "stopped_at", "first"),
    [
        # Batches of 3: eight sequences are in whole groups, so the third batch is needed again.
        ({"ratios": "fisher", "gradient_group": 4}, 9, 9),
        ({"ratios": "fisher_pca", "gradient_group": 1}, 6, 9),
        ({"ratios": "fisher_components", "gradient_group": 4}, 9, 9),
        ({"ratios": "kl"}, 5, 5),  # two measurements in each layer
    ],
)
def test_a_stage_that_judges_units_goes_on_where_it_was(settings, stopped_at, first, tmp_path):
    config, folder = dataclasses.replace(FINE, **settings), tmp_path / "journal"
    whole, rest = Passes(), Passes()
    expected = estimate_ratios(make("gqa", layers=3), windows(12), config, whole)
    with pytest.raises(Stop):
        run_of_ratios(config, folder, Passes(stopped_at))
    assert run_of_ratios(config, folder, rest) == expected
    assert rest.done == [done for done in whole.done if done >= first]
    assert not (folder / GRADIENTS).exists()


def test_damaged_sums_are_taken_anew(tmp_path, caplog):
    config, folder = dataclasses.replace(FINE, ratios="fisher", gradient_group=1), tmp_path / "journal"
    expected = estimate_ratios(make("gqa", layers=3), windows(12), config)
    with pytest.raises(Stop):
        run_of_ratios(config, folder, Passes(9))
    kept = {file: file.read_bytes() for file in files(folder / GRADIENTS)}
    assert {file.name for file in kept} == {"SHA256SUMS", "arrays.safetensors", "entry.json"}
    for file, whole in kept.items():
        shutil.copytree(folder, tmp_path / file.name)
        damaged = tmp_path / file.name / GRADIENTS / file.name
        damaged.write_bytes(whole[: len(whole) // 2])
        caplog.clear()
        rest = Passes()
        assert run_of_ratios(config, tmp_path / file.name, rest) == expected
        assert rest.done[0] == 3
        assert "that pass over the text begins again" in caplog.text


def test_the_latest_two_states_are_kept_and_every_layer(stopped):
    names = {kind: sorted(path.name for path in (stopped / kind).iterdir()) for kind in ("layers", "streams")}
    assert names == {"layers": ["00000", "00001", "00002"], "streams": ["00001", "00002"]}


def damages(content):
    """Truncations at several places, and a flipped bit in the middle."""
    for end in {0, 1, len(content) // 2, len(content) - 1}:
        if 0 <= end < len(content):
            yield content[:end]
    if content:
        middle = len(content) // 2
        yield content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def begin(folder, run=RUN):
    with closing(Journal(folder)) as journal:
        journal.begin(run)
        return journal.layers_done


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_any_damage_to_the_last_state_falls_back_to_the_one_before(copy, caplog):
    assert begin(copy) == 3
    for file in (*files(copy / "streams" / "00002"), *files(copy / "layers" / "00002")):
        whole = file.read_bytes()
        for damaged in damages(whole):
            if damaged == whole[:-1] and file.name == "SHA256SUMS":
                continue  # its last line is complete without the end of the line
            caplog.clear()
            file.write_bytes(damaged)
            assert begin(copy) == 2, file
            assert "damaged" in caplog.text
            assert "the state before it is used" in caplog.text
        file.unlink()
        assert begin(copy) == 2
        file.write_bytes(whole)
    assert begin(copy) == 3


def test_a_list_of_digests_that_ends_early_is_damage(copy):
    sums = copy / "streams" / "00002" / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        sums.write_text("".join(lines[:count]))
        assert begin(copy) == 2


def test_the_state_before_the_last_gives_the_same_bits(copy, expected):
    file = copy / "streams" / "00002" / "entry.json"
    file.write_bytes(file.read_bytes()[:-1])
    seen = []
    assert_same_bits(run(make("gqa", layers=LAYERS), FINE, copy, seen.append), expected)
    assert [record.layer for record in seen] == [2, 3]


def test_what_a_killed_run_left_half_written_does_not_matter(copy, expected):
    shutil.copytree(copy / "layers" / "00002", copy / "layers" / ".00003.abc.partial")
    shutil.copytree(copy / "layers" / "00002", copy / "layers" / "00003")  # a layer without its stream
    assert_same_bits(run(make("gqa", layers=LAYERS), FINE, copy), expected)
    assert not list((copy / "layers").glob(".*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (["streams/00001/entry.json", "streams/00002/entry.json"], "streams/00002 is damaged.*no other state"),
        (["layers/00000/entry.json"], "layers/00000 is damaged.*no other state"),
        (["run.json"], "run.json is missing or damaged"),
    ],
)
def test_damage_beyond_the_last_state_is_refused(copy, damage, message):
    for name in damage:
        content = (copy / name).read_bytes()
        for damaged in damages(content):
            (copy / name).write_bytes(damaged)
            if name == damage[-1]:
                with pytest.raises(InputError, match=f"{message}.*remove the folder of the journal") as caught:
                    begin(copy)
                assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["layers/00002", "streams/00002"])
def test_a_part_of_another_place_or_run_is_damage(part, copy, tmp_path, caplog):
    """All digests are right: only what the parts say about themselves is not."""
    kind = part.partition("/")[0]
    shutil.copytree(copy / kind / "00001", tmp_path / "before")
    interrupted(make("gqa", seed=5, layers=LAYERS), FINE, tmp_path / "other", 2, seed=5)
    for other, says in ((tmp_path / "before", f"for {kind}/00001"), (tmp_path / "other" / part, "of another run")):
        shutil.rmtree(copy / part)
        shutil.copytree(other, copy / part)
        caplog.clear()
        assert begin(copy) == 2
        assert says in caplog.text


def test_facts_of_another_kind_are_refused(copy):
    entry = copy / "layers" / "00001" / "entry.json"
    content = json.loads(entry.read_text())
    content["facts"]["record"]["layer"] = "one"
    entry.write_text(json.dumps(content))
    write_digests(entry.parent, ".")
    with pytest.raises(
        InputError, match=r"00001/entry\.json: facts: record\.layer must be a whole number, found 'one'"
    ):
        run(make("gqa", layers=LAYERS), FINE, copy)


def test_damaged_ratios_are_refused(tmp_path):
    config = dataclasses.replace(FINE, ratios="fisher")
    model = make("gqa", layers=2)
    interrupted(model, config, tmp_path / "journal", 0)
    file = tmp_path / "journal" / "ratios.json"
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"ratios.json is missing or damaged.*remove the folder of the journal"):
            run(model, config, tmp_path / "journal")


def identity(**changes):
    """The identity of a run with some of its parts exchanged."""
    given = {
        "model": make("gqa"),
        "windows": windows(),
        "text_sha256": "a",
        "config": FINE,
        "calibrate": CalibrationConfig(samples=6, sequence_length=32),
    } | changes
    return run_identity(**given)


def other_weight():
    up = np.asarray(decoder_to_arrays(make("gqa").decoder)["layers.1.mlp.up_proj"]).copy()
    up[-1, -1] = np.nextafter(up[-1, -1], np.float32(10))
    return with_arrays(make("gqa"), layers__1__mlp__up_proj=up)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config": dataclasses.replace(FINE, sparsity=0.2)}, r"prune.sparsity was 0\.3, now it is 0\.2"),
        ({"config": dataclasses.replace(FINE, damping=0.02)}, r"prune.damping was 0\.01, now it is 0\.02"),
        ({"calibrate": CalibrationConfig(samples=6, sequence_length=32, seed=1)}, "calibrate.seed was 0, now it is 1"),
        ({"text_sha256": "b"}, "calibrate.text_sha256 was a, now it is b"),
        ({"windows": windows(seed=2)}, "calibrate.tokens_sha256"),
        ({"model": make("gqa", dtype=jnp.bfloat16)}, "model.weights"),
        ({"model": other_weight()}, "model.weights"),  # the last bit of one number
        ({"model": make("mha")}, "model.architecture_sha256"),
    ],
)
def test_the_journal_of_another_run_is_refused_with_the_difference(tmp_path, changes, field):
    first = Journal(tmp_path / "journal")
    first.begin(identity())
    first.put("ratios", {})
    first.close()
    begin(tmp_path / "journal", identity())  # the same run again
    with pytest.raises(InputError, match=f"journal is of another run: {field}.*remove the folder of the journal"):
        begin(tmp_path / "journal", identity(**changes))


def test_a_file_of_ratios_is_part_of_the_run(tmp_path):
    file = tmp_path / "ratios.json"
    config = dataclasses.replace(FINE, ratios=str(file))
    found = []
    for ratio in (0.3, 0.2):
        file.write_text(json.dumps({"attention": [ratio] * 2, "mlp": [ratio] * 2}))
        found.append(identity(config=config)["ratios_file_sha256"])
    assert found[0] != found[1]


def test_a_journal_in_use(tmp_path):
    first = Journal(tmp_path / "journal")
    first.begin(RUN)
    first.put("ratios", {})
    for anew in (False, True):
        second = Journal(tmp_path / "journal", anew)
        with pytest.raises(InputError, match=f"in use by another run, process {os.getpid()} on host "):
            second.begin(RUN)
        second.close()
    first.close()
    begin(tmp_path / "journal")


def full_after(layers, monkeypatch):
    """From the state of that layer on the disk is full."""
    save, calls = journal_module.ocp.save, []

    def saved(path, tree, **options):
        calls.append(path)
        if len(calls) > 2 * layers + 1:
            raise OSError(28, "No space left on device", path)
        return save(path, tree, **options)

    monkeypatch.setattr(journal_module.ocp, "save", saved)


def test_a_full_disk_keeps_the_layers_before(tmp_path, monkeypatch, expected):
    model, folder = make("gqa", layers=LAYERS), tmp_path / "journal"
    with monkeypatch.context() as patch:
        full_after(1, patch)
        with pytest.raises(RunError, match=r"streams/00001 cannot be written: no space left.*is intact") as caught:
            run(model, FINE, folder)
        assert "\n" not in str(caught.value)
    assert not list(folder.glob("*/.*"))
    assert_same_bits(run(model, FINE, folder), expected)


@pytest.mark.parametrize(
    "words",
    [
        "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']",
        "RESOURCE_EXHAUSTED: No space left on device [tensorstore_spec='{\"origin\":[0,0,0]}}'] [os_error_code='28']",
        "[Errno 28] No space left on device: 'state'",
    ],
)
def test_the_reason_is_found_in_a_long_message(words):
    assert (
        str(write_failure(pathlib.Path("out"), ValueError(words))) == "out cannot be written: no space left on device"
    )


def test_a_disk_that_is_really_full(tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        model = make("gqa", layers=30)
        with pytest.raises(RunError, match=r"cannot be written: no space left on device") as caught:
            run(model, FINE, disk / "journal")
        assert "\n" not in str(caught.value)
        done = begin(disk / "journal")
        assert 0 < done < 30
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_lock_that_is_a_folder(copy):
    (copy / "lock").unlink(missing_ok=True)
    (copy / "lock").mkdir()
    with pytest.raises(InputError, match="lock is a folder, expected the file of a lock; remove it"):
        begin(copy)


def test_nothing_is_written_before_there_is_something_to_keep(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal")
    journal.begin(RUN)
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_anew(copy, caplog):
    caplog.set_level(logging.WARNING)
    journal = Journal(copy, anew=True)
    journal.begin({"prune": {"sparsity": 0.9}})
    assert journal.layers_done == 0
    assert not copy.exists()
