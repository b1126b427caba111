"""Sampled answers have the model's distribution, to which exact enumeration of a small vocabulary is compared."""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import pytest
import torch
from speculative_drafts import LIKELY, PEAKED, draft_model, prepared
from token_statistics import FALSE_ALARM, conditionals, drawn_from, joint_of, p_value
from torch import Tensor

from effpass.lowering.ops.token_noise import token_noise
from effpass.runtime.speculative import C2T, Eagle2, ModelDraft, NGramDraft, Speculator, Static, chain, generate

PROMPT = torch.tensor([[3, 5, 4, 5]])
NEW, DEPTH = 4, 2  # the first token follows the prompt, and the last may come from the second layer of a tree
FEW, MANY = 512, 2048

TREES: dict[str, Any] = {
    "chain": chain(DEPTH),
    "static": Static((2, 2)),
    "eagle2": Eagle2(3, DEPTH, 6),
    "c2t": C2T(LIKELY, 0.5, 3, DEPTH, 6),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "of the text": {"repetition_penalty": 1.3, "temperature": 0.8, "top_p": 0.9},  # on the host
}


@cache
def exact(way: str, how: str = "right") -> list[Tensor]:
    return conditionals(draft_model(how, **PEAKED), PROMPT, NEW, **WAYS[way])


def count_of(way: str) -> int:
    """Walks on the host take longer."""
    return FEW if way == "of the text" else MANY


def sample(draft: Any, way: str, seed: int = 0) -> tuple[Tensor, Any]:
    model = prepared(**PEAKED)
    speculator = Speculator(model.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    torch.manual_seed(seed)
    how = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW, **WAYS[way]}
    out = type(model).generate(model, PROMPT, **how, num_return_sequences=count_of(way), custom_generate=loop)
    (round_,) = speculator._free.values()
    assert round_.is_fixed == (way != "of the text")
    return out[:, PROMPT.shape[1] :], speculator.last


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tree", TREES)
def test_answers_have_the_model_s_distribution(tree: str, way: str) -> None:
    drawn, found = sample(ModelDraft(draft_model("near", **PEAKED), TREES[tree]), way)
    assert 1.15 < found.acceptance_length < 2.5  # nodes are accepted, and others are not
    if tree == "c2t":
        assert 0.5 < found.verified / found.rounds < TREES[tree].nodes - 1.5
    assert p_value(joint_of(exact(way)), drawn) > FALSE_ALARM


@pytest.mark.parametrize("way", ["plain", "of the text"])
def test_with_what_is_looked_up(way: str) -> None:
    drawn, found = sample(NGramDraft(DEPTH), way)
    assert found.acceptance_length > 1.02
    assert p_value(joint_of(exact(way)), drawn) > FALSE_ALARM


def one_noise_for_all(given: list[Tensor], count: int) -> Tensor:
    """Texts `[count, new]` whose tokens are chosen with the noise of the first one."""
    noise = token_noise(torch.tensor(1), torch.zeros(count, 1, dtype=torch.long), len(given[0]))[:, 0]
    tokens: list[Tensor] = []
    for conditional in given:
        tokens.append((conditional[tuple(tokens)] / noise).argmax(-1))
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("way", WAYS)
def test_other_rules_have_other_distributions(way: str) -> None:
    """By the same statistics of as many texts; and the right rule passes, whatever the noise."""
    right, draft, count = exact(way), exact(way, "near"), count_of(way)
    colder = WAYS[way].get("temperature", 1.0) * 0.7
    wrong = {
        "the draft's": draft,
        "in every second token the draft's": [(p + q) / 2 for p, q in zip(right, draft, strict=True)],
        "colder": conditionals(families.make("llama", **PEAKED), PROMPT, NEW, **{**WAYS[way], "temperature": colder}),
    }
    if way != "plain":
        wrong["what was asked for forgotten"] = exact("plain")
    joint, generator = joint_of(right), torch.Generator().manual_seed(0)
    for name, given in wrong.items():
        for _ in range(3):
            assert p_value(joint, drawn_from(joint_of(given), count, generator)) < FALSE_ALARM, name
    assert p_value(joint, one_noise_for_all(right, count)) < FALSE_ALARM
    assert min(p_value(joint, drawn_from(joint, count, generator)) for _ in range(50)) > 1e-4
