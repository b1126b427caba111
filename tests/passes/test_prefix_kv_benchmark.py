"""Quality of caches with a budget, in benchmarks: prompts that are run once choose what the engine chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import prefix_kv, prefix_kv_pictures
from benchmarks.prefix_kv_pictures import AFTERWARDS, IN_PROMPT
from benchmarks.quality_pictures import _drawn, _taken
from effpass.runtime.attention import reading_cache
from effpass.runtime.prefix_kv.session import BudgetSession
from effpass.trainers.lm.tokenizer import END

PEERS = {"uniform", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "global top-k"}


@pytest.fixture(scope="module")
def llava() -> Any:
    return prefix_kv_pictures.tiny("cpu")[0]


@pytest.fixture
def one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prefix_kv, prefix_kv_pictures):
        monkeypatch.setattr(module, "BUDGETS", (0.2,))


def after_prefill(model: Any, settings: Any, inputs: dict[str, torch.Tensor], tail: torch.Tensor) -> torch.Tensor:
    """Logits as the engine's own session gives them, a token at a time."""
    rows, tokens = tail.shape
    length = inputs["input_ids"].shape[1]
    session = BudgetSession(model, rows, length + tokens, None, replace(settings, every=tokens + 1))
    session.begin(rows)
    given = {name: x for name, x in inputs.items() if name != "input_ids"}
    session.prefill(inputs["input_ids"], None, length, **given)
    found = [session.logits.clone()]
    for column in tail.T:
        session.tokens.copy_(column[:, None])
        session.step()
        found.append(session.logits.clone())
    return torch.stack(found, 1)


@pytest.mark.parametrize(
    "name", ["prefix_kv, searched", "StreamingLLM", "SnapKV", "global top-k", "prefix_kv, searched, int8"]
)
@torch.no_grad()
def test_a_prompt_that_was_run_before_is_as_one_that_the_engine_runs(llava: Any, name: str) -> None:
    taken = _taken(llava)
    inputs = prefix_kv_pictures._inputs(llava, taken, _drawn("caption", 0, 2, taken), IN_PROMPT)
    tail = torch.randint(3, 250, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = prefix_kv._methods(0.2, None, 16)[name]
    with reading_cache(llava):
        expected = after_prefill(llava, settings, inputs, tail)
        given = {k: v for k, v in inputs.items() if k != "input_ids"}
        found = prefix_kv._Prompt(llava, inputs["input_ids"], **given).logits(settings, tail)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_whole_cache_scores_as_the_stock_model(llava: Any, one_budget: None) -> None:
    taken = _taken(llava)
    (picture,) = drawn = _drawn("left", 0, 1, taken)
    question, answer = ([*part] for part in picture.pairs[0])
    inputs = prefix_kv_pictures._inputs(llava, taken, drawn, IN_PROMPT)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[*answer, END]])], 1)
    expected = llava(**inputs).logits[:, taken.tokens - 1 : -1]  # of the question's tokens and the answer's
    for asked, ids in ((IN_PROMPT, [*answer, END]), (AFTERWARDS, [*question, *answer, END])):
        key, logits, tail, is_graded = next(prefix_kv_pictures._after(llava, taken, drawn, asked, None))
        assert key == (1.0, "")
        assert tail.tolist() == [ids]
        assert is_graded.sum() == len(answer) + 1
        assert is_graded[0, -1]
        torch.testing.assert_close(logits, expected[:, -len(ids) :], rtol=1e-4, atol=1e-5)


def test_rows_of_pictures(monkeypatch: pytest.MonkeyPatch, one_budget: None) -> None:
    monkeypatch.setattr(prefix_kv_pictures, "PICTURES", ["caption", "left"])
    rows = list(prefix_kv.quality_pictures("cpu", smoke=True))
    curve, *others = rows
    assert curve.metric == "smallest share of a layer at 20%"
    assert curve.note.count("%") == 2  # layers
    compared = [row for row in others if row.peer is not None]
    cases = {f"random, pictures, {what}, 20% of the bytes" for what in
             (f"caption, {IN_PROMPT}", f"left, {IN_PROMPT}", f"left, {AFTERWARDS}")}  # fmt: skip
    assert {row.case for row in compared} == cases
    for case in cases:
        assert {row.peer_name for row in compared if row.case == case} >= PEERS
    assert all(row.note.endswith("over 3 seeds; no signal") for row in compared if "left" in row.case)
    assert all(row.unit == ("nats" if "caption" in row.case else "%") for row in compared)


def test_rows_of_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, one_budget: None) -> None:
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "valid.txt").write_text("The cat sat on the mat. " * 60, encoding="utf-8")
    monkeypatch.setenv("EFFPASS_DATA", str(tmp_path))
    monkeypatch.delenv("EFFPASS_MODEL", raising=False)
    monkeypatch.setattr(prefix_kv, "TASKS", ["needle"])
    rows = [row for row in prefix_kv.quality("cpu", smoke=True) if row.peer is not None]
    assert {row.metric for row in rows} == {"log-perplexity, prefix_kv, searched", "answers right, prefix_kv, searched"}
    assert {row.peer_name for row in rows} >= PEERS
