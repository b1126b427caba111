"""Benchmark area `training`: its runs, its sweep, and the eigenvalue it reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import make_checkpoint

from benchmarks import training, training_data
from benchmarks.sharpness import top_eigenvalue
from benchmarks.training_plot import draw
from benchmarks.training_runs import METHODS, Job, Result, finished, run_all

SMOKE = training._SMOKE


@pytest.fixture
def curves(tmp_path, monkeypatch):
    path = tmp_path / "curves.jsonl"
    monkeypatch.setenv("EFFPASS_CURVES", str(path))
    return path


def result(method: str, rate: float, loss: float) -> Result:
    return Result("study", method, rate, 0, 4, 512, 1.0, {"text": loss})


# -- the eigenvalue ------------------------------------------------------------------------------------------------


def test_the_top_eigenvalue_is_that_of_the_whole_hessian():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([p.numel() for p in parameters.values()])
        shaped = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return (torch.func.functional_call(network, shaped, inputs) - targets).square().mean()

    expected = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1].item()
    found, error = top_eigenvalue((network(inputs) - targets).square().mean(), list(network.parameters()), 30)
    assert found == pytest.approx(expected, rel=1e-8)
    assert error < 1e-6 * expected
    few, error = top_eigenvalue((network(inputs) - targets).square().mean(), list(network.parameters()), 4)
    assert abs(few - expected) <= error + 1e-12  # what the residual promises


def test_an_eigenvalue_of_a_loss_that_leaves_a_parameter_out():
    used, unused = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(3, requires_grad=True)
    assert top_eigenvalue((used * torch.tensor([1.0, 3.0])).square().sum(), [used, unused])[0] == pytest.approx(18)


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_is_a_function_of_its_job_and_is_not_run_twice(curves):
    jobs = [Job(SMOKE, "MONA", 4e-3, seed) for seed in (0, 1)]
    first = run_all(jobs, "cpu", curves, 1)
    assert first[0].losses != first[1].losses
    assert all(r.top_eigenvalue > 0 and r.tokens == 4 * 4 * 32 for r in first)
    before = curves.read_text()
    with curves.open("a") as file:
        file.write('{"study": "smoke", "lo')  # where a process was killed
    assert run_all(jobs, "cpu", curves, 1) == first
    curves.write_text("")
    again = run_all(jobs[:1], "cpu", curves, 1)[0]
    assert again.losses == first[0].losses
    points = [json.loads(line) for line in before.splitlines()]
    assert [(p["seed"], p["step"]) for p in points if "step" in p] == [(0, 4), (1, 4)]


@pytest.mark.slow  # starts two processes
def test_lanes_change_nothing(curves, tmp_path):
    jobs = [Job(SMOKE, method, 4e-3, 0) for method in ("AdamW", "Muon")]
    alone = run_all(jobs, "cpu", curves, 1)
    side_by_side = run_all(jobs, "cpu", tmp_path / "lanes.jsonl", 2)
    for one, other in zip(alone, side_by_side, strict=True):
        assert other.losses["text"] == pytest.approx(one.losses["text"], rel=1e-5)
    assert len(finished(tmp_path / "lanes.jsonl")) == 2


def test_a_run_that_diverges_is_infinite_and_ends(curves):
    diverged = run_all([Job(replace(SMOKE, steps=40), "AdamW", 1e30, 0)], "cpu", curves, 1)[0]
    assert diverged.loss == float("inf")
    assert diverged.top_eigenvalue is None
    assert len(curves.read_text().splitlines()) == 2  # one point of the curve, and the result


# -- the study -----------------------------------------------------------------------------------------------------


def test_the_sweep_goes_on_while_the_best_rate_is_at_an_end():
    valleys = {"AdamW": 1e-3, "Muon": 3.2e-2, "MONA": 4e-3}
    asked = []

    def run(wanted):
        asked.extend(wanted)
        return [result(m, rate, abs(torch.tensor(rate / valleys[m]).log2().item())) for m, rate in wanted]

    found = training.sweep(run, dict.fromkeys(valleys, 4e-3), width=3, reach=2)
    tried = {method: sorted(r.rate for r in results) for method, results in found.items()}
    assert tried == {
        "AdamW": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "Muon": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],  # at the end of its reach
        "MONA": [2e-3, 4e-3, 8e-3],
    }
    assert len(asked) == len(set(asked))
    assert [r.rate for r in training.sweep(run, {"MONA": 4e-3}, width=2, reach=0)["MONA"]] == [2e-3, 4e-3]


def test_a_study_from_sweep_to_rows_and_picture(curves, tmp_path):
    rows = list(training.small("cpu", True))
    names = [row.metric for row in rows if row.metric.startswith("held-out")]
    assert names == [
        *(f"held-out loss on text, {m}, best rate" for m in ("AdamW", "Muon", "MONA", "MONA", "torch.optim.Muon")),
        *(f"held-out loss on text, {m}, shared rate" for m in ("Muon", "MONA", "MONA")),
    ]
    assert [row.metric for row in rows[:4]] == [f"step in training, {method}" for method in METHODS]
    mona = next(row for row in rows if row.metric == "held-out loss on text, MONA, best rate")
    assert (mona.runs, mona.peer_name) == (2, "AdamW")
    assert "seeds [0, 1], 4 steps" in mona.note
    assert "gap to AdamW by seed" in mona.note
    draw(curves, None, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_steps_are_cut_to_the_time_there_is(curves, monkeypatch, capsys):
    study = replace(training._SMALL, compiled=False)
    assert training._affordable(study, curves, 0.1) == 600
    monkeypatch.setenv("EFFPASS_SECONDS", "50")
    assert training._affordable(study, curves, 0.1) == 450
    assert "450 steps instead of 600" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="allow 50 steps of MoE 5 M"):
        training._affordable(study, curves, 0.5)
    curves.write_text(json.dumps(result("AdamW", 1e-3, 1.0).__dict__ | {"study": study.name, "steps": 350}) + "\n")
    assert training._affordable(study, curves, 0.5) == 350  # a study goes on as it began


# -- fine-tuning ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Small texts, and a checkpoint that reads bytes."""
    problems = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(40)]
    for name, text in {
        "gsm8k/train.jsonl": "\n".join(map(json.dumps, problems)),
        "gsm8k/test.jsonl": "\n".join(map(json.dumps, problems[:6])),
        "text/a.txt": "Some words. " * 6000,
        "wikitext-2/valid.txt": "Other words. " * 50,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("EFFPASS_DATA", str(tmp_path))
    monkeypatch.setenv("EFFPASS_SMOLLM2", str(make_checkpoint(tmp_path / "model")))
    monkeypatch.setattr(training_data, "CODE", ("$STDLIB/json/*.py",))
    for cached in (training_data._corpus, training_data._tokenizer, training_data._problems):
        cached.cache_clear()
    return tmp_path


def test_only_answers_of_problems_are_graded(data):
    rows = training_data.instruction_rows(str(data / "model"), 2, 4, 64, 0)
    assert rows.ids.shape == rows.weights.shape == (2, 4, 64)
    assert rows.weights[:, 2:].all()  # code and text
    tokenizer = training_data._tokenizer(str(data / "model"))
    ids, weights = rows.held_out["mathematics"]
    assert len(ids) == 6
    assert tokenizer.decode(ids[1][weights[1]]) == "It is 2.\n#### 2<end>"
    assert tokenizer.decode(ids[1][~weights[1]]).startswith("Question: What is 1 and 1?\nAnswer: ")
    again = training_data.instruction_rows(str(data / "model"), 2, 4, 64, 0)
    other = training_data.instruction_rows(str(data / "model"), 2, 4, 64, 1)
    assert torch.equal(rows.ids, again.ids)
    assert not torch.equal(rows.ids, other.ids)


def test_fine_tuning_from_checkpoint_to_rows(data, curves):
    rows = list(training.fine_tuning("cpu", True))
    kinds = {row.metric.split(",")[0] for row in rows}
    assert {f"held-out loss on {kind}" for kind in ("mathematics", "code", "text")} <= kinds
    assert {r.method for r in finished(curves)} == set(training.OURS)
