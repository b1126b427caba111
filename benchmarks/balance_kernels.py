"""Trainable sparse attention by itself: forward and backward at 32k to 128k tokens with 4096 keys a token.

Peers are flex_attention with the same blocks, whose mask is built beforehand, and full attention. What blocks cost
flex_attention depends on what tokens of one tile choose together, so that two kinds of input are measured: tokens that
choose alone (all random), and tiles of 128 whose tokens choose alike, which is the best that it can get. The ideal is
the pairs that were chosen at the speed of a large product in this run. No side is captured in graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.backend import _free
from benchmarks.rows import Row, Timing, measure, measure_pair, row
from effpass.lowering.ops.routed_attention import routed_attention  # noqa: F401  (registers the operators)

AREA = "balance"
_TILE = 128  # of flex_attention's queries
_DENSE = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
ops = torch.ops.effpass


@dataclass(frozen=True)
class Call:
    """One layer's attention over one sequence."""

    tokens: int
    heads: int = 32
    groups: int = 8
    size: int = 128
    block: int = 256
    budget: int = 4096
    alike: bool = False
    device: str = "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def name(self) -> str:
        how = "tiles of 128 choose alike" if self.alike else "tokens choose alone"
        return f"{self.heads}/{self.groups} x {self.size}, {self.tokens} tokens, blocks of {self.block}, {how}"

    @cached_property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [T, heads, size]."""
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(self.tokens, n, self.size, device=self.device, dtype=self.dtype)
            for n in (self.heads, self.groups, self.groups)
        )
        if self.alike:
            q = q[::_TILE].repeat_interleave(_TILE, 0)[: self.tokens]
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    @cached_property
    def d_out(self) -> Tensor:
        return torch.randn_like(self.leaves[0])

    @cached_property
    def ends(self) -> Tensor:
        return torch.tensor([0, self.tokens], dtype=torch.int32, device=self.device)

    def choose(self) -> Tensor:
        q, k, _ = (x.detach() for x in self.leaves)
        budget = torch.tensor(self.budget, dtype=torch.int32, device=self.device)
        return ops.route_blocks(q, k, self.ends, budget, self.block, self.budget, self.size**-0.5)[0]

    @cached_property
    def chosen(self) -> Tensor:
        return self.choose()

    def attend(self) -> Tensor:
        return ops.routed_attention(*self.leaves, self.ends, self.chosen, self.block, self.size**-0.5)[0]

    def pairs(self) -> int:
        """Scores of all heads."""
        t = torch.arange(self.tokens, device=self.device)
        read = (self.chosen >= 0).sum(2) * self.block - (self.block - 1 - t % self.block)  # its own in part
        return int(read.sum()) * (self.heads // self.groups)


def _flex(call: Call) -> Callable[[], Tensor]:
    """Compiled flex_attention over the same blocks: the union of a tile's, of which whole ones need no mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tokens, block = call.tokens, call.block
    tiles, blocks, repeat = -(-tokens // _TILE), -(-tokens // block), call.heads // call.groups
    is_chosen = torch.zeros((call.groups, tokens, blocks + 1), dtype=torch.bool, device=call.device)
    is_chosen.scatter_(2, torch.where(call.chosen < 0, blocks, call.chosen).long(), True)
    is_chosen = is_chosen[..., :blocks].contiguous()
    by_tile = is_chosen.view(call.groups, tiles, _TILE, blocks)
    is_whole = by_tile.all(2) & (
        torch.arange(1, blocks + 1, device=call.device) * block
        <= torch.arange(tiles, device=call.device)[:, None] * _TILE
    )
    is_torn = by_tile.any(2) & ~is_whole

    def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
        order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        heads = (x.repeat_interleave(repeat, 0)[None].contiguous() for x in (mask.sum(-1, dtype=torch.int32), order))
        return tuple(heads)  # type: ignore[return-value]

    mask = BlockMask.from_kv_blocks(
        *listed(is_torn), *listed(is_whole), BLOCK_SIZE=(_TILE, block), seq_lengths=(tokens, tokens),
        mask_mod=lambda b, h, q, k: is_chosen[h // repeat, q, k // block] & (q >= k),
    )  # fmt: skip
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(*_batched(call), block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _batched(call: Call) -> list[Tensor]:
    """[1, heads, T, size]."""
    return [x.transpose(0, 1)[None] for x in call.leaves]


def _dense(call: Call) -> Callable[[], Tensor]:
    return lambda: scaled_dot_product_attention(*_batched(call), is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _both(call: Call, forward: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(forward(), call.leaves, call.d_out)


def _peak(device: str) -> float:
    """Operations per second of a large product."""
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / measure(lambda: square @ square, device, warmup=2, runs=7).low


def kernel(tokens: int, alike: bool, device: str, smoke: bool) -> Iterator[Row]:
    """One length, one kind of input."""
    small = smoke or device == "cpu"
    call = Call(512, 4, 2, 32, 64, 256, alike, device) if small else Call(tokens, alike=alike)
    runs = 1 if small else 3 if tokens > 65536 else 5
    choice = measure(call.choose, device, warmup=1, runs=runs)
    if device != "cuda":
        both = measure(_both(call, call.attend), device, warmup=1, runs=runs)
        yield row(AREA, call.name, "attention, forward and backward", both.median * 1e3, "ms", device=device)
        return
    rate, pairs = _peak(device), call.pairs()
    flex = _flex(call)
    with torch.no_grad():
        difference = float((flex() - call.attend()).abs().max())
    torch.cuda.reset_peak_memory_stats()
    _both(call, call.attend)()
    memory = torch.cuda.max_memory_allocated() / 1e9
    found: dict[str, Timing] = {}
    for what, flops, ours, peer in (
        ("forward", 4, call.attend, flex),
        ("forward and backward", 14, _both(call, call.attend), _both(call, flex)),
    ):
        with torch.set_grad_enabled(what != "forward"):
            found[what], theirs = measure_pair(ours, peer, device, warmup=1, runs=runs)
        ideal = flops * pairs * call.size / rate
        yield row(
            AREA, call.name, f"attention, {what}", found[what].median * 1e3, "ms", device=device,
            peer=theirs.median * 1e3, peer_name="flex_attention, the same blocks", bound=ideal * 1e3, runs=runs,
            note=f"{ideal / found[what].median:.0%} of the ideal; outputs differ by {difference:.1g}; "
            f"{memory:.1f} GB at the most",
        )  # fmt: skip
    yield row(AREA, call.name, "choice of blocks", choice.median * 1e3, "ms", device=device, runs=runs)
    del flex
    total = choice.median + found["forward and backward"].median
    for name, backend in _DENSE.items():
        try:
            with sdpa_kernel([backend]):
                dense = measure(_both(call, _dense(call)), device, warmup=1, runs=3)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        yield row(AREA, call.name, "choice and attention, forward and backward", total * 1e3, "ms", device=device,
                  peer=dense.median * 1e3, peer_name=f"full: {name}", runs=3)  # fmt: skip
    _free(device)


def parts(device: str, smoke: bool) -> Iterator[Row]:
    """What each kernel takes, at 64k."""
    if device != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    for call in (Call(65536), Call(65536, block=128)):
        run = _both(call, lambda call=call: (call.choose(), call.attend())[1])
        run()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            run()
            torch.cuda.synchronize()
        for event in profiled.key_averages():
            milliseconds = event.self_device_time_total / 1e3
            if milliseconds > 0.05:
                yield row(AREA, call.name, f"kernel {event.key[:60]}", milliseconds, "ms", device=device,
                          note=f"{event.count} launches")  # fmt: skip
        _free(device)


def tilings(device: str, smoke: bool) -> Iterator[Row]:
    """The same kernels by other tilings than those that are used, the peer of each, at 32k."""
    if device != "cuda":
        return
    from effpass.lowering.kernels import routed_attention as kernels
    from effpass.lowering.kernels import routed_gradient
    from effpass.lowering.kernels.routed_rows import Sizes, Tiling, tiling

    call = Call(32768)
    q, k, v = (x.detach() for x in call.leaves)
    inputs = (q, k, v, call.ends, call.chosen, call.block, call.size**-0.5)
    out, logsumexp = kernels.forward(*inputs)
    sizes = Sizes.of(q, k, v, call.block)
    saved = (call.d_out, out, logsumexp, *inputs)
    runs: dict[str, Callable[[Tiling | None], Any]] = {
        "forward": lambda how: kernels.forward(*inputs, how),
        "query": lambda how: routed_gradient.backward(*saved, how, None),
        "key": lambda how: routed_gradient.backward(*saved, None, how),
    }
    others = {
        "forward": [(128, 128, 8, 2, 2), (128, 64, 8, 3, 2), (64, 64, 4, 2, 2), (64, 64, 4, 3, 4)],
        "query": [(64, 128, 8, 2, 2), (128, 64, 8, 1, 4), (64, 64, 4, 2, 2)],
        "key": [(64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3)],
    }
    for name, run in runs.items():
        used = tiling(name, sizes, q.element_size(), q.device)
        ours = measure(lambda run=run: run(None), device, warmup=1, runs=5)
        for how in (Tiling(*sizes) for sizes in others[name]):
            try:
                peer = measure(lambda run=run, how=how: run(how), device, warmup=1, runs=3)
            except RuntimeError as error:  # it does not fit
                print(f"{how}: {str(error).splitlines()[0]}")
                continue
            yield row(AREA, call.name, f"{name}, {tuple(used)}", ours.median * 1e3, "ms", device=device,
                      peer=peer.median * 1e3, peer_name=f"{tuple(how)}", runs=3)  # fmt: skip


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    f"kernel-{tokens >> 10}k{'-alike' if alike else ''}": partial(kernel, tokens, alike)
    for tokens in (32768, 65536, 131072)
    for alike in (False, True)
}
CASES |= {"kernel-parts": parts, "kernel-tilings": tilings}
