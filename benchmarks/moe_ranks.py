"""Area `moe` on several GPUs: layers whose experts are spread over the ranks that torchrun started.

    torchrun --nproc-per-node 4 -m benchmarks moe --device cuda --case eps-deepseek-v2 --json FILE

Ours is `effpass::expert_parallel` as it chooses its stages and kernels; each rank has T tokens of its own. Peers
compute the same layer of the same W · T tokens in the same run: with every expert cut over the ranks and the sums
added up (TP + TP), and with an all-to-all of pairs before and after transformers' grouped experts (DP + EP without
overlap, as transformers and torchtitan have it). No side is captured or compiled. Times are of the slowest rank,
medians over repetitions; rows are rank 0's. The bound is the largest of reading a rank's experts, computing its
pairs, and carrying its rows at the rate that an all-to-all reached on this machine, for the rank with the largest
load. What is called simulated comes from the simulator that plays the order of issue with fitted durations.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import effpass.lowering.ops.expert_parallel as expert_parallel
from benchmarks.moe_peers import exchange_pairs, grouped_experts
from benchmarks.rows import Row, bandwidth, row, sync
from effpass.lowering.ops.expert_parallel_choice import Agreed, agreed, stages_of
from effpass.lowering.ops.expert_parallel_cost import divisors, exchange
from effpass.lowering.ops.expert_parallel_exchange import Ranks, ranks_of
from effpass.lowering.ops.expert_parallel_routes import summarize
from effpass.lowering.ops.expert_parallel_simulator import simulate
from effpass.lowering.ops.moe_ffn_cost import Shape
from effpass.lowering.ops.moe_ffn_fit import random_layer

AREA = "moe"
GATE = ("silu", 1.0, 0.0, 0.0, False)
TOKENS = (1024, 2048, 4096, 8192)  # of a rank
TINY = Shape(2, 8, 64, 96)
MOST_STAGES = 10  # that are timed
RUNS, CALLS = 7, 4


def start(device: str, area: str = AREA) -> Ranks | None:
    """The ranks that torchrun started, each on its own device; None, and a line that says so, in one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        print(f"skipped: start it with torchrun --nproc-per-node N -m benchmarks {area} ...")
        return None
    if not dist.is_initialized():
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return ranks_of(dist.group.WORLD.group_name)  # type: ignore[union-attr]


def place(device: str) -> torch.device:
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def seconds(call: Callable[[], object], ranks: Ranks, device: str) -> float:
    """Of one call, on the slowest rank."""
    runs, calls = (RUNS, CALLS) if device == "cuda" else (2, 1)
    call()
    taken = []
    for _ in range(runs):
        sync(device)
        dist.barrier(ranks.group)
        sync(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        sync(device)
        taken.append((time.perf_counter() - started) / calls)
    return over_ranks(median(taken), ranks, device, dist.ReduceOp.MAX)


def over_ranks(value: float, ranks: Ranks, device: str, how: Any) -> float:
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, how, group=ranks.group)
    return float(found)


# -- one layer --------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A layer on one rank, and its load.

    Attributes:
        shape: all E experts.
        ranks: that share them.
        gate_up: of its own experts [L, 2 F, D].
        down: likewise [L, D, F].
        cut: of all experts its part of F, for TP + TP.
        x: its tokens [T, D].
        ids: [T, k].
        weights: [T, k].
    """

    shape: Shape
    ranks: Ranks
    gate_up: Tensor
    down: Tensor
    cut: tuple[Tensor, Tensor]
    x: Tensor
    ids: Tensor
    weights: Tensor

    def ours(self, stages: int = 0) -> Tensor:
        tensors = (self.x, self.ids, self.weights, self.gate_up, None, self.down, None)
        return torch.ops.effpass.expert_parallel(*tensors, *GATE, False, stages, self.ranks.name)

    def by(self, kernel: str, stages: int) -> Tensor:
        """With one kernel whatever the load."""
        with patch.object(expert_parallel, "kernel_of", lambda *load: kernel):
            return self.ours(stages)

    @cached_property
    def everybody(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of all ranks, which all have under TP + TP."""
        return tuple(map(self.ranks.gather, (self.x, self.ids, self.weights)))  # type: ignore[return-value]

    def tensor_parallel(self) -> Tensor:
        gate_up, down = self.cut
        return self.ranks.sum(torch.ops.effpass.moe_ffn(*self.everybody, gate_up, None, down, None, *GATE, False)[0])

    @cached_property
    def grouped(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return grouped_experts(self.gate_up, self.down)

    def pairs(self) -> Tensor:
        return exchange_pairs(self.x, self.ids, self.weights, self.grouped, self.shape.experts, self.ranks)

    @cached_property
    def counts(self) -> np.ndarray:
        """[W, 3, W, L], as the ranks tell each other."""
        local = self.down.shape[0]
        found, _ = self.ranks.counts(summarize(self.ids, self.ranks.size, local).counts, (0,))
        return found.reshape(self.ranks.size, 3, self.ranks.size, local)

    @property
    def most(self) -> float:
        """Tokens of a rank with the load of the fullest one."""
        return float(self.counts[:, 2].sum((0, 2)).max() / self.shape.each)


def make(shape: Shape, ranks: Ranks, device: str, dtype: torch.dtype) -> Layer:
    """The same layer on all ranks, each with its parts; without tokens."""
    torch.manual_seed(0)
    with torch.inference_mode():
        gate_up, down = random_layer(shape, place(device), dtype)
        mine = slice(ranks.me * shape.experts // ranks.size, (ranks.me + 1) * shape.experts // ranks.size)
        part = slice(ranks.me * shape.inner // ranks.size, (ranks.me + 1) * shape.inner // ranks.size)
        gate, up = gate_up.chunk(2, 1)
        cut = torch.cat((gate[:, part], up[:, part]), 1), down[:, :, part].contiguous()
        own = gate_up[mine].clone(), down[mine].clone()
    nothing = own[0].new_empty(0)
    return Layer(shape, ranks, *own, cut, nothing, nothing, nothing)


def load(layer: Layer, tokens: int, skewed: bool, device: str) -> Layer:
    """The layer with a load; skewed: the expert at place n of an order that all ranks share is 1 / n as likely."""
    shape = layer.shape
    torch.manual_seed(tokens)
    order = torch.rand(shape.experts, device=device).argsort()
    torch.manual_seed(tokens + 1 + layer.ranks.me)
    scores = -torch.empty(tokens, shape.experts, device=device).exponential_().log()
    if skewed:
        scores = scores - (order + 1).log()
    x = torch.randn(tokens, shape.width, device=device, dtype=layer.down.dtype)
    weights = torch.rand(tokens, shape.each, device=device).softmax(-1)
    ids = scores.topk(shape.each, dim=-1).indices
    return Layer(shape, layer.ranks, layer.gate_up, layer.down, layer.cut, x, ids, weights)


def layers(name: str, shape: Shape, device: str, smoke: bool) -> Iterator[Row]:
    """Every load of one layer."""
    ranks = start(device)
    if ranks is None:
        return
    small = smoke or device == "cpu"
    layer = make(TINY if small else shape, ranks, device, torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.inference_mode():
        known = agreed(ranks, place(device), torch.bfloat16) if device == "cuda" else None
        rows = [] if known is None else [_link(known, ranks, device)]
        for tokens in (32,) if small else _tokens():
            for routing in ("even", "skewed"):
                loaded = load(layer, tokens, routing == "skewed", device)
                case = f"{name} on {ranks.size} ranks, {tokens} tokens each, {routing}"
                rows += _cell(case, loaded, known, device)
                if ranks.me == 0:
                    yield from rows
                rows = []


def _tokens() -> tuple[int, ...]:
    return tuple(int(n) for n in os.environ.get("EFFPASS_TOKENS", ",".join(map(str, TOKENS))).split(","))


def _link(known: Agreed, ranks: Ranks, device: str) -> Row:
    return row(
        AREA, f"link between {ranks.size} ranks", "all-to-all, sent by each rank to others", known.link.rate / 1e9,
        "GB/s", device=device, note=str(known.link),
    )  # fmt: skip


def _cell(case: str, layer: Layer, known: Agreed | None, device: str) -> list[Row]:
    ranks, kept = layer.ranks, layer.down.shape[0]
    tried = [n for n in divisors(kept) if n <= MOST_STAGES]
    times = {n: seconds(lambda n=n: layer.ours(n), ranks, device) for n in tried}  # type: ignore[misc]
    ours = seconds(layer.ours, ranks, device)
    chosen = stages_of(layer.most, layer.shape, ranks, False, place(device), layer.x.dtype)
    if chosen not in times:
        times[chosen] = seconds(lambda: layer.ours(chosen), ranks, device)
    by_stages = ", ".join(f"{n}: {t * 1e6:.0f} us" for n, t in sorted(times.items()))
    common: dict[str, Any] = {"device": device, "runs": RUNS}
    bound = None if known is None else _bound(layer, known, device) * 1e6
    fullest = layer.most / (layer.counts[:, 2].sum() / layer.shape.each / ranks.size)

    rows = []
    mine = layer.ours().float()
    begin = ranks.me * mine.shape[0]
    for peer, call, place_of in (
        ("TP + TP", layer.tensor_parallel, slice(begin, begin + mine.shape[0])),
        ("DP + EP, all-to-all of pairs, transformers grouped_mm", layer.pairs, slice(None)),
    ):
        difference = float((call()[place_of].float() - mine).abs().max() / mine.abs().max())
        worst = over_ranks(difference, ranks, device, dist.ReduceOp.MAX)
        rows.append(row(
            AREA, case, "layer of experts", ours * 1e6, "us", peer=seconds(call, ranks, device) * 1e6, peer_name=peer,
            bound=bound, note=f"{chosen} stages; fullest rank {fullest:.2f} of the mean; outputs differ by {worst:.1e}",
            **common,
        ))  # fmt: skip
    rows.append(row(
        AREA, case, "overlap alone", times[chosen] * 1e6, "us", peer=times[1] * 1e6,
        peer_name="one stage, same kernels", note=f"{chosen} stages", **common,
    ))  # fmt: skip
    rows.append(row(
        AREA, case, "lost by the choice of stages", (times[chosen] / min(times.values()) - 1) * 100, "%",
        note=f"chosen {chosen}; {by_stages}", **common,
    ))  # fmt: skip
    if known is not None:
        plain = seconds(lambda: layer.by("library", 1), ranks, device)
        rows.append(row(
            AREA, case, "choice of kernels alone, one stage", times[1] * 1e6, "us", peer=plain * 1e6,
            peer_name="the library's grouped product for all", **common,
        ))  # fmt: skip
        rows.append(row(
            AREA, case, "time on the link during which experts are computed",
            over_ranks(hidden(lambda: layer.ours(chosen)), ranks, device, dist.ReduceOp.MIN) * 100, "%",
            note=f"{chosen} stages, the rank with least; from a trace, in which waiting for other ranks is time on the"
            " link", **common,
        ))  # fmt: skip
        for n in sorted({1, chosen}):
            simulated = simulate(layer.counts, layer.shape, n, known.link, known.fit)
            rows.append(row(
                AREA, case, f"simulated time, of that measured, {n} stages", simulated.seconds / times[n] * 100, "%",
                note=f"simulated {simulated.seconds * 1e6:.0f} us, measured {times[n] * 1e6:.0f} us", **common,
            ))  # fmt: skip
    return rows


def _bound(layer: Layer, known: Agreed, device: str) -> float:
    from benchmarks.moe import matmul_rate

    counts, size = layer.counts, layer.shape.width * layer.shape.inner
    pairs = counts[:, 2].sum(0)
    met = float((pairs > 0).sum(1).max())
    others = counts[:, 0].sum(-1) * (1 - np.eye(layer.ranks.size, dtype=int))
    travelling = float(max(others.sum(0).max(), others.sum(1).max()))
    reading = met * 3 * size * layer.shape.element_size / bandwidth(device)
    computing = float(pairs.sum(1).max()) * 6 * size / matmul_rate(device)
    carrying = 2 * (exchange(travelling, layer.shape, known.link) - known.link.start)
    return over_ranks(max(reading, computing, carrying), layer.ranks, device, dist.ReduceOp.MAX)


def hidden(call: Callable[[], object]) -> float:
    """The share of the time in which NCCL's kernels run that other kernels run in too."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    on_link: list[tuple[float, float]] = []
    working: list[tuple[float, float]] = []
    for event in trace.events():
        # Annotations stand on the device's time line too.
        if event.device_type != DeviceType.CUDA or event.name.startswith(("effpass::", "nccl:", "Mem")):
            continue
        span = (event.time_range.start, event.time_range.end)
        (on_link if event.name.startswith("nccl") else working).append(span)
    return shared(on_link, working)


def shared(these: list[tuple[float, float]], those: list[tuple[float, float]]) -> float:
    """The share of the time covered by `these` that `those` cover too."""
    whole, both = 0.0, 0.0
    merged = _union(those)
    for begin, end in _union(these):
        whole += end - begin
        both += sum(max(0.0, min(end, last) - max(begin, first)) for first, last in merged)
    return both / whole if whole else 0.0


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
