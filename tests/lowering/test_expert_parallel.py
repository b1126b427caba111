"""`effpass::expert_parallel` in several gloo processes gives what `effpass::moe_ffn` gives in one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from moe_reference import GATES, layer
from ranks import start_ranks

import effpass.lowering.ops.expert_parallel  # noqa: F401  (registers the operator)
from effpass.core.errors import EffpassError
from effpass.lowering.ops.moe_ffn import TOLERANCE

WORKER = Path(__file__).with_name("expert_parallel_worker.py")
ENDS = "late_or_gone"  # after it only rank 0 is left
PARTS = {
    2: ("loads", "kinds", "everywhere", "different_ids", "order", "compiled", "checked", "counted", "refused", ENDS),
    4: ("loads", "everywhere", "different_ids"),
}
EXACT = 1e-14  # float64; sums are taken in another order


def launch(parts: tuple[str, ...], world: int, folder: Path, device: str = "cpu") -> list[dict]:
    """What each rank found."""
    returned, output = start_ranks([str(WORKER), str(folder), ",".join(parts)], world, DEVICE=device)
    # The group of a rank that is left alone can't be closed.
    expected = [returned[0] if ENDS in parts else 0, *(0 for _ in returned[1:])]
    assert returned == expected, output[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """world → part → what each rank found; all parts of a world in one start of its processes."""
    found = {}

    def get(world: int, part: str):
        if world not in found:
            found[world] = launch(PARTS[world], world, tmp_path_factory.mktemp(f"world{world}"))
        return [each.get(part) for each in found[world]]

    return get


@pytest.mark.parametrize("load", ["even", "one expert", "empty ranks", "absent"])
@pytest.mark.parametrize("tokens", ["some tokens", "one rank has none", "one rank has any", "no tokens"])
@pytest.mark.parametrize("attention", ["DP", "TP"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_equal_one_for_every_number_of_stages(world, attention, tokens, load, results):
    """And no number of stages changes a bit."""
    stages = {2: ["1", "2", "3", "6"], 4: ["1", "3"]}[world]
    for rank in results(world, "loads"):
        found = rank[f"{attention} + EP, {load}, {tokens}"]
        assert list(found["errors"]) == stages
        assert max(found["errors"].values()) <= EXACT
        assert found["same bits"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_gates(dtype, gate, results):
    for rank in results(2, "kinds"):
        assert rank[f"{dtype}, {gate}"] <= TOLERANCE[dtype]
        assert rank["torch.bfloat16, of weights too"] <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("world", [2, 4])
def test_replicated_tokens_without_stages(world, results):
    for rank in results(world, "everywhere"):
        assert len(rank) == 4
        assert max(rank.values()) <= EXACT


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_route_the_same_token_differently(world, results):
    assert max(results(world, "different_ids")) <= EXACT


def test_order_of_issue(results):
    """The rows of the next stage are on their way before this one is computed, and ahead of its sums."""
    for rank in results(2, "order"):
        assert rank == [
            "effpass::expert_parallel",
            *("effpass::dispatch 0", "effpass::dispatch 1", "effpass::wait for dispatch 0"),
            *("effpass::experts 0", "effpass::combine 0"),
            *("effpass::dispatch 2", "effpass::wait for dispatch 1", "effpass::experts 1", "effpass::combine 1"),
            *("effpass::wait for dispatch 2", "effpass::experts 2", "effpass::combine 2"),
            "effpass::wait for combine",
        ]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "effpass"])
def test_one_graph(backend, results):
    for rank in results(2, "compiled"):
        assert rank[backend]["error"] <= EXACT
        assert rank[backend]["graphs"] == 1


def test_opcheck(results):
    kinds = ["test_aot_dispatch_dynamic", "test_autograd_registration", "test_faketensor", "test_schema"]
    assert results(2, "checked") == [kinds, kinds]


def test_flops(results):
    """Of 8 tokens with 3 experts each: all of a rank's own, half of those that two ranks share."""
    own = 2 * 8 * 3 * 24 * (2 * 16 + 16)
    assert results(2, "counted") == [{"own": own, "replicated": own // 2}] * 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tokens", r"tokens by rank: \[5, 6\]"),
        ("stages", r"stages by rank: \[1, 6\]"),
        ("divisor", "5 stages of 6 local experts\n  → give one of 0, 1, 2, 3, 6"),
        ("backward", "no backward pass: experts on several ranks are for inference"),
    ],
)
def test_refusals_on_all_ranks(what, message, results):
    assert [bool(re.search(message, rank[what])) for rank in results(2, "refused")] == [True, True]


def test_a_rank_that_is_late_or_gone_is_an_error(results):
    found, _ = results(2, ENDS)
    for name in ("late", "gone"):
        assert found[name].startswith("experts on several ranks: the exchange of counts failed:")
        assert "another rank ended, or did not come to this layer in time" in found[name]
        assert found[f"{name}, seconds"] < 20


def test_there_has_to_be_a_group():
    with pytest.raises(EffpassError, match="no process group 'nobody' is up"):
        torch.ops.effpass.expert_parallel(*layer(5, 2, 4, 24, 16), *GATES["SwiGLU"], False, 0, "nobody")


@pytest.mark.gpu
def test_on_two_gpus(tmp_path):
    """Through NCCL, by the kernels; and recorded in a CUDA graph, where tokens are replicated."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for rank in launch(("loads", "kinds", "everywhere", "different_ids", "chosen", "recorded"), 2, tmp_path, "cuda"):
        assert max(e for found in rank["loads"].values() for e in found["errors"].values()) <= EXACT
        assert all(found["same bits"] for found in rank["loads"].values())
        for name, error in rank["kinds"].items():
            assert error <= TOLERANCE[getattr(torch, name.partition(",")[0].removeprefix("torch."))], name
        assert max(rank["everywhere"].values()) <= EXACT
        assert rank["different_ids"] <= EXACT
        for name, found in rank["chosen"].items():
            assert found["error"] <= TOLERANCE[torch.bfloat16], name
            assert found["same bits"], name
        assert rank["recorded"]["error"] <= TOLERANCE[torch.bfloat16]
        assert "which no CUDA graph can record" in rank["recorded"]["own tokens"]
