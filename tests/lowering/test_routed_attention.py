"""Trainable sparse attention on the CPU: choices against loops, outputs and gradients against dense sums in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from routed_cases import CASES, Case, brute_choice, dense, expected, mask_of, ratio
from torch.utils.checkpoint import checkpoint

from effpass.core.errors import EffpassError
from effpass.lowering.ops import routed_attention as module
from effpass.lowering.ops import routed_blocks
from effpass.lowering.ops.routed_attention import GRADIENT_TOLERANCE, TOLERANCE, trainable_sparse_attention
from effpass.lowering.ops.routed_coverage import coverage_curve

ops = torch.ops.effpass


def called(case: Case, *leaves: torch.Tensor, budget: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return trainable_sparse_attention(
        *leaves, case.cu_seqlens(), case.budget_on() if budget is None else budget, block=case.block,
        max_budget=case.max_budget, scale=case.scale,
    )  # fmt: skip


def chosen_of(case: Case, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return ops.route_blocks(
        q, k, case.cu_seqlens(), case.budget_on(), case.block, case.max_budget, case.scale
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_choice_and_coverage_against_loops(name: str) -> None:
    case = CASES[name]
    q, k, *_ = case.tensors(torch.float64)
    chosen, coverage = ops.route_blocks(
        q, k, case.cu_seqlens(), case.budget_on(), case.block, case.max_budget, case.scale
    )
    wanted, held = brute_choice(case, q, k)
    found = torch.zeros_like(wanted)
    for g in range(case.groups):
        for t in range(case.tokens):
            listed = chosen[g, t][chosen[g, t] >= 0]
            assert (listed.diff() > 0).all()
            assert (chosen[g, t, len(listed) :] == -1).all()
            found[g, t, listed] = True
    assert torch.equal(found, wanted)
    assert float(coverage) == pytest.approx(held, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_against_dense_sums(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    *leaves, d_out = (x.to(dtype) for x in case.tensors(dtype))
    leaves = [x.requires_grad_() for x in leaves]
    out, coverage = called(case, *leaves)
    assert not coverage.requires_grad
    found = torch.autograd.grad(out, leaves, d_out)
    wanted = expected(case, mask_of(chosen_of(case, *leaves[:2]), case.ends, case.block), dtype)
    assert ratio(out.detach(), wanted["output"]) <= TOLERANCE[dtype]
    for name, gradient in zip(("d q", "d k", "d v"), found, strict=True):
        assert ratio(gradient, wanted[name]) <= GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("budget", [70, 71, 1000])
def test_a_budget_of_the_length_is_dense_causal_attention(budget: int) -> None:
    case = Case((0, 70, 90), heads=4, groups=2, budget=budget)
    leaves = [x.requires_grad_() for x in case.tensors(torch.float64)[:3]]
    out, coverage = called(case, *leaves)
    causal = torch.ones(90, 90).tril().bool()
    causal[70:, :70] = False
    torch.testing.assert_close(out, dense(*leaves, causal[None].expand(2, -1, -1), case.scale))
    assert float(coverage) == pytest.approx(1)


def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["grouped, packed, an empty sequence"]
    *leaves, d_out = case.tensors(torch.float64)
    leaves = [x.requires_grad_() for x in leaves]

    def run() -> list[torch.Tensor]:
        out, coverage = called(case, *leaves)
        return [out, coverage, *torch.autograd.grad(out, leaves, d_out)]

    whole = run()
    monkeypatch.setattr(module, "_SCORES", 7 * case.tokens * case.heads)
    monkeypatch.setattr(routed_blocks, "_SCORES", 11 * 12 * case.groups)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_no_token_depends_on_later_ones() -> None:
    case = Case((0, 150), heads=4, groups=2, budget=48)
    q, k, v, _ = case.tensors(torch.float64)
    out, _ = called(case, q, k, v)
    for x in (q, k, v):
        x[97:] = torch.randn_like(x[97:]) * 5
    changed, _ = called(case, q, k, v)
    assert torch.equal(out[:97], changed[:97])
    assert not torch.equal(out[97:], changed[97:])


def test_sequences_do_not_see_each_other() -> None:
    ends = (0, 53, 120)
    case = Case(ends, heads=4, groups=2, budget=48)
    q, k, v, _ = case.tensors(torch.float64)
    packed, _ = called(case, q, k, v)
    for begin, end in itertools.pairwise(ends):
        alone, _ = called(Case((0, end - begin), 4, 2), *(x[begin:end] for x in (q, k, v)))
        torch.testing.assert_close(packed[begin:end], alone)


def test_nothing_uninitialized_is_read() -> None:
    """Memory that was not written holds NaN."""
    case = CASES["grouped, packed, an empty sequence"]
    *leaves, d_out = case.tensors(torch.float32)
    leaves = [x.float().requires_grad_() for x in leaves]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out, coverage = called(case, *leaves)
        found = torch.autograd.grad(out, leaves, d_out.float())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (out, coverage, *found))


# -- in training ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_recomputes_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((0, 40, 130), heads=4, groups=2, budget=48)
    *leaves, d_out = (x.float() for x in case.tensors(torch.float32))
    leaves = [x.requires_grad_() for x in leaves]
    seen: list[torch.Tensor] = []
    run = module.routed_attention._opoverload

    class Ops:
        """`torch.ops.effpass`, writing down what is chosen."""

        route_blocks = ops.route_blocks
        routed_attention_backward = ops.routed_attention_backward

        @staticmethod
        def routed_attention(*arguments: object) -> object:
            seen.append(arguments[4])  # type: ignore[arg-type]
            return run(*arguments)

    def attend(budget: torch.Tensor, again: bool) -> list[torch.Tensor]:
        def block(*x: torch.Tensor) -> torch.Tensor:
            return called(case, *(y * 1.5 for y in x), budget=budget)[0]

        out = checkpoint(block, *leaves, use_reentrant=False) if again else block(*leaves)
        return [out, *torch.autograd.grad(out, leaves, d_out)]

    monkeypatch.setattr(torch.ops, "effpass", Ops)
    for keys in (33, 64):
        seen.clear()
        plain, recomputed = (attend(torch.tensor(keys), again) for again in (False, True))
        assert len(seen) == 3  # once, and once more for the recomputation
        assert all(torch.equal(x, seen[0]) for x in seen)
        assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_budget_that_changes_compiles_nothing() -> None:
    torch._dynamo.utils.counters.clear()
    case = Case((0, 40, 130), heads=4, groups=2)
    q, k, v, d_out = (x.float() for x in case.tensors(torch.float32))
    budgets = torch.tensor([32, 48, 64, 96, 130], dtype=torch.int32)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, budget: torch.Tensor):  # type: ignore[no-untyped-def]
        out, coverage = trainable_sparse_attention(q, k, v, ends, budget, block=16, max_budget=160, scale=0.3)
        return out * 2, coverage

    coverages, outputs = [], []
    for layer in range(len(budgets)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, coverage = attend(*leaves, case.cu_seqlens(), budgets[layer])
        plain = trainable_sparse_attention(
            *leaves, case.cu_seqlens(), budgets[layer], block=16, max_budget=160, scale=0.3
        )
        torch.testing.assert_close(out, plain[0] * 2)
        found, wanted = torch.autograd.grad(out, leaves, d_out), torch.autograd.grad(plain[0] * 2, leaves, d_out)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        coverages.append(float(coverage))
        outputs.append(out)
    assert coverages == sorted(coverages)
    assert coverages[-1] == pytest.approx(1)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.utils.counters.clear()


def test_autocast_computes_in_its_type() -> None:
    case = Case(heads=4, groups=2)
    q, k, v, _ = (x.float() for x in case.tensors(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = called(case, q, k, v.bfloat16())  # as rotary embeddings leave them
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, called(case, *(x.bfloat16() for x in (q, k, v)))[0])


def test_opcheck() -> None:
    case = Case((0, 20, 50), heads=4, groups=2, value_size=8)
    q, k, v, _ = (x.float().requires_grad_() for x in case.tensors(torch.float32))
    ends = case.cu_seqlens()
    choice = (q.detach(), k.detach(), ends, case.budget_on(), 16, 64, 0.3)
    torch.library.opcheck(ops.route_blocks.default, choice)
    chosen, _ = ops.route_blocks(*choice)
    torch.library.opcheck(ops.routed_attention.default, (q, k, v, ends, chosen, 16, 0.3))
    out, logsumexp = (x.detach() for x in ops.routed_attention(q, k, v, ends, chosen, 16, 0.3))
    saved = (torch.randn_like(out), out, logsumexp, *(x.detach() for x in (q, k, v)), ends, chosen, 16, 0.3)
    torch.library.opcheck(ops.routed_attention_backward.default, saved)


def test_work_is_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = Case((0, 128), heads=4, groups=2, budget=32, max_budget=32)
    q, k, v, d_out = (x.float() for x in case.tensors(torch.float32))
    with FlopCounterMode(display=False) as counter:
        out, _ = called(case, *(x.requires_grad_() for x in (q, k, v)))
        out.backward(d_out)
    counts = counter.get_flop_counts()["Global"]
    pairs = 4 * sum(min(t, 32) for t in range(128)) + 4 * 16  # of 32 keys at most; half of a corner's diagonal
    assert counts[ops.routed_attention] == pytest.approx(2 * pairs * 32, rel=0.02)
    assert counts[ops.routed_attention_backward] == pytest.approx(2 * pairs * 80, rel=0.02)
    assert counts[ops.route_blocks] == 128 * 2 * 8 * 16


# -- coverage of several budgets --------------------------------------------------------------------------------------


def test_the_curve_is_the_coverage_of_every_budget() -> None:
    case = CASES["grouped, packed, an empty sequence"]
    q, k, *_ = case.tensors(torch.float64)
    budgets = torch.tensor([20, 32, 47, 64, 500])
    curve = coverage_curve(q, k, case.cu_seqlens(), budgets, block=16, scale=case.scale, rows=case.tokens)
    for budget, found in zip(budgets, curve, strict=True):
        _, coverage = ops.route_blocks(q, k, case.cu_seqlens(), budget, 16, None, case.scale)
        assert float(found) == pytest.approx(float(coverage), rel=1e-6)
    some = coverage_curve(q, k, case.cu_seqlens(), budgets, block=16, scale=case.scale, rows=60)
    assert float((some - curve).abs().max()) < 0.05
    assert (some.diff() >= 0).all()


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(match: str, **changes: object) -> None:
    case = Case(heads=4, groups=2)
    q, k, v, _ = case.tensors(torch.float32)
    call = {"q": q, "k": k, "v": v, "cu_seqlens": case.cu_seqlens(), "budget": case.budget_on(), "block": 16}
    call = {name: change(call[name]) if callable(change := changes.get(name)) else changes.get(name, call[name])
            for name in call} | {name: value for name, value in changes.items() if name not in call}  # fmt: skip
    with pytest.raises(EffpassError, match=match):
        trainable_sparse_attention(**call)  # type: ignore[arg-type]


def test_bad_input_is_refused() -> None:
    ends = torch.tensor
    refused("budget of 16 keys is less than the two blocks of 16", budget=torch.tensor(16))
    refused("budget of -3 keys", budget=torch.tensor(-3))
    refused("the budget is 65 keys and max_budget 64", budget=torch.tensor(65), max_budget=64)
    refused("a budget of 10 keys", max_budget=10)
    refused(r"budget is float32 \(\)", budget=torch.tensor(64.0))
    refused(r"budget is int64 \(1,\)", budget=torch.tensor([64]))
    refused(r"cu_seqlens is \[0, 60, 50, 100\] for 100 tokens", cu_seqlens=ends([0, 60, 50, 100]))
    refused(r"cu_seqlens is \[0, 90\] for 100 tokens", cu_seqlens=ends([0, 90]))
    refused(r"cu_seqlens is \[1, 100\]", cu_seqlens=ends([1, 100]))
    refused(r"cu_seqlens is float32 \(2,\)", cu_seqlens=ends([0.0, 100.0]))
    refused(r"cu_seqlens is int64 \(1,\)", cu_seqlens=ends([100]))
    refused("blocks of 20 keys", block=20)
    refused(r"q \(1, 100, 4, 16\)", q=lambda q: q[None])
    refused("3 query heads", q=lambda q: q[:, :3])
    refused(r"k \(99, 2, 16\)", k=lambda k: k[1:])
    refused("in torch.float16", k=lambda k: k.half())
    refused(r"v \(100, 1, 16\)", v=lambda v: v[:, :1])
    refused(r"q \(0, 4, 16\)", q=lambda q: q[:0], k=lambda k: k[:0], v=lambda v: v[:0], cu_seqlens=ends([0, 0]))
    case = Case(heads=4, groups=2)
    q, k, v, _ = case.tensors(torch.float32)
    with pytest.raises(EffpassError, match=r"chosen is int64 \(2, 99, 3\)"):
        ops.routed_attention(q, k, v, case.cu_seqlens(), torch.zeros(2, 99, 3, dtype=torch.int64), 16, 0.3)
