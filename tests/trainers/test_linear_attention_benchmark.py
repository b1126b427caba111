"""Area `linear_attention` of the benchmarks: what its studies of quality feed, compare and report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import linear_attention, linear_attention_conversion, linear_attention_quality
from benchmarks.linear_attention_conversion import _Window
from benchmarks.linear_attention_pictures import draw, seeds
from benchmarks.linear_attention_quality import (
    FORMS,
    Learner,
    Size,
    _answered,
    _batches,
    _examples,
    _factor,
    _losses,
    _parameters,
    _tiny_long,
    configs,
    new_model,
    recall_accuracy,
    recall_batch,
)
from benchmarks.rows import write
from effpass.trainers.lm.batches import MicroBatches
from effpass.trainers.lm.model import make_model

SIZE = Size(64, 32, 1, 2, 16, 12, 4, 8)


def test_recall_asks_each_key_once_for_its_value():
    ids, targets = recall_batch(64, 4, 50, 0, "cpu")
    assert ids.shape == targets.shape == (50, 12)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert dict(zip(row[8:], wanted[8:], strict=True)) == pairs  # 4 keys, each once
        assert len(pairs) == 4
        assert all(key < 32 <= value < 64 for key, value in pairs.items())
        assert all(value == -100 for value in wanted[:8])
    assert not torch.equal(ids, recall_batch(64, 4, 50, 1, "cpu")[0])


def test_forms_have_equal_parameters_and_states():
    size = Size(8192, 128, 2, 2, 32, 128, 1, 1)
    made = configs(size)
    assert list(made) == list(FORMS)
    counts = {form: _parameters(config) for form, config in made.items()}
    assert max(counts.values()) - min(counts.values()) <= 3 * size.width * size.layers
    for form, config in made.items():
        if form not in ("window", "attention"):
            described = config.linear_attention
            state = 4 * described["num_value_heads"] * described["key_head_dim"] * described["value_head_dim"]
            assert state == made["window"].sliding_window * 2 * 2 * size.heads * size.channels
    assert made["attention"].sliding_window is None


def _batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return recall_batch(64, 4 >> step % 2, 8 << step % 2, 100 * seed + step, "cpu")


@pytest.mark.parametrize("form", ["fg2+", "window"])
def test_runs_of_a_seed_are_equal_whatever_ran_before(form):
    learner = Learner(configs(SIZE)[form], SIZE, "cpu")
    first, other, again = ([p.clone() for p in learner.train(seed, _batch).parameters()] for seed in (0, 1, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.dim() > 1)
    assert 0 <= recall_accuracy(learner.model, SIZE, 4, "cpu") < 0.5


def test_a_run_is_that_of_an_optimizer_with_a_schedule():
    learner = Learner(configs(SIZE)["attention"], SIZE, "cpu")
    found = [p.clone() for p in learner.train(0, _batch).parameters()]
    model = new_model(learner.config, 0)
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) == is_matrix], "weight_decay": 0.1 * is_matrix}
        for is_matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(SIZE.steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * _factor(step, SIZE.steps)
        ids, targets = _batch(0, step)
        graded = targets >= 0
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids).logits[graded], targets[graded]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for ours, wanted in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_captured_steps_are_the_eager_ones(form):
    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return recall_batch(64, 4 >> step % 2, 8 << step % 2, 100 * seed + step, "cuda")

    losses = []
    for is_captured in (True, False):
        learner = Learner(configs(SIZE)[form], SIZE._replace(steps=40), "cuda")
        if not is_captured:
            learner._made = lambda ids, targets, step=learner._step: step
        model = learner.train(0, batch)
        assert all((step != learner._step) == is_captured for step in learner._steps.values())
        with torch.no_grad():
            losses.append(_losses(model, *batch(1, 0), "cuda").sum().item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_pretraining_grades_what_the_trainer_grades(monkeypatch):
    monkeypatch.delenv("EFFPASS_DATA", raising=False)
    config, corpora = _tiny_long([(2, 8, 112), (1, 4, 128)])
    assert [source.task for source in config.data] == [None, "copy", "needle", "needle", "variables", "frequent"]
    found, wanted = _batches(config, corpora, 0, "cpu"), MicroBatches(config, corpora)
    assert [tuple(x.shape) for x in found] == [(2, 8, 112), (2, 8, 112), (2, 4, 128)]
    for step, (ids, targets) in enumerate(found):
        tokens, weights = wanted[step]["input_ids"], wanted[step]["weights"][:, 1:]
        is_graded = targets >= 0
        assert torch.equal(ids.long(), tokens[:, :-1])
        assert torch.equal(targets.long(), tokens[:, 1:].where(is_graded, -100))
        torch.testing.assert_close(weights, is_graded / is_graded.sum(1, keepdim=True))  # as Learner weighs them


@pytest.mark.parametrize(("task", "answer"), [("needle", 5), ("copy", 32)])
def test_an_answer_is_right_if_all_its_bytes_are(task, answer):
    ids, size, chance = _examples(task, 256, 4, "cpu")
    assert ids.shape == (4, 256)
    assert size == answer
    assert chance < 0.5
    following = ids.roll(-1, 1)
    following[0, -2] += 1  # the last byte of an answer
    following[1, -answer - 1] += 1  # the first of another
    following[2, -answer - 2] += 1  # the last of a question

    def model(logits_to_keep: int, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 264)[:, -logits_to_keep:])

    assert _answered(model, ids, size, "cpu") == 0.5


def test_rows_and_picture_of_recall_and_of_text(tmp_path: Path):
    assert set(linear_attention_quality.CASES) <= set(linear_attention.CASES)
    for name in ("recall-16x16", "pretraining"):
        for row in linear_attention.CASES[name]("cpu", True):
            write(row, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    recalled = [row for row in rows if row["metric"] == "recall"]
    assert [row["case"].partition(",")[0] for row in recalled] == list(FORMS)
    losses = [row for row in rows if row["metric"].startswith("loss")]
    assert [row["metric"] for row in losses][:2] == ["loss of tokens 0 to 1", "loss of tokens 1 to 2"]
    assert len(losses) == 8 * len(FORMS)
    assert all(0 < row["ours"] < 2 * math.log2(256) and row["runs"] == 3 for row in losses)
    answers = [row for row in rows if "answered" in row["metric"]]
    assert [row["metric"] for row in answers[:2]] == ["needle answered in 112 bytes", "copy answered in 112 bytes"]
    assert len(answers) == 4 * len(FORMS)
    assert all("; chance " in row["note"] for row in answers)
    for row in rows:
        of_seeds = seeds(row["note"])
        assert len(of_seeds) == 3
        assert sum(of_seeds) / 3 == pytest.approx(row["ours"], rel=1e-2)
    draw(tmp_path / "rows.jsonl", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no rows of pretraining or recall"):
        draw(tmp_path / "none.jsonl", tmp_path / "picture.png")


@pytest.mark.parametrize("form", ["attention", "window"])
def test_attention_is_that_of_transformers(form):
    model = new_model(configs(SIZE._replace(channels=8))[form], 0)
    ids = torch.arange(24).view(2, 12)
    found = model(ids).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, model(ids).logits)


def test_a_window_is_attention_over_the_last_tokens():
    model = make_model(configs(SIZE)["attention"], None, 0)
    ids = torch.arange(12)[None]
    whole = model(ids).logits
    attention = model.model.layers[0].self_attn
    for tokens, is_whole in ((12, True), (4, False)):
        model.model.layers[0].self_attn = _Window(attention, model.model.rotary_emb, tokens)
        found = model(ids).logits
        torch.testing.assert_close(found[:, :tokens], whole[:, :tokens])
        assert torch.allclose(found, whole, atol=1e-5) == is_whole
        changed = model(torch.cat((ids[:, :1] + 1, ids[:, 1:]), 1)).logits
        assert torch.equal(found[:, tokens:], changed[:, tokens:])


@pytest.mark.parametrize("form", ["fg2+", "window"])
def test_rows_of_a_conversion(form):
    assert set(linear_attention_conversion.CASES) <= set(linear_attention.CASES)
    rows = {row.metric: row for row in linear_attention.CASES[f"conversion-{form}-50"]("cpu", True)}
    assert list(rows) == [
        "perplexity after align", "perplexity after distill", "perplexity after whole", "needles found in 256 bytes",
        "needles found in 1024 bytes", "cache of a sequence of 8192 tokens",
    ]  # fmt: skip
    assert all(row.peer_name == "before" and "50 % of the layers" in row.case for row in rows.values())
    assert rows["perplexity after distill"].ours > 1
    cache = rows["cache of a sequence of 8192 tokens"]
    # One of two layers: 4 heads of 8 x 8 in float32 (or a window of as many bytes), 3 inputs of 96 channels, and keys
    # and values of 2 heads of 8.
    kept = 2 * 2 * 2 * 8 * 8192
    own = 4 * 4 * 8 * 8 + (2 * 3 * 96 if form == "fg2+" else 0)
    assert cache.peer == pytest.approx(2 * kept / 2**20, rel=1e-4)
    assert cache.ours == pytest.approx((kept + own) / 2**20, rel=1e-4)
