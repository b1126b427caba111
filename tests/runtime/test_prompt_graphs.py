"""Short prompts from graphs give what they give without. The CPU runs the same code, with calls in place of graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from speculative_drafts import KINDS, make_head, prepared
from torch import Tensor

import effpass
from effpass.runtime import session as session_module
from effpass.runtime.prompt_graphs import PromptGraphs, RecordedPrompt, can_be_recorded, padded_size
from effpass.runtime.session import Session
from effpass.runtime.speculative import EagleDraft, ModelDraft, Speculator, generate

FREE = {"max_new_tokens": 80, "eos_token_id": None}


class _Call:
    """Stands in for a CUDA graph."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.replay = step


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the prompts that ran as from a graph, on the CPU."""
    found: list[int] = []

    def record(step: Callable[[], None], *, warm_up: Callable[[], None], pool: Any) -> Any:
        warm_up()
        return _Call(step)

    run = RecordedPrompt.run

    def noted(self: RecordedPrompt, ids: Tensor, positions: Tensor, inputs: dict[str, Tensor]) -> None:
        found.append(self.ids.shape[1])
        run(self, ids, positions, inputs)

    original = Session._record_prompt

    def as_recording(self: Session, rows: int, size: int, inputs: dict[str, Tensor]) -> RecordedPrompt:
        with monkeypatch.context() as patched:
            patched.setattr(session_module, "record", record)
            made = original(self, rows, size, inputs)
        step = made.graph.replay

        def replay() -> None:  # a graph replays what was recorded within this context
            with self._recording():
                step()
            self._features.clear()

        made.graph.replay = replay  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(session_module, "_PROMPT_GRAPHS", ("cpu",))
    monkeypatch.setattr(RecordedPrompt, "run", noted)
    monkeypatch.setattr(Session, "_record_prompt", as_recording)
    return found


def batches(*lengths: int) -> list[dict[str, Tensor]]:
    return [{k: families.batch(n)[k] for k in ("input_ids", "attention_mask")} for n in lengths]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("padded", [True, False])
def test_texts_are_those_without_graphs(family: str, padded: bool, replayed: list[int]) -> None:
    plain, model = families.make(family), prepared(family)
    for given in batches(70, 66, 100, 65):
        inputs = given if padded else {k: v[1:] for k, v in given.items()}
        assert torch.equal(model.generate(**inputs, **FREE), plain.generate(**inputs, **FREE))
    assert replayed == [128, 128, 128]  # the first prompt of a size runs without


def test_a_size_is_recorded_once_for_each_number_of_sequences() -> None:
    graphs, recorded = PromptGraphs(), []

    def find(rows: int) -> Any:
        return graphs.find(rows, 64, lambda: recorded.append(rows) or len(recorded))  # type: ignore[func-returns-value, return-value]

    assert [find(rows) for rows in (2, 1, 2, 1, 2)] == [None, None, 1, 2, 1]
    graphs.forget()
    assert [find(2), find(2)] == [3, 3]
    assert recorded == [2, 1, 2]


def test_what_can_not_be_recorded_is_said_once_and_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    graphs, tried = PromptGraphs(), []

    def record() -> Any:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with caplog.at_level(logging.WARNING, "effpass"):
        assert [graphs.find(1, size, record) for size in (64, 64, 64, 128, 128)] == [None] * 5
    assert len(tried) == len(caplog.records) == 1
    assert "without a CUDA graph: operation not permitted when stream is capturing" in caplog.text


def test_other_weights_are_recorded_anew(replayed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (given, other) = prepared(), batches(70, 66)
    for inputs in (given, other):
        model.generate(**inputs, **FREE)
    changed = families.make("llama", seed=3)
    for ours, theirs in zip(model.parameters(), changed.parameters(), strict=True):
        ours.data = theirs.detach().clone()
    recorded: list[int] = []
    original = Session._record_prompt
    monkeypatch.setattr(Session, "_record_prompt", lambda *a: recorded.append(a[2]) or original(*a))  # type: ignore[func-returns-value]
    for inputs in (given, other):
        assert torch.equal(model.generate(**inputs, **FREE), changed.generate(**inputs, **FREE))
    assert recorded == [128]


def spoken(model: Any, draft: Any, prompts: list[dict[str, Tensor]]) -> list[tuple[Tensor, Any]]:
    """Texts and counts of one speculative decoder."""
    speculator, found = Speculator(model.effpass_engine, draft, switches=False), []

    def loop(model: Any, input_ids: Tensor, **given: Any) -> Any:
        return generate(speculator, input_ids, **given)

    for prompt in prompts:
        text = type(model).generate(model, **prompt, **FREE, custom_generate=loop)
        found.append((text, speculator.last))
    return found


@pytest.mark.parametrize("kind", ["chain", "eagle2"])
def test_a_head_gets_the_features_of_the_prompt(kind: str, replayed: list[int]) -> None:
    model, (given,) = prepared(), batches(70)
    expected = families.make("llama").generate(**given, **FREE)
    found = spoken(model, EagleDraft(make_head(model, 96), KINDS[kind]), [given] * 3)
    assert all(torch.equal(text, expected) for text, _ in found)
    assert found[0][1] == found[1][1] == found[2][1]  # as many rounds, nodes and tokens
    assert replayed == [128] * 4  # target and head


def test_a_model_as_draft(replayed: list[int]) -> None:
    model, plain, prompts = prepared(), families.make("llama"), batches(70, 66, 90)
    found = spoken(model, ModelDraft(families.make("llama"), KINDS["chain"]), prompts)
    for (text, _), given in zip(found, prompts, strict=True):
        assert torch.equal(text, plain.generate(**given, **FREE))
    assert replayed == [128] * 4  # target and draft


def test_what_has_no_graph(replayed: list[int]) -> None:
    """Long prompts, caches without room for the padding, experts that synchronize, and rotations by length."""
    assert [padded_size(1, n) for n in (1, 64, 65, 513, 1024, 1025)] == [64, 64, 128, 768, 1024, None]
    assert [padded_size(4, n) for n in (64, 256, 257)] == [64, 256, None]
    for family, overrides in (("qwen3_moe", {}), ("deepseek_v3", {})):
        model, plain = prepared(family, **overrides), families.make(family, **overrides)
        for given in batches(70, 66):
            assert torch.equal(model.generate(**given, **FREE), plain.generate(**given, **FREE))
    assert not replayed
    config = families.make("llama").config
    assert can_be_recorded(config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    assert not can_be_recorded(config)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_recorded_prompts_on_a_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = batches(70, 66, 100, 65, 40, 33)
    texts: list[list[Tensor]] = []
    for devices in ((), ("cuda",)):
        monkeypatch.setattr(session_module, "_PROMPT_GRAPHS", devices)
        model = effpass.prepare(families.make(family).cuda(), {"version": 1, "passes": []})
        texts.append([])
        for given in prompts:
            inputs = {k: v.cuda() for k, v in given.items()}
            texts[-1].append(model.generate(**inputs, **FREE))
        if family == "llama":
            for given in [{k: v.cuda() for k, v in prompt.items()} for prompt in prompts]:
                head = EagleDraft(make_head(model, 96).cuda(), KINDS["eagle2"])
                texts[-1] += [text for text, _ in spoken(model, head, [given] * 3)]
    for ours, theirs in zip(*texts, strict=True):
        assert torch.equal(ours, theirs)
