"""Caches with a budget on a GPU: CUDA graphs over layers of different lengths, and memory that falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import effpass
from effpass.runtime.attach import attach
from effpass.runtime.attention import reading_cache
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.plan import Settings
from effpass.runtime.prefix_kv.policy import Policy
from effpass.runtime.prefix_kv.session import BudgetSession

pytestmark = pytest.mark.gpu


class Fixed(Policy):
    """Shares that are known beforehand."""

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        return [float(layers - i) for i in range(layers)]


def budgeted(model: Any, policy: Policy, budget: float, **more: Any) -> Any:
    chosen = Settings(policy, Budget.parse(budget), **{"sink": 2, "recent": 4, "page": 1, "every": 4, **more})
    attach(model).new_session = lambda *arguments: BudgetSession(*arguments, settings=chosen)
    return model


def inputs(length: int = 30) -> dict[str, Tensor]:
    given = families.batch(length)
    return {k: given[k].cuda() for k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_budget_of_everything_changes_no_token(family: str) -> None:
    model, given = families.make(family).cuda(), inputs()
    how = {"max_new_tokens": 24, "eos_token_id": None}
    theirs = model.generate(**given, **how)
    ready = effpass.prepare(model, {"passes": [{"prefix_kv": {"budget": 1.0}}]})
    assert torch.equal(ready.generate(**given, **how), theirs)


@pytest.mark.parametrize("policy", [Policy, Fixed])
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_it_is_what_the_cpu_computes(family: str, policy: type[Policy]) -> None:
    how = {"max_new_tokens": 40, "eos_token_id": None}
    theirs = budgeted(families.make(family), policy(), 0.5).generate(**families_cpu(), **how)
    ours = budgeted(families.make(family).cuda(), policy(), 0.5).generate(**inputs(), **how)
    # One choice between two near equal logits, or of two tokens of near equal rank, and the rest differs.
    assert (ours.cpu() == theirs).float().mean() > 0.8


def families_cpu() -> dict[str, Tensor]:
    return {k: v.cpu() for k, v in inputs().items()}


def test_known_shares_keep_the_graph_from_call_to_call() -> None:
    model, given = budgeted(families.make("llama").cuda(), Fixed(), 0.5), inputs()
    first = model.generate(**given, max_new_tokens=30, eos_token_id=None)
    (session,) = model.effpass_engine._free.values()
    graph = session._graph
    assert graph is not None
    assert len({layer.slots.positions.shape[1] for layer in session.cache.layers}) == 2
    assert torch.equal(model.generate(**given, max_new_tokens=30, eos_token_id=None), first)
    assert session._graph is graph


@pytest.mark.parametrize("dtype", ["int8", "fp8", "int4"])
def test_few_bits(dtype: str) -> None:
    given = inputs()
    how = {"max_new_tokens": 3, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    theirs = families.make("llama").cuda().generate(**given, **how).logits
    ours = budgeted(families.make("llama").cuda(), Policy(), 1.0, kv_cache_dtype=dtype).generate(**given, **how).logits
    error = (ours[1] - theirs[1]).abs().max() / theirs[1].abs().max()
    assert 0 < error < {"int8": 0.01, "fp8": 0.06, "int4": 0.2}[dtype]


def test_giving_up_does_not_wait_for_the_device() -> None:
    model, given = budgeted(families.make("llama").cuda(), Fixed(), 0.5), inputs()
    model.generate(**given, max_new_tokens=30, eos_token_id=None)
    (session,) = model.effpass_engine._free.values()
    session.begin(2)
    with torch.no_grad(), reading_cache(model):
        session.prefill(given["input_ids"], given["attention_mask"].bool(), 64)
        session.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(9):
                session.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(layer.slots.length for layer in session.cache.layers) < 1.3 * 40


def test_memory_falls() -> None:
    # What a process takes once, for all later launches and products.
    budgeted(families.make("llama").cuda(), Fixed(), 0.5).generate(**inputs(), max_new_tokens=1, eos_token_id=None)
    used = []
    for budget in (1.0, 0.2):
        model = families.make("llama", max_position_embeddings=1 << 15).cuda()
        ids = torch.randint(3, 96, (4, 1 << 14), device="cuda")
        budgeted(model, Fixed() if budget < 1 else Policy(), budget, every=64)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        model.generate(input_ids=ids, max_new_tokens=1, eos_token_id=None)
        (session,) = model.effpass_engine._free.values()
        held = sum(x.nbytes for layer in session.cache.layers for x in layer.storage())
        # Positions, scores and ids are some bytes a token, whatever the model: 36 were measured.
        assert 0 <= torch.cuda.memory_allocated() - before - held < 64 * ids.numel()
        used.append(held)
    assert used[1] / used[0] == pytest.approx(0.2, rel=0.05)
