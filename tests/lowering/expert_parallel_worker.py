"""What each process of test_expert_parallel runs: layers whose experts are spread, against all experts in one process.

expert_parallel_worker.py FOLDER PART,PART,…     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, and DEVICE=cuda
for one GPU a rank; leaves FOLDER/RANK.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_reference import GATES, error, layer

import effpass.lowering.ops.expert_parallel  # noqa: F401  (registers the operator)
from effpass.core.errors import EffpassError

op = torch.ops.effpass.expert_parallel

DEVICE = os.environ.get("DEVICE", "cpu")
E, K, D, F = 12, 3, 24, 16  # of all ranks
Tensors = list[Any]


def even(rank: int, ids: torch.Tensor) -> torch.Tensor:
    return ids


def one_expert(rank: int, ids: torch.Tensor) -> torch.Tensor:
    """Every pair of every token, so that a row has the same expert k times."""
    return torch.full_like(ids, 4)


def empty_ranks(rank: int, ids: torch.Tensor) -> torch.Tensor:
    """Nobody wants an expert but the first three."""
    return ids % 3


def absent(rank: int, ids: torch.Tensor) -> torch.Tensor:
    """Some ids, and all of rank 1's, are of experts that nobody holds."""
    return ids + E if rank == 1 else torch.where(ids % 4 == 0, ids + 2 * E, ids)


LOADS: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {
    "even": even,
    "one expert": one_expert,
    "empty ranks": empty_ranks,
    "absent": absent,
}
TOKENS: dict[str, Callable[[int], int]] = {
    "some tokens": lambda rank: 9 + 4 * rank,
    "one rank has none": lambda rank: 0 if rank == 1 else 7,
    "one rank has any": lambda rank: 11 if rank == 1 else 0,
    "no tokens": lambda rank: 0,
}


def inputs(rank: int, tokens: int, load: str, dtype: torch.dtype, biases: bool = False) -> Tensors:
    """x, ids, weights of a rank, and all experts, which are the same on all."""
    experts = layer(1, K, E, D, F, biases=biases, dtype=dtype)[3:]
    torch.manual_seed(rank)
    x = torch.randn(tokens, D, dtype=torch.float64).to(dtype)
    ids = LOADS[load](rank, torch.rand(tokens, E).topk(K).indices)
    weights = torch.rand(tokens, K, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return [None if t is None else t.to(DEVICE) for t in (x, ids, weights, *experts)]


def mine(experts: Tensors, rank: int, world: int) -> Tensors:
    local = E // world
    return [None if t is None else t[rank * local : (rank + 1) * local].clone() for t in experts]


def spread(rank: int, world: int, made: Tensors, gate: str, replicated: bool, stages: int) -> torch.Tensor:
    tensors = (*made[:3], *mine(made[3:], rank, world))
    return op(*tensors, *GATES[gate], replicated, stages, dist.group.WORLD.group_name)


def whole(made: Tensors, gate: str) -> torch.Tensor:
    return torch.ops.effpass.moe_ffn(*made, *GATES[gate], False)[0]


def compare(
    rank: int, world: int, made: Tensors, gate: str, replicated: bool, stages: int
) -> tuple[torch.Tensor, float]:
    got, expected = spread(rank, world, made, gate, replicated, stages), whole(made, gate)
    assert got.dtype == made[0].dtype
    assert got.shape == expected.shape
    return got, error(got, expected.double()) if got.numel() else 0.0


def loads(rank: int, world: int) -> dict[str, Any]:
    """Error of every load with every number of stages, in float64, and whether that number changes a bit."""
    found = {}
    for replicated in (False, True):
        for tokens, count in TOKENS.items():
            for load in LOADS:
                made = inputs(
                    0 if replicated else rank, count(1 if replicated else rank), load, torch.float64, biases=True
                )
                outs = {
                    stages: compare(rank, world, made, "GPT-OSS", replicated, stages)
                    for stages in range(1, E // world + 1)
                    if E // world % stages == 0
                }
                same = all(torch.equal(out, outs[1][0]) for out, _ in outs.values())
                name = f"{'TP' if replicated else 'DP'} + EP, {load}, {tokens}"
                found[name] = {"errors": {n: e for n, (_, e) in outs.items()}, "same bits": same}
    return found


def kinds(rank: int, world: int) -> dict[str, float]:
    """Error by type, gate, and type of the routing weights."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for gate in GATES:
            made = inputs(rank, 13 + rank, "even", dtype)
            found[f"{dtype}, {gate}"] = compare(rank, world, made, gate, False, 0)[1]
    made = inputs(rank, 13, "even", torch.bfloat16)
    made[1], made[2] = made[1].int(), made[2].bfloat16()
    found["torch.bfloat16, of weights too"] = compare(rank, world, made, "SwiGLU", False, E // world)[1]
    return found


def everywhere(rank: int, world: int) -> dict[str, float]:
    """Replicated tokens without stages, as few tokens and recorded graphs have them."""
    from effpass.lowering.ops.expert_parallel import _everywhere
    from effpass.lowering.ops.expert_parallel_exchange import ranks_of
    from effpass.lowering.ops.expert_parallel_stage import Experts

    found = {}
    for load in LOADS:
        made = inputs(0, 6, load, torch.float64, biases=True)
        here = Experts(*mine(made[3:], rank, world), GATES["GPT-OSS"])
        got = _everywhere(*made[:3], here, ranks_of(dist.group.WORLD.group_name))
        found[load] = error(got, whole(made, "GPT-OSS").double())
    return found


def different_ids(rank: int, world: int) -> float:
    """Of replicated tokens, where ranks name other experts: the rank counts that answers for the token."""
    every = [inputs(0, 10, "even", torch.float64) for _ in range(world)]
    for number, made in enumerate(every):
        made[1] = (made[1] + number) % E
    share = -(-10 // world)
    ids = torch.cat([made[1][n * share : (n + 1) * share] for n, made in enumerate(every)])
    got = spread(rank, world, every[rank], "SwiGLU", True, 1)
    return error(got, whole([every[0][0], ids, *every[0][2:]], "SwiGLU").double())


def order(rank: int, world: int) -> list[str]:
    """What a trace shows of three stages: exchanges, and the experts of each stage."""
    from torch.profiler import ProfilerActivity, profile

    made = inputs(rank, 30, "even", torch.float32)
    spread(rank, world, made, "SwiGLU", False, 3)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        spread(rank, world, made, "SwiGLU", False, 3)
    events = sorted(trace.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name.startswith("effpass::")]


def compiled(rank: int, world: int) -> dict[str, Any]:
    """One graph for all numbers of tokens, by several backends."""
    from torch._dynamo.utils import counters

    import effpass.backend

    experts, name = mine(inputs(rank, 5, "even", torch.float64)[3:], rank, world), dist.group.WORLD.group_name

    def layer_of(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return op(x, ids, weights, *experts, *GATES["SwiGLU"], False, 0, name)

    def rewritten(gm: Any, example: Any) -> Any:
        return effpass.backend.effpass(gm, example, options={"passes": ["moe_gemm"], "inner": "eager"})

    found: dict[str, Any] = {}
    for backend in ("aot_eager", "inductor", rewritten):
        torch._dynamo.reset()
        counters.clear()
        run, worst = torch.compile(layer_of, backend=backend, fullgraph=True, dynamic=True), 0.0
        for tokens in (12, 5 + rank, 30):
            made = inputs(rank, tokens, "even", torch.float64)
            with torch.no_grad():
                worst = max(worst, error(run(*made[:3]), whole(made, "SwiGLU").double()))
        label = backend if isinstance(backend, str) else "effpass"
        found[label] = {"error": worst, "graphs": counters["stats"]["unique_graphs"]}
    return found


def checked(rank: int, world: int) -> list[str]:
    """opcheck, of what can be checked of an operator that all ranks call."""
    made = inputs(rank, 7, "even", torch.float32, biases=True)
    numbers = (*GATES["GPT-OSS"], False, 0, dist.group.WORLD.group_name)
    arguments = (*made[:3], *mine(made[3:], rank, world), *numbers)
    return sorted(name for name, result in torch.library.opcheck(op.default, arguments).items() if result == "SUCCESS")


def counted(rank: int, world: int) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    made = inputs(0, 8, "even", torch.float32)
    found = {}
    for name, replicated in (("own", False), ("replicated", True)):
        with FlopCounterMode(display=False) as counter:
            spread(rank, world, made, "SwiGLU", replicated, 1)
        found[name] = counter.get_total_flops()
    return found


def refused(rank: int, world: int) -> dict[str, str]:
    """What all ranks say where they do not call the same layer."""
    made = inputs(rank, 5 + rank, "even", torch.float32)

    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except EffpassError as error:
            return str(error)
        return "nothing"

    made[0].requires_grad_()
    return {
        "tokens": message(lambda: spread(rank, world, made, "SwiGLU", True, 1)),
        "stages": message(lambda: spread(rank, world, made, "SwiGLU", False, (1, E // world)[rank % 2])),
        "divisor": message(lambda: spread(rank, world, made, "SwiGLU", False, 5)),
        "backward": message(lambda: spread(rank, world, made, "SwiGLU", False, 1).sum().backward()),
    }


def chosen(rank: int, world: int) -> dict[str, Any]:
    """On GPUs: layers of some size, by the kernels, with a number of stages from what is measured, and with others."""
    found = {}
    for replicated in (False, True):
        for tokens in (700, 5000):
            torch.manual_seed(0 if replicated else rank)
            x = torch.randn(tokens, 512, device=DEVICE, dtype=torch.bfloat16)
            scores = torch.rand(tokens, 32, device=DEVICE) + torch.arange(32, device=DEVICE) / 64  # skewed
            ids, weights = scores.topk(4).indices, torch.rand(tokens, 4, device=DEVICE)
            torch.manual_seed(7)
            gate_up = torch.randn(32, 512, 512, device=DEVICE, dtype=torch.bfloat16) * 512**-0.5
            down = torch.randn(32, 512, 256, device=DEVICE, dtype=torch.bfloat16) * 256**-0.5
            made = [x, ids, weights, gate_up, None, down, None]
            expected = whole([t if t is None or not t.is_floating_point() else t.double() for t in made], "SwiGLU")
            own = made[:3] + [None if t is None else t.chunk(world)[rank].clone() for t in made[3:]]
            name = dist.group.WORLD.group_name
            outs = [op(*own, *GATES["SwiGLU"], replicated, stages, name) for stages in (0, 1, 2, 2, 8)]
            found[f"{'replicated' if replicated else 'own'}, {tokens}"] = {
                "error": max(error(out, expected) for out in outs),
                "same bits": torch.equal(outs[2], outs[3]),
            }
    return found


def recorded(rank: int, world: int) -> dict[str, Any]:
    """On GPUs: replicated tokens in a CUDA graph, replayed on others."""
    made = inputs(0, 6, "even", torch.bfloat16)
    own, name = mine(made[3:], rank, world), dist.group.WORLD.group_name
    call = lambda replicated: op(*made[:3], *own, *GATES["SwiGLU"], replicated, 0, name)  # noqa: E731
    call(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(True)
    other = inputs(1, 6, "even", torch.bfloat16)
    for before, after in zip(made[:3], other[:3], strict=True):
        before.copy_(after)
    graph.replay()
    found: dict[str, Any] = {"error": error(out, whole(made, "SwiGLU").double())}
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call(False)
    except EffpassError as refusal:
        found["own tokens"] = str(refusal)
    return found


def late_or_gone(rank: int, world: int) -> dict[str, Any]:
    """The last part: a rank that does not come in time, and one that has ended. Only rank 0 lives on."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    made = inputs(rank, 5, "even", torch.float32)
    found: dict[str, Any] = {}
    if rank:
        time.sleep(4)
        os._exit(0)
    for name in ("late", "gone"):
        started = time.monotonic()
        try:
            op(*made[:3], *mine(made[3:], rank, world), *GATES["SwiGLU"], False, 1, group.group_name)
        except EffpassError as error:
            found[name] = str(error)
        found[f"{name}, seconds"] = time.monotonic() - started
        time.sleep(3)
    return found


PARTS = {
    part.__name__: part
    for part in (
        loads, kinds, everywhere, different_ids, order, compiled, checked, counted, refused, chosen,
        recorded, late_or_gone,
    )
}  # fmt: skip


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=timedelta(seconds=60))
    found = {}
    for name in sys.argv[2].split(","):
        torch.manual_seed(0)
        found[name] = PARTS[name](rank, world)
        Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
