"""What speculative sampling emits is one text whatever was proposed, on the device and on the host."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from speculative_drafts import KINDS, draft_model, prepared
from torch import Tensor

from effpass.runtime.speculative import ModelDraft, NGramDraft, Speculator, chain, generate

GIVEN = families.batch(9)
PADDED = {k: GIVEN[k] for k in ("input_ids", "attention_mask")}


def sample(model: Any, draft: Any, *given: Any, seed: int = 0, **arguments: Any) -> tuple[Tensor, Any]:
    speculator = Speculator(model.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    torch.manual_seed(seed)
    how = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, **arguments}
    return type(model).generate(model, *given, custom_generate=loop, **how), speculator.last


WAYS = [{}, {"temperature": 0.6, "top_p": 0.9, "top_k": 30}, {"repetition_penalty": 1.2}]


@pytest.mark.parametrize("warped", WAYS, ids=lambda how: ", ".join(how) or "plain")
def test_the_text_does_not_depend_on_the_draft(warped: dict[str, float]) -> None:
    model, how = prepared(), {**PADDED, "max_new_tokens": 20, **warped}
    names = ("chain", "static", "eagle2", "c2t", "c2t, keeps all")
    drafts: list[Any] = [ModelDraft(draft_model("random"), KINDS[name]) for name in names]
    drafts += [ModelDraft(draft_model("right"), KINDS["static"]), NGramDraft(3)]
    texts = [sample(model, draft, **how)[0] for draft in drafts]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert not torch.equal(sample(model, drafts[0], seed=1, **how)[0], texts[0])
    assert not torch.equal(texts[0][0, 9:], texts[0][1, 9:])  # rows have noise of their own


def test_where_steps_are_plain_the_text_is_the_same() -> None:
    model, texts = prepared(), []
    draft = draft_model("random")
    for clock in (0.0, 1e9, -1e9):
        speculator = Speculator(model.effpass_engine, ModelDraft(draft, chain(3)))
        speculator._paces[2] = pace = _Always(clock)

        def loop(model: Any, input_ids: Tensor, speculator: Any = speculator, **prepared: Any) -> Any:
            return generate(speculator, input_ids, **prepared)

        torch.manual_seed(0)
        how = {**PADDED, "max_new_tokens": 20, "do_sample": True, "eos_token_id": None}
        texts.append(type(model).generate(model, **how, custom_generate=loop))
        assert pace.steps > 3
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


class _Always:
    """A pace of rounds and plain steps in turn, or of one of them alone."""

    has_given_up = False

    def __init__(self, bias: float) -> None:
        self.bias, self.steps = bias, 0

    def begin(self) -> None: ...

    def next(self) -> bool:
        self.steps += 1
        return self.bias + self.steps % 3 > 0.5

    def saw(self, **_: Any) -> None: ...


@pytest.mark.parametrize("warped", WAYS[:2], ids=["plain", "warped"])
def test_a_draft_like_the_model_is_accepted_whole(warped: dict[str, float]) -> None:
    found = sample(prepared(), ModelDraft(draft_model("right"), chain(4)), **PADDED, max_new_tokens=21, **warped)[1]
    assert (found.rounds, found.tokens) == (2 * 4, 2 * 20)


def test_a_processor_of_the_text() -> None:
    """On the host: no token twice."""
    how = {"no_repeat_ngram_size": 1, "max_new_tokens": 30}
    out, _ = sample(prepared(), ModelDraft(draft_model("right"), KINDS["eagle2"]), PADDED["input_ids"][1:, :5], **how)
    assert len(set(out[0, 5:].tolist())) == 30
