"""The harness's model class, against the harness's own one for PyTorch."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

import intraslice_jax as isl
from intraslice_jax.cli import main
from intraslice_jax.errors import InputError
from tests.conftest import ROOT
from tests.tiny import tiny_text, write_json, write_tiny_llama
from tests.without_torch import WITHOUT_TORCH

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra eval)")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from intraslice_jax.evaluate import harness
from intraslice_jax.evaluate.harness import find_tasks, run_tasks
from intraslice_jax.evaluate.tasks import IntraSliceLM

CONTEXT = 64
# Special beginnings, a space at the end that moves to the continuation, an empty context, texts that are cut, and
# continuations that share their input.
PAIRS = [
    ("the river", " runs"),
    ("the river", " runs over stones"),
    ("", "over"),
    ("a b c", "d"),
    ("a b c", "e"),
    ("stones " * 14, " tail"),
    ("trailing  ", "space"),
    ("<s>begins", " twice"),
]
TEXTS = ["short", "the river runs over small stones " * 5, "x" * CONTEXT]


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def reference(folder):
    """The same model in the harness's PyTorch class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="accelerate or torch is not installed")
        return huggingface.HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32")


@pytest.fixture(scope="module")
def ours(folder):
    return IntraSliceLM(str(folder))


def test_log_likelihoods_are_those_of_the_pytorch_class(ours, reference):
    wanted = reference.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    for (value, greedy), (wanted_value, wanted_greedy) in zip(found, wanted, strict=True):
        assert value == pytest.approx(wanted_value, abs=1e-3)
        assert greedy == wanted_greedy


@pytest.mark.slow
def test_a_real_model_answers_like_the_pytorch_class(smollm2_gguf, calibration_texts, tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="accelerate or torch is not installed")
    text = (calibration_texts / "technical.utf8").read_text(encoding="utf-8")
    words = [text[start : start + 500].split(" ") for start in range(1000, 49_000, 4000)]
    pairs = [(" ".join(few[1:-12]), f" {' '.join(few[-12:-4])}") for few in words]
    isl.export(isl.load(smollm2_gguf), tmp_path / "hf")
    theirs = huggingface.HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=8, dtype="float32")
    wanted = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    found = IntraSliceLM(str(smollm2_gguf)).loglikelihood(requests("loglikelihood", pairs))
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_rolling_log_likelihoods_are_those_of_the_pytorch_class(ours, reference, capsys):
    arguments = [(text,) for text in TEXTS]
    wanted = reference.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", arguments)) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("until", ["none", "first letter"])
def test_generations_are_those_of_the_pytorch_class(ours, reference, until):
    settings = {"until": ["never such"], "max_gen_toks": 10, "do_sample": False}
    arguments = [("the river", settings), ("a", settings), ("the model " * 9, settings)]
    wanted = reference.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    if until != "none":
        settings = {"until": wanted[0][3], "max_gen_toks": 10, "temperature": 0.0}
        arguments = [("the river", settings)]
        wanted = reference.generate_until(requests("generate_until", arguments), disable_tqdm=True)
        assert len(wanted[0]) < 4
    assert ours.generate_until(requests("generate_until", arguments)) == wanted


def test_generation_ends_with_the_stop_sequence(ours, monkeypatch):
    """Not only is the text cut there: no further token is computed."""
    import intraslice_jax.models.generate as generation

    steps = []
    decode = generation.decode
    monkeypatch.setattr(generation, "decode", lambda *arguments: steps.append(1) or decode(*arguments))
    everything = requests("generate_until", [("the river", {"until": [], "max_gen_toks": 12})])
    text = ours.generate_until(everything)[0]
    assert len(steps) == 11
    steps.clear()
    stopped = requests("generate_until", [("the river", {"until": [text[0]], "max_gen_toks": 12})])
    assert ours.generate_until(stopped) == [""]
    assert len(steps) < 4  # a character may be several tokens


def test_sampling_follows_the_tasks_settings(ours):
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0, "top_k": 1}
    greedy = {"until": [], "max_gen_toks": 8}
    texts = [ours.generate_until(requests("generate_until", [("a", s)])) for s in (sampled, greedy)]
    assert texts[0] == texts[1]  # one likeliest token, whatever the temperature
    wild = ours.generate_until(requests("generate_until", [("a", {**sampled, "top_k": 0})]))
    assert wild != texts[1]
    with pytest.raises(InputError, match="num_beams"):
        ours.generate_until(requests("generate_until", [("a", {**greedy, "num_beams": 4})]))
    with pytest.raises(InputError, match="leave no room"):
        ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": CONTEXT})]))


def test_the_class_is_registered(folder):
    assert get_model("intraslice") is IntraSliceLM
    lm = get_model("intraslice").create_from_arg_string(
        f"pretrained={folder},max_length=32", {"batch_size": "auto", "device": "cpu", "max_batch_size": None}
    )
    assert (lm.max_length, lm.batch_size, lm.rank, lm.world_size) == (32, 0, 0, 1)
    assert lm.tokenizer_name.endswith(folder.name)
    with pytest.raises(InputError, match="max_length must be from 1 to the context"):
        IntraSliceLM(str(folder), max_length=CONTEXT + 1)
    with pytest.raises(InputError, match="batch_size must be a number"):
        IntraSliceLM(str(folder), batch_size="many")


# Task files

TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA, train: DATA}}
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of task files: one that chooses, one that predicts a word."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "own"
    folder.mkdir()
    questions = [
        {"question": f"what is {i}?", "choices": ["a river", "small", "it rains"][: 2 + i % 2], "answer": i % 2}
        for i in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = TASK.replace("DATA", str(data))
    (folder / "colours.yaml").write_text(task)
    word = task.replace("task: colours", "task: word").replace("multiple_choice", "loglikelihood")
    word = word.replace('doc_to_choice: "{{choices}}"\n', "").replace("doc_to_target: answer", 'doc_to_target: " a"')
    word = word.replace(
        "{metric: acc,", "{metric: perplexity, aggregation: perplexity, higher_is_better: false}\n  - {metric: acc,"
    )
    (folder / "word.yaml").write_text(word)
    return folder


def arguments(folder, own, *more):
    return ["eval", str(folder), "--include-path", str(own), *map(str, more)]


def test_the_command_answers_tasks(folder, own, tmp_path, capsys):
    out = tmp_path / "out.json"
    (tmp_path / "text.txt").write_text(tiny_text(300))
    more = ["--text", tmp_path / "text.txt", "--sequence-length", "32", "--limit", "4", "-o", out]
    assert main(arguments(folder, own, "--tasks", "colours,word", *more)) == 0
    said = capsys.readouterr()
    facts = json.loads(out.read_text())
    assert facts["perplexity"] > 1
    colours, word = facts["tasks"]
    assert (colours["task"], colours["items"], colours["num_fewshot"], colours["version"]) == ("colours", 4, 0, "2.0")
    assert 0 <= colours["metrics"]["acc"] <= 1
    assert colours["standard_errors"]["acc"] > 0
    assert word["metrics"]["perplexity"] > 1
    assert word["standard_errors"]["perplexity"] > 0
    table = said.out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["task", "items", "shots", "metric", "value", "±"]
    assert table[1].split()[:5] == ["colours", "4", "0", "acc", f"{colours['metrics']['acc']:.4f}"]
    assert "bootstrap" not in said.out
    assert facts["settings"]["tasks"] == ["colours", "word"]


def test_shots_change_the_prompt(ours, own):
    tasks = find_tasks(["colours"], own)
    (result,) = run_tasks(ours, tasks, num_fewshot=2)
    assert (result.num_fewshot, result.items) == (2, 6)
    prompts = [instance.args[0] for instance in tasks["tasks"]["colours"].instances]
    assert all(prompt.count("Question:") == 3 for prompt in prompts)
    assert "DISABLE_MULTIPROC" not in os.environ


def test_an_answer_is_counted_by_hand(ours, own):
    """acc is the share of questions whose right choice has the largest log-likelihood."""
    (result,) = run_tasks(ours, find_tasks(["colours"], own))
    right = 0
    for line in (own / "data.jsonl").read_text().splitlines():
        doc = json.loads(line)
        pairs = [(f"Question: {doc['question']}\nAnswer:", f" {choice}") for choice in doc["choices"]]
        values = [value for value, _ in ours.loglikelihood(requests("loglikelihood", pairs))]
        right += values.index(max(values)) == doc["answer"]
    assert result.metrics["acc"] == pytest.approx(right / 6)


def test_tasks_work_without_torch(folder, own, tmp_path):
    run = f"sys.exit(main({arguments(folder, own, '--tasks', 'colours', '--limit', '2')!r}))"
    code = f"{WITHOUT_TORCH}\nfrom intraslice_jax.cli import main\n{run}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "colours" in done.stdout


# Bad input


@pytest.fixture
def refuse(folder, own, capsys):
    def refuse(*more):
        assert main(arguments(folder, own, *more)) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("intraslice eval: ")
        assert "\n" not in line
        return line

    return refuse


def test_unknown_tasks_have_near_ones(refuse, own, monkeypatch):
    # The harness's own ten thousand files are not what is tested here, and take their time.
    class OwnOnly(harness.TaskManager):
        def __init__(self, include_path, include_defaults=False):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", OwnOnly)
    assert "there is no task 'colors'; did you mean colours?" in refuse("--tasks", "colors")
    assert "lm-eval ls tasks" in refuse("--tasks", "xyzzy")
    (own / "nameless.yaml").write_text("doc_to_text: a\n")
    assert "nameless.yaml has no field 'task'" in refuse("--tasks", "nameless")
    (own / "nameless.yaml").write_text("a: [b\n")
    assert "nameless.yaml cannot be read" in refuse("--tasks", "nameless")


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("doc_to_text", "field 'doc_to_text' is missing"),
        ("doc_to_target", "field 'doc_to_target' is missing"),
        ("doc_to_choice", "field 'doc_to_choice' is missing"),
        ("dataset_path", "field 'dataset_path' is missing"),
        ("validation_split", "field 'test_split' is missing (or 'validation_split')"),
    ],
)
def test_a_task_file_with_a_missing_field(refuse, own, field, says):
    lines = (own / "colours.yaml").read_text().splitlines(keepends=True)
    (own / "colours.yaml").write_text("".join(line for line in lines if not line.startswith(f"{field}:")))
    line = refuse("--tasks", "colours")
    assert says in line
    assert str(own / "colours.yaml") in line


def test_a_task_file_with_a_wrong_field(refuse, own):
    text = (own / "colours.yaml").read_text()
    (own / "colours.yaml").write_text(text + "doc_to_texxt: x\n")
    assert "doc_to_texxt" in refuse("--tasks", "colours")
    (own / "colours.yaml").write_text(text.replace("{{question}}", "{{query}}").replace("answer", "asnwer"))
    assert "colours.yaml" in refuse("--tasks", "colours")


def test_no_network(refuse, own):
    text = (own / "colours.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("dataset_kwargs")]
    (own / "colours.yaml").write_text("\n".join(lines).replace("dataset_path: json", "dataset_path: someone/some-set"))
    line = refuse("--tasks", "colours")
    assert "someone/some-set cannot be downloaded" in line
    assert "--include-path" in line


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tasks", "colours", "--limit", "0"], "limit must be at least 1, found 0"),
        (["--tasks", "colours", "--num-fewshot", "-1"], "num_fewshot must be 0 or more, found -1"),
        (["--text", "x.txt"], "--include-path belongs to --tasks"),
        ([], "or --tasks NAME,NAME"),
        (["--tasks", "colours", "--include-path", "nowhere"], "--include-path nowhere is not a folder"),
    ],
)
def test_wrong_options(refuse, more, says):
    assert says in refuse(*more)


def test_a_missing_harness(refuse, monkeypatch):
    monkeypatch.delitem(sys.modules, "intraslice_jax.evaluate.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert "pip install -e '.[eval]'" in refuse("--tasks", "colours")


def test_a_model_without_end_token(tmp_path):
    model = write_tiny_llama(tmp_path / "m")
    write_json(model / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(InputError, match="no EOS token"):
        IntraSliceLM(str(model)).loglikelihood(requests("loglikelihood", [("", "a")]))
