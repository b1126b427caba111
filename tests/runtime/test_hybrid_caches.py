"""Budgets, sparse attention and host memory for the attention layers of a hybrid; its linear attention has a state."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from families import padded

import effpass
from effpass.core.errors import EffpassError
from effpass.runtime.attach import attach
from effpass.runtime.attention import reading_cache
from effpass.runtime.linear_attention import GatedDeltaSettings, make_hybrid
from effpass.runtime.linear_attention.state import StateBuffers
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.plan import Settings
from effpass.runtime.prefix_kv.policy import Policy
from effpass.runtime.prefix_kv.prefix import PrefixKV
from effpass.runtime.prefix_kv.session import BudgetSession
from effpass.runtime.session import Session

HOW = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}


class Known(Policy):
    """Shares that are known beforehand, so that sequences are run some at a time."""

    name = "known"

    def shares(self, ratio: float, layers: int) -> list[float]:
        return [1.0] * layers


def hybrid(linear: tuple[int, ...], family: str = "qwen3") -> Any:
    model = families.make(family)
    torch.manual_seed(1)
    make_hybrid(model, linear, GatedDeltaSettings("fg2+", 4, 4, 16, 16, gate_rank=8))
    return model.eval()


def settings(policy: Policy, budget: float, **more: Any) -> Settings:
    return Settings(policy, Budget.parse(budget), **{"sink": 2, "recent": 4, "page": 1, "every": 4, **more})


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("linear", [(0,), (1,), (0, 1)])
def test_a_budget_of_everything_changes_no_token(family: str, linear: tuple[int, ...]) -> None:
    given, model = padded(40), hybrid(linear, family)
    theirs = effpass.prepare(hybrid(linear, family), {"passes": []}).generate(**given, **HOW)
    model = effpass.prepare(model, {"passes": [{"prefix_kv": {"budget": 1.0}}]})
    full = {"gemma3": {1}}.get(family, {0, 1}) - set(linear)
    (entry,) = model.effpass_report.passes
    assert entry.hits == len(full)
    assert sum("linear attention, which keeps a state" in str(refusal) for refusal in entry.refusals) == len(linear)
    assert torch.equal(model.generate(**given, **HOW), theirs)
    assert isinstance(*model.effpass_engine._free.values(), BudgetSession if full else Session)
    assert torch.equal(model.generate(**given, **HOW), theirs)  # in the buffers of the first call
    model.effpass_engine.prefill_tokens = 4 * 7
    assert torch.equal(model.generate(**given, **HOW), theirs)  # in pieces


@pytest.mark.parametrize("linear", [0, 1])
@pytest.mark.parametrize("policy", [PrefixKV(None, "both", 7), Known()], ids=["searched", "known"])
def test_what_was_given_up_is_as_if_masked_and_states_are_whole(linear: int, policy: Policy) -> None:
    given, model = padded(40), hybrid((linear,))
    is_token = given["attention_mask"].bool()
    with torch.no_grad(), reading_cache(model):
        session = BudgetSession(model, 4, 64, None, settings(policy, 0.5))
        plain = Session(model, 4, 64, None)
        for one in (session, plain):
            one.begin(4)
            one.prefill(given["input_ids"], is_token, 12)
        kept = session._kept(1 - linear).slots
        assert kept.length == 20
        states = [one.cache.layers[linear] for one in (session, plain)]
        assert all(isinstance(state, StateBuffers) for state in states)
        for ours, theirs in zip(*(state.own_state() for state in states), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        # All of the prompt was attended to.
        torch.testing.assert_close(session.logits, plain.logits, rtol=1e-5, atol=1e-5)
        for row in range(4):
            table = plain.cache.slots.positions[row]
            table[~torch.isin(table, kept.positions[row])] = -1
        for _ in range(3):  # before it gives up more
            token = plain.logits.argmax(-1, keepdim=True)
            for one in (session, plain):
                one.tokens.copy_(token)
                one.step()
            torch.testing.assert_close(session.logits, plain.logits, rtol=1e-5, atol=1e-5)


def test_two_turns_are_one_conversation_and_tokens_stay_where_they_must() -> None:
    given, model = padded(40), hybrid((0,))
    whole = effpass.prepare(hybrid((0,)), {"passes": []})
    attach(model).new_session = lambda *arguments: BudgetSession(*arguments, settings=settings(Policy(), 1.0))
    how = {**HOW, "max_new_tokens": 9}
    first = model.generate(**given, **how, return_dict_in_generate=True, max_length=90)
    more = torch.cat((first.sequences, first.sequences[:, :3]), 1)
    mask = torch.cat((given["attention_mask"], torch.ones(4, more.shape[1] - 40, dtype=torch.long)), 1)
    again = {"input_ids": more, "attention_mask": mask}
    second = model.generate(**again, **how, past_key_values=first.past_key_values)
    assert torch.equal(second, whole.generate(**again, **how))
    session = first.past_key_values.session
    with pytest.raises(EffpassError, match="3 tokens were to be taken back, and linear attention has no state"):
        session.crop(session.length - 3)


@pytest.mark.parametrize("linear", [(0,), (1,)])
@pytest.mark.parametrize("others", [[], [{"kv_offload": {"pool": 9}}]], ids=["on the device", "in host memory"])
def test_sparse_attention_reads_the_layers_that_have_keys(linear: tuple[int, ...], others: list[Any]) -> None:
    given, length = padded(100), {**HOW, "return_dict_in_generate": True, "output_logits": True}
    dense = effpass.prepare(hybrid(linear), {"passes": []}).generate(**given, **length)
    for tokens, same in ((128, True), (16, False)):
        sparse = {"tokens": tokens, "blocks": 8 if same else 4, "block": 16, "recent": 1, "dense_below": 1}
        model = effpass.prepare(hybrid(linear), {"passes": [{"sparse_attention": sparse}, *others]})
        assert [entry.hits for entry in model.effpass_report.passes] == [1] * (1 + len(others))
        got = model.generate(**given, **length)
        torch.testing.assert_close(got.logits[0], dense.logits[0])  # of the prompt
        step = (got.logits[1] - dense.logits[1]).abs().max()
        assert (step < 1e-5) == same
        if same:
            assert torch.equal(got.sequences, dense.sequences)


def test_budget_and_sparse_attention_and_host_memory_at_once() -> None:
    given = padded(100)
    some, all_ = ({"prefix_kv": {"budget": budget, "recent": 8, "page": 1}} for budget in (0.5, 1.0))
    sparse = {"sparse_attention": {"tokens": 128, "blocks": 8, "block": 16, "recent": 1, "dense_below": 1}}
    found = {
        name: effpass.prepare(hybrid((0,)), {"passes": list(passes)}).generate(**given, **HOW)
        for name, passes in {
            "none": (), "all": (all_, sparse, "kv_offload"), "some": (some,), "both": (some, sparse, "kv_offload"),
        }.items()
    }  # fmt: skip
    assert torch.equal(found["none"], found["all"])
    assert torch.equal(found["some"], found["both"])
