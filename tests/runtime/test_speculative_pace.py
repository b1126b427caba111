"""When speculation is switched off, and that the text stays the same."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from speculative_drafts import draft_model, prepared
from torch import Tensor

from effpass.runtime.speculative import ModelDraft, Speculator, chain, generate
from effpass.runtime.speculative import generation as loops
from effpass.runtime.speculative.pace import Pace


def follow(pace: Pace, steps: int, gain: float, *, plain: float = 1.0, round_: float = 2.0) -> str:
    """What it does, a letter a step: r for a round, p for a plain step."""
    done = ""
    for _ in range(steps):
        speculates = pace.next()
        done += "r" if speculates else "p"
        pace.saw(plain=not speculates, seconds=round_ if speculates else plain, gain=gain if speculates else 1.0)
    return done


def test_a_round_that_pays_goes_on() -> None:
    pace = Pace()
    assert follow(pace, 60, gain=3.0) == "ppp" + "r" * 57
    pace.begin()
    assert follow(pace, 60, gain=3.0) == "r" * 60  # what a plain step takes is known
    assert pace.pays


def test_a_round_that_does_not_pay_is_tried_again_and_given_up() -> None:
    pace = Pace()
    expected = "ppp" + "r" * 8 + ("p" * 33 + "r" * 4) * 3 + "p" * 40
    assert follow(pace, len(expected), gain=1.5) == expected
    assert pace.has_given_up
    pace.begin()
    assert follow(pace, 9, gain=1.5) == "r" * 8 + "p"


def test_it_comes_back_when_the_text_gets_easier() -> None:
    pace = Pace()
    follow(pace, 11 + 20, gain=1.0)
    assert follow(pace, 60, gain=4.0).endswith("r" * 40)


def test_it_goes_when_the_text_gets_harder() -> None:
    pace = Pace()
    follow(pace, 40, gain=4.0)
    assert "p" in follow(pace, 40, gain=1.0)


def test_an_interruption_does_not_count() -> None:
    pace = Pace()
    follow(pace, 20, gain=3.0)
    pace.saw(plain=False, seconds=500.0, gain=3.0)
    assert pace.round == 2.0
    assert follow(pace, 40, gain=3.0) == "r" * 40


def test_the_first_round_counts_as_much_as_the_others() -> None:
    pace = Pace()
    for gain in (1.0, 4.0, 4.0, 4.0):
        pace.saw(plain=False, seconds=2.0, gain=gain)
    assert pace.gain == pytest.approx(3.25)
    for _ in range(6):
        pace.saw(plain=False, seconds=2.0, gain=4.0)
    assert pace.gain == pytest.approx(3.7)  # of ten; from here on a tenth is the latest
    pace.saw(plain=False, seconds=2.0, gain=1.0)
    assert pace.gain == pytest.approx(0.9 * 3.7 + 0.1)


def test_it_can_be_told_not_to_switch() -> None:
    pace = Pace(switches=False)
    assert follow(pace, 50, gain=1.0) == "r" * 50


class _Clock:
    """Time goes by as steps are taken: 1 for a plain one, 3 for a round."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("how", ["wrong", "right"])
def test_the_text_is_the_same_whatever_is_switched(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, taken = _Clock(), ""
    model, given = prepared(max_position_embeddings=512), families.batch(11)
    inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
    long = {"max_new_tokens": 200, "eos_token_id": None}
    expected = families.make("llama", max_position_embeddings=512).generate(**inputs, **long)
    speculator = Speculator(
        model.effpass_engine, ModelDraft(draft_model(how, max_position_embeddings=512), chain(4))
    )  # fmt: skip
    monkeypatch.setattr(loops, "time", clock)
    step = loops.Round.step

    def counted(self: Any, *, plain: bool = False, **others: Any) -> None:
        nonlocal taken
        clock.now += 1 if plain else 3
        taken += "p" if plain else "r"
        step(self, plain=plain, **others)

    monkeypatch.setattr(loops.Round, "step", counted)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    assert torch.equal(type(model).generate(model, **inputs, **long, custom_generate=loop), expected)
    if how == "right":
        assert taken == "ppp" + "r" * 40  # 199 tokens after the prompt's: 3 and 196 = 39.2 x 5
    else:
        assert taken.startswith("ppp" + "r" * 8 + "p" * 33 + "r" * 4 + "p" * 33)
        assert taken.endswith("p" * 60)


def test_a_draft_that_fell_behind_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds after plain steps propose what they would without them."""
    model, given = prepared(), families.batch(11)
    inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
    draft = ModelDraft(draft_model("right"), chain(4))
    speculator = Speculator(model.effpass_engine, draft)
    plan = iter("rpppppprpppppppppppprr" + "r" * 50)
    monkeypatch.setattr(Pace, "next", lambda self: next(plan) == "r")
    gains: list[float] = []
    monkeypatch.setattr(Pace, "saw", lambda self, plain, seconds, gain: gains.append(gain))

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    type(model).generate(
        model, **inputs, max_new_tokens=5 + 6 + 5 + 12 + 5 + 5 + 1, eos_token_id=None, custom_generate=loop
    )
    assert gains == [5, *[1] * 6, 5, *[1] * 12, 5, 5]
