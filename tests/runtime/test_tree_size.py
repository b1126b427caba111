"""The size of the next trees follows the latest ones, and changes the number of rounds but no text."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from speculative_drafts import classifier, prepared

from effpass.runtime.speculative import C2T, Eagle2, ModelDraft, Speculator, chain, generate
from effpass.runtime.speculative.classifier import Classifier
from effpass.runtime.speculative.round import Round
from effpass.runtime.speculative.tree_size import TreeSize


def test_the_largest_until_enough_trees_were_seen_and_then_as_the_largest_of_the_latest() -> None:
    size = TreeSize((8, 16, 32))
    for _ in range(7):
        size.saw(32, 5)
        assert size.nodes == 32
    size.saw(32, 9)
    assert size.nodes == 16
    for _ in range(8):
        size.saw(16, 8)
    assert size.nodes == 8
    size.saw(8, 8)  # full: it may have had more nodes
    assert size.nodes == 16
    size.saw(16, 16)
    size.saw(32, 32)
    assert size.nodes == 32


def test_trees_of_one_size_have_no_choice() -> None:
    size = TreeSize((12,))
    for _ in range(9):
        size.saw(12, 3)
    assert not size.varies
    assert size.nodes == 12


def test_sizes_of_kinds() -> None:
    assert C2T(classifier(), 0.5, nodes=32).sizes == (8, 16, 32)
    assert C2T(classifier(), 0.5, nodes=20).sizes == (8, 16, 20)
    assert C2T(classifier(), 0.5, top_k=4, depth=2, nodes=6).sizes == (6,)
    assert Eagle2(nodes=32).sizes == (32,)
    assert chain(5).sizes == (6,)


def by_depth() -> Classifier:
    """Confidence falls with the depth, below 0.5 from the third layer on."""
    made = Classifier(1)
    with torch.no_grad():
        for parameter, value in zip(made.parameters(), ([[0.0, 0.0, 1.0]], [0.0], [[-1.5]], [2.0]), strict=True):
            parameter.copy_(torch.tensor(value))
    return Classifier.of(made.state_dict())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("forced", [None, 8])
def test_smaller_trees_give_the_same_text(rows: int, forced: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = prepared(), families.make("llama")
    given: dict[str, Any] = {k: families.batch(20)[k][-rows:] for k in ("input_ids", "attention_mask")}
    how: dict[str, Any] = {**given, "max_new_tokens": 60, "eos_token_id": None}
    sizes: list[int] = []
    step = Round.step

    def noted(self: Round, *, nodes: int, **others: Any) -> None:
        sizes.append(forced or nodes)
        step(self, nodes=sizes[-1], **others)

    monkeypatch.setattr(Round, "step", noted)
    draft = ModelDraft(families.make("llama"), C2T(by_depth(), 0.5, 6, 5, 32))  # 12 nodes and the root
    speculator = Speculator(model.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Any, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    text = type(model).generate(model, **how, custom_generate=loop)
    assert torch.equal(text, plain.generate(**how))
    last = speculator.last
    assert last is not None
    assert last.acceptance_length > 1.5
    assert last.verified == last.rounds * (7 if forced else 12)
    assert sizes == [8] * len(sizes) if forced else [32] * 8 + [16] * (len(sizes) - 8)
