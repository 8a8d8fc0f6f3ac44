import base64
import dataclasses
import html
import json
import math
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from intraslice_jax import api
from intraslice_jax.cli import _parse, find_commands, main
from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.evaluate import samples
from intraslice_jax.models.generate import generate
from intraslice_jax.prune.shapes import layer_changes
from intraslice_jax.prune.spectra import value_spectra
from intraslice_jax.report import pictures
from intraslice_jax.report.comparison import read_runs
from intraslice_jax.report.pictures import draw_run
from intraslice_jax.report.run import read_run
from intraslice_jax.settings import as_settings
from tests.fuzz.reports import evaluation_example, report_example
from tests.report.browser import show
from tests.tiny import tiny_text, write_json, write_tiny_llama

SAMPLE_TEXTS = samples.sample_texts  # as the suite's other tests do not see it

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = ["errors", "heads", "ratios", "spectra", "spectra-by-layer", "time"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(tiny_text())
    (folder / "held out.txt").write_text(tiny_text(1000, seed=5))
    return folder


def arguments(source, out, sparsity):
    files = ["--calibration", str(source / "text.txt"), "--text", str(source / "held out.txt"), "--windows", "2"]
    small = [
        "--preset",
        "fast",
        "--samples",
        "4",
        "--sequence-length",
        "64",
        "--align",
        "2",
        "--sparsity",
        str(sparsity),
    ]
    return ["prune", str(source / "model"), "-o", str(out), *files, *small]


@pytest.fixture(scope="module")
def run(source):
    out = source / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "sample_texts", SAMPLE_TEXTS)
        assert main(arguments(source, out, 0.25)) == 0
    return out


@pytest.fixture
def copy(run, tmp_path):
    """The run, to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


def change(run, **facts):
    """Puts facts into a run's report."""
    report = json.loads((run / "report.json").read_text())
    write_json(run / "report.json", {**report, **facts})


def cells(page):
    """A page with plain table cells."""
    return re.sub(r"<(t[dh])[^>]*>", r"<\1>", page.read_text())


def test_a_run_leaves_a_page_and_its_pictures(run):
    page = (run / "report.html").read_text()
    inside = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    files = {path.stem: path.read_bytes() for path in (run / "pictures").iterdir()}
    assert sorted(files) == PICTURES
    assert sorted(inside) == sorted(files.values())
    assert all(image.startswith(PNG) for image in inside)
    report = json.loads((run / "report.json").read_text())
    assert f"{100 * report['removed_block_fraction']:.2f} %" in page
    found = report["texts"]["held out.txt"]
    table = cells(run / "report.html")
    assert f"<td>{found['dense_perplexity']:.3f}</td><td>{found['pruned_perplexity']:.3f}</td>" in table
    assert list(found["dense_loss_by_position"]) == ["1-3", "4-15", "16-63"]
    for band, dense in found["dense_loss_by_position"].items():
        pruned = found["pruned_loss_by_position"][band]
        numbers = f"<td>{dense:.3f}</td><td>{pruned:.3f}</td><td>{pruned - dense:+.3f}</td>"
        assert f"<td>held out.txt</td><td>{band}</td>{numbers}" in table
    for layer in report["layers"]:
        assert f"<td>{layer['intermediate_size']} of 64</td>" in table
    stages = ["reading", "ratios", "layers", "perplexity", "sample texts"]
    assert [stage["stage"] for stage in report["stages"]] == stages
    assert all(stage["seconds"] > 0 and stage["peak_rss_bytes"] > 10**8 for stage in report["stages"])
    assert re.search(r"https?:|src=\"(?!data:)|<link rel=\"stylesheet", page) is None  # nothing from elsewhere


def test_sample_texts_are_what_both_models_generate(run, source):
    found = json.loads((run / "report.json").read_text())["samples"]
    assert [sample["prompt"] for sample in found] == list(samples.PROMPTS)
    for name, path in (("dense", source / "model"), ("pruned", run)):
        model = api.load(path)
        assert [sample[name] for sample in found] == generate(model, samples.PROMPTS, 30).texts
    for sample in found:
        row = "".join(f"<td>{html.escape(sample[name])}</td>" for name in ("prompt", "dense", "pruned"))
        assert row in cells(run / "report.html")


def test_a_run_does_not_fail_for_its_sample_texts(source, caplog):
    model = api.load(source / "model")
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_position_embeddings=16))
    assert SAMPLE_TEXTS(short, short) == []
    (said,) = caplog.messages
    assert said.startswith("no sample texts: ")
    assert "exceed the context" in said


def test_the_perplexities_are_those_of_eval(run, source, tmp_path):
    texts = json.loads((run / "report.json").read_text())["texts"]["held out.txt"]
    out = tmp_path / "eval.json"
    text = ["--text", str(source / "held out.txt"), "--windows", "2", "--sequence-length", "64"]
    assert main(["eval", str(run), *text, "-o", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["perplexity"] == pytest.approx(texts["pruned_perplexity"], rel=1e-6)
    assert (found["text_sha256"], found["text"]) == (texts["text_sha256"], "held out.txt")


def test_the_command_gives_the_same_options(run):
    report = json.loads((run / "report.json").read_text())
    words = shlex.split(report["command"])
    assert words[:2] == ["intraslice", "prune"]
    name, options = _parse(words[1:], find_commands())
    assert name == "prune"
    assert as_settings(options) == report["settings"]
    assert "--seed" not in words  # only what differs from the defaults


def evaluation(run, which, **facts):
    """What `eval` writes about one of the two models of a run."""
    report = json.loads((run / "report.json").read_text())
    counts = {"parameters": report["total_parameters"][which], "block_parameters": report["block_parameters"][which]}
    return {**counts, "settings": {}, **facts}


def test_results_of_eval_in_the_folder_are_taken_in(copy, caplog):
    task = {"task": "piqa <b>", "items": 50, "num_fewshot": 0, "version": "1", "metrics": {"acc": 0.625}}
    text = {"text": "other", "sequence_length": 64, "evaluated_tokens": 630, "text_sha256": "f" * 64}
    for which, acc, perplexity in (("dense", 0.625, 11.5), ("pruned", 0.5, 12.25)):
        result = {**task, "metrics": {"acc": acc}, "standard_errors": {"acc": 0.07}}
        facts = {"perplexity": perplexity, "loss_by_position": {"1-3": perplexity / 2}, **text}
        write_json(copy / f"{which}.json", evaluation(copy, which, tasks=[result], **facts))
        write_json(copy / f"{which} after BOS.json", evaluation(copy, which, bos=True, **{**facts, "perplexity": 9.5}))
    write_json(copy / "another model.json", {**evaluation(copy, "dense", perplexity=1.0, **text), "parameters": 1})
    (copy / "notes.json").write_text("no JSON")
    assert main(["report", str(copy)]) == 0
    (left_out,) = caplog.messages
    assert left_out.startswith(f"{copy / 'another model.json'}: left out")
    found = read_run(copy)
    assert [(p.text, p.dense, p.pruned) for p in found.perplexities][1:] == [
        ("other after BOS", 9.5, 9.5),
        ("other", 11.5, 12.25),
    ]
    (score,) = found.tasks
    assert (score.dense, score.pruned) == ((0.625, 0.07, 50), (0.5, 0.07, 50))
    table = cells(copy / "report.html")
    assert "<td>11.500</td><td>12.250</td><td>x 1.065</td>" in table
    assert "<td>other</td><td>1-3</td><td>5.750</td><td>6.125</td><td>+0.375</td>" in table
    assert "<td>piqa &lt;b&gt;</td><td>acc</td><td>0.6250 ± 0.0700</td><td>50</td><td>0.5000 ± 0.0700</td>" in table


def test_a_result_without_losses_by_position_leaves_those_of_the_run(copy):
    known = json.loads((copy / "report.json").read_text())["texts"]["held out.txt"]
    same = {name: known[name] for name in ("sequence_length", "evaluated_tokens", "text_sha256")}
    write_json(copy / "older.json", evaluation(copy, "pruned", perplexity=12.5, **same))
    (found,) = read_run(copy).perplexities
    assert found.pruned == 12.5
    assert found.losses == {which: known[f"{which}_loss_by_position"] for which in ("dense", "pruned")}


def test_without_matplotlib_the_page_has_its_tables(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(copy), "-o", str(tmp_path / "out")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<img" not in page
    assert page.count("<table") >= 4


def test_runs_are_compared(run, tmp_path):
    """By sparsity, then method and preset; each row says which they are."""
    folders = [run]
    for name, sparsity, preset, method in (
        ("second <run>", 0.5, "fast", "intraslice"),
        ("third", 0.25, "quality", "intraslice"),
        ("fourth", 0.25, "fast", "flap"),
    ):
        folders.append(shutil.copytree(run, tmp_path / name))
        change(folders[-1], sparsity=sparsity, method=method, settings={"preset": preset})
    out = tmp_path / "out"
    assert main(["report", *map(str, reversed(folders)), "-o", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "report.html", "report.json"]
    assert (out / "pictures" / "perplexity-1.png").read_bytes().startswith(PNG)
    facts = json.loads((out / "report.json").read_text())["runs"]
    assert [(f["name"], f["sparsity"], f["method"], f["preset"]) for f in facts] == [
        ("fourth", 0.25, "flap", "fast"),
        ("run", 0.25, "intraslice", "fast"),
        ("third", 0.25, "intraslice", "quality"),
        ("second <run>", 0.5, "intraslice", "fast"),
    ]
    table = cells(out / "report.html")
    rows = [f"<td>{html.escape(f['name'])}</td><td>{f['method']}</td><td>{f['preset']}</td>" for f in facts]
    places = [table.index(row) for row in rows]
    assert places == sorted(places)
    assert all(table.count(row) == 2 for row in rows)  # perplexities, and the other facts
    for fact in facts:
        (found,) = fact["perplexities"]
        assert f"<td>{found['dense']:.3f}</td><td>{found['pruned']:.3f}</td>" in table
    assert table.count("intraslice prune ") == 4


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    assert {found.name for found in read_runs([str(run), str(other)])} == {str(run), str(other)}


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>'\"&$\\frac$" + "n" * 90


def test_pages_in_a_browser(copy, run, tmp_path):
    """One file whatever the run holds; nothing beyond the edge or cut, on a desk and on a telephone."""
    write_json(copy / "t.json", evaluation(copy, "pruned", tasks=[
        {"task": f"a_task_with_quite_a_long_name_{HOSTILE}", "items": 9, "metrics": {"acc": 0.5}, "standard_errors": {}}
    ]))  # fmt: skip
    (measured,) = json.loads((copy / "report.json").read_text())["texts"].values()
    texts = {HOSTILE: measured, "b": {**measured, "text_sha256": "b", "pruned_perplexity": 1e250}}
    command = f"intraslice prune {HOSTILE} -o out"
    change(copy, texts=texts, model=HOSTILE, command=command, versions={HOSTILE: HOSTILE})
    change(copy, samples=[{"prompt": HOSTILE, "dense": HOSTILE, "pruned": "a" * 200}])
    assert main(["report", str(copy)]) == 0
    many = [run, *(shutil.copytree(copy, tmp_path / f"llama-3.2-1b-instruct-pruned-{i}") for i in range(6))]
    assert main(["report", *map(str, many), "-o", str(tmp_path / "both")]) == 0
    for page, count in ((copy / "report.html", len(PICTURES)), (tmp_path / "both" / "report.html", 2)):
        frames, logged = show(page, (1280, 800, 400), tmp_path / "shot.png")
        assert logged == ""
        for frame, width in zip(frames, (1280, 800, 400), strict=True):
            assert frame["width"] == width
            assert frame["content"] <= width
            assert frame["beyond"] == frame["cut"] == []
            assert len(frame["pictures"]) == count
            assert min(frame["pictures"]) > 300
            assert frame["smallest"] >= 12
            assert frame["tallest"] < 300  # no column is squeezed to a letter per line
            assert frame["text"] > 300
            assert frame["scripts"] == 1
            assert frame["selected"][0] == command
            assert set(frame["labels"]) <= {"copied", "selected"}
        assert (tmp_path / "shot.png").stat().st_size > 20_000


@pytest.mark.parametrize("layers", [1, 5, 80])
def test_nothing_is_cut_in_the_pictures(layers, monkeypatch):
    """Titles and labels lie inside the picture, curves inside their axes with room above them."""
    report = report_example()
    for name in ("layers", "dense_layers"):
        report[name] = [{**report[name][0], **({"layer": i} if name == "layers" else {})} for i in range(layers)]
    for name in ("ratios", "removed_by_layer"):
        report[name] = {module: [0.3 + 0.01 * (i % 2) for i in range(layers)] for module in ("attention", "mlp")}
    figures = []
    monkeypatch.setattr(pictures, "to_png", lambda figure: figures.append(figure) or b"")
    assert sorted(draw_run(report)) == PICTURES
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        needed = figure.get_tightbbox(canvas.get_renderer())
        width, height = figure.get_size_inches()
        assert min(needed.x0, needed.y0, width - needed.x1, height - needed.y1) >= 0
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    top = max(max(line.get_ydata(), default=0) for line in axes.lines)
    assert low < 0
    assert high - top > 0.03 * (high - low)  # a marker needs 0.02


# What the run records for it


def test_spectra_are_those_of_each_groups_rows():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((40, 3, 4)) * np.exp(rng.standard_normal((1, 3, 4)))
    flat = y.reshape(40, -1).astype(np.float32)
    found = value_spectra(np.asarray(flat.T @ flat), (0, 2, 2))
    assert found["kv_heads"] == [0, 2]
    for shares, members in zip(found["shares"], ([0], [1, 2]), strict=True):
        singular = np.linalg.svd(y[:, members].swapaxes(0, 1).reshape(-1, 4), compute_uv=False)
        np.testing.assert_allclose(shares, singular**2 / np.square(singular).sum(), rtol=1e-3)
    assert value_spectra(np.zeros((4, 4), np.float32), (0,)) == {"kv_heads": [0], "shares": [[0.0] * 4]}


def test_what_each_layer_lost_is_counted():
    dense, narrow = LayerShape((0, 0, 1, 1), 8, 8, 8, 24), LayerShape((0, 1, 1), 6, 6, 4, 12)
    config = ModelConfig("llama", 61, 16, 8, 8, (dense, dense))
    facts = layer_changes(config, config.with_layers((dense, narrow)))
    attention = 16 * (3 * 6 + 2 * 6 + 2 * 4 + 3 * 4) / (16 * (4 * 8 + 2 * 8 + 2 * 8 + 4 * 8))
    assert facts["removed_by_layer"] == {
        "attention": [0.0, pytest.approx(1 - attention)],
        "mlp": [0.0, pytest.approx(0.5)],
    }
    assert facts["dense_layers"][1]["query_to_kv"] == [0, 0, 1, 1]


# Bad input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "is a file"),
        (lambda path: path.mkdir(), "has no report.json (it holds nothing)"),
        (lambda path: (path.mkdir(), (path / "compare.json").touch()), "has no report.json (it holds compare.json)"),
        (lambda path: (path.mkdir(), (path / "report.json").write_text("{}")), "report.json has no 'layers'"),
        (lambda path: (path.mkdir(), (path / "report.json").write_text("[]")), "report.json has no 'layers'"),
        (lambda path: (path.mkdir(), (path / "report.json").write_text("{")), "report.json cannot be read"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, make, says):
    make(tmp_path / "odd")
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read_run(tmp_path / "odd")
    assert "odd" in str(caught.value)
    assert "intraslice prune" in str(caught.value)


@pytest.fixture
def example(tmp_path):
    """A folder with a report and a result of `eval`, each with everything that it can hold."""
    write_json(tmp_path / "report.json", report_example())
    write_json(tmp_path / "eval.json", evaluation_example())
    return tmp_path


DAMAGES = [
    ("report.json", ["block_parameters"], 7, "block_parameters must be an object, found 7"),
    ("report.json", ["removed_block_fraction"], "a", "removed_block_fraction must be a number, found 'a'"),
    ("report.json", ["removed_model_fraction"], math.nan, "found nan"),
    ("report.json", ["sparsity"], math.inf, "sparsity must be a finite number"),
    ("report.json", ["seconds"], 10**400, "seconds must be at most"),
    ("report.json", ["peak_rss_bytes"], 10**400, "peak_rss_bytes must be at most"),
    ("report.json", ["layers", 1, "qk_head_dim"], "64", "layers.1.qk_head_dim must be a whole number, found '64'"),
    ("report.json", ["layers", 1, "layer"], 0, "entry 1 of layers is about layer 0"),
    ("report.json", ["layers", 1, "mlp_error"], None, "layers.1.mlp_error must be a number, found nothing"),
    ("report.json", ["layers", 0, "notes", "attention", "value_spectra", "shares", 0], [1.0], "differ in length"),
    ("report.json", ["dense_layers", 0, "query_to_kv"], [], "dense_layers.0.query_to_kv"),
    ("report.json", ["removed_by_layer", "mlp"], [0.5], "2 in layers, 2 in dense_layers"),
    ("report.json", ["ratios"], [0.5], "ratios must be an object"),
    ("report.json", ["stages", 0, "seconds"], -1.0, "stages.0.seconds must be at least 0"),
    ("report.json", ["texts", "a\nb"], {}, "texts.a?b.dense_perplexity is missing"),
    ("report.json", ["texts", "a.txt", "dense_perplexity"], "x", "texts.a.txt.dense_perplexity must be"),
    ("report.json", ["samples", 0, "pruned"], 3, "samples.0.pruned must be text"),
    ("report.json", ["command"], ["rm"], "command must be text"),
    ("report.json", ["versions"], None, "versions must be an object"),
    ("report.json", ["settings", "calibrate"], "x", "settings.calibrate must be an object"),
    ("report.json", ["format_version"], 2, "has format version 2, this program reads 1"),
    ("eval.json", ["perplexity"], "12", "perplexity must be a number, found '12'"),
    ("eval.json", ["perplexity"], math.nan, "found nan"),
    ("eval.json", ["sequence_length"], None, "sequence_length must be a whole number"),
    ("eval.json", ["block_parameters"], {}, "block_parameters must be a whole number"),
    ("eval.json", ["tasks"], {}, "tasks must be a list"),
    ("eval.json", ["tasks", 0, "metrics", "acc"], "high", "tasks.0.metrics.acc must be a number"),
    ("eval.json", ["tasks", 0, "standard_errors"], None, "tasks.0.standard_errors must be an object"),
    ("eval.json", ["format_version"], "9", "has format version '9', this program reads 1"),
]


@pytest.mark.parametrize(("name", "path", "value", "says"), DAMAGES, ids=lambda part: str(part)[:40])
def test_a_damaged_file_is_refused_in_a_line(example, name, path, value, says):
    data = json.loads((example / name).read_text())
    *before, last = path
    parent = data
    for step in before:
        parent = parent[step]
    parent[last] = value
    write_json(example / name, data)
    with pytest.raises(InputError) as caught:
        read_run(example)
    assert str(caught.value).startswith(f"{example / name}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_others_are_passed_over(example, caplog):
    """Whatever lies in the folder and is no result of `eval`."""
    for i, content in enumerate((b"", b"[]", b"3", b"{", b"\xff", b"[" * 10**5, b'{"parameters": 1}')):
        (example / f"{i}.json").write_bytes(content)
    write_json(example / "speed.json", {"settings": {}, "parameters": 1400, "block_parameters": 600, "decode": {}})
    (example / "folder.json").mkdir()
    assert [p.text for p in read_run(example).perplexities] == ["a.txt", "b.txt"]
    assert caplog.messages == []


def test_what_older_versions_wrote_is_read(example, tmp_path):
    """Before there were versions, presets, samples, ratios in the settings, refinements and texts with names."""
    report, evaluated = report_example(), evaluation_example()
    for name in ("format_version", "samples", "settings", "refinement", "texts", "versions", "seconds", "command"):
        del report[name]
    for layer in report["layers"]:
        del layer["notes"]["attention"]["value_spectra"]
    for name in ("format_version", "text", "tasks", "loss_by_position", "bos"):
        del evaluated[name]
    write_json(example / "report.json", report)
    write_json(example / "eval.json", evaluated)
    assert main(["report", str(example)]) == 0
    assert "<td>text ffffffff</td>" in cells(example / "report.html")
    assert main(["report", str(example), str(example), "-o", str(tmp_path / "both")]) == 0


def test_wrong_options(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for args, says in (
        ([str(run), str(run)], "2 runs are compared in a folder of their own; pass --output"),
        ([str(run), "-o", str(tmp_path / "out")], "exists already"),
        ([str(tmp_path / "out")], "is no run"),
        (["n" * 300], "cannot be read: File name too long"),
        ([str(run), "nowhere", "-o", str(tmp_path / "new")], "nowhere does not exist"),
    ):
        assert main(["report", *args]) == 2
        line = capsys.readouterr().err.strip()
        assert says in line
        assert "\n" not in line
    assert not (tmp_path / "new").exists()
