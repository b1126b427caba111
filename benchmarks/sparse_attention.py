"""Area `sparse_attention`: one layer's attention in a decode step, and of a prompt, sparse against dense.

A step is timed in a CUDA graph over several layers' caches in turn, so that no cache of the device holds what the next
call reads; keeping up the index and choosing are part of it, and shown apart. The dense peer is the fastest that is
there, and counts only where it reads keys and values at 80 % of the bandwidth that a read-only kernel reaches in this
run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.backend import _free
from benchmarks.kv_offload_steps import SPARSE, small_operators, throughput
from benchmarks.rows import Row, bandwidth, measure, row
from benchmarks.sparse_attention_layers import GQA, MLA, TINY, Layers, Shape
from benchmarks.sparse_attention_quality import retention, retention_variants
from benchmarks.sparse_attention_variants import variants_gqa, variants_mla
from effpass.lowering.ops.block_sparse_attention import BlockSelection
from effpass.lowering.ops.two_level_attention_index import Selection

AREA = "sparse_attention"
# Name, levels, and the size of a block; the first level keeps as many keys in blocks of any size.
WAYS = (
    ("two levels", "both", 64), ("two levels, blocks of 32", "both", 32), ("two levels, blocks of 16", "both", 16),
    ("blocks only", "blocks", 64), ("tokens only", "tokens", 64),
)  # fmt: skip
FIRST_LEVEL = 8192


def _lengths(device: str, smoke: bool) -> list[int]:
    return [512] if smoke or device == "cpu" else [49152, 65536, 98304]


def _kernel_seconds(step: Callable[[], None], layers: int) -> dict[str, float]:
    """What each kernel of a step takes by itself, a layer."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    found = ((e.key, e.self_device_time_total / 1e6 / (3 * layers)) for e in profiled.key_averages())
    return {name: seconds for name, seconds in found if seconds > 0}


def decode(shape: Shape, device: str, smoke: bool) -> Iterator[Row]:
    small = smoke or device == "cpu"
    shape = TINY[shape] if small else shape
    tokens = 64 if small else 2048
    for length in _lengths(device, smoke):
        for batch in (1, 8):
            layers = Layers(shape, batch, length, device)
            case, element = f"{shape.name}, {length} tokens, batch {batch}", 2 if device == "cuda" else 4
            rate = bandwidth(device)
            read = shape.bytes(Selection(), length, element)[0] * batch
            dense = {}
            for name, step in layers.dense().items():
                try:
                    dense[name] = layers.seconds(step, smoke)
                except RuntimeError as error:
                    print(f"{name}: {str(error).splitlines()[0]}")
            peer = min(dense, key=dense.__getitem__)
            counts = read / rate / dense[peer] >= 0.8
            for name, seconds in dense.items():
                yield row(AREA, case, f"full: {name}", seconds * 1e6, "us", device=device, bound=read / rate * 1e6,
                          runs=9, note=f"{read / rate / seconds:.0%} of the bandwidth")  # fmt: skip
            for what, levels, size in WAYS:
                size, kept = (max(16, size // 4), 128) if small else (size, FIRST_LEVEL)
                how = Selection(tokens=tokens, blocks=kept // size, block=size, levels=levels)
                step = layers.sparse(how)
                seconds = layers.seconds(step, smoke)
                moved = shape.bytes(how, length, element)[1] * batch
                note = f"dense reads at {read / rate / dense[peer]:.0%} of the bandwidth"
                if not counts:
                    note += f", and does not count: {dense[peer] / seconds:.2f} x"
                yield row(
                    AREA, case, f"{what}, {tokens} tokens", seconds * 1e6, "us", device=device,
                    peer=dense[peer] * 1e6 if counts else None, peer_name=f"full: {peer}", bound=moved / rate * 1e6,
                    runs=9, note=note,
                )  # fmt: skip
                if device == "cuda" and what == WAYS[0][0]:
                    with torch.inference_mode():
                        parts = _kernel_seconds(step, len(layers.caches))
                    of_index = sum(value for name, value in parts.items() if name in ("_score", "_choose"))
                    told = ", ".join(f"{name} {value * 1e6:.1f}" for name, value in parts.items())
                    yield row(AREA, case, "two levels: index and choice of blocks", of_index * 1e6, "us", device=device,
                              runs=3, note=f"kernels one by one: {told}")  # fmt: skip
            del layers, step
            _free(device)


def decode_gqa(device: str, smoke: bool) -> Iterator[Row]:
    """A step of grouped-query attention."""
    yield from decode(GQA, device, smoke)


def decode_mla(device: str, smoke: bool) -> Iterator[Row]:
    """A step over latents, absorbed."""
    yield from decode(MLA, device, smoke)


def break_even(device: str, smoke: bool) -> Iterator[Row]:
    """From what length on two levels are faster than dense attention, between measured ones."""
    if device != "cuda":
        return
    for shape in (GQA, MLA):
        for batch in (1, 8):
            before: tuple[int, float] | None = None
            crossing, told = None, []
            for length in (4096, 8192, 16384, 32768, 65536):
                layers = Layers(shape, batch, length, device)
                dense = min(layers.seconds(step, smoke) for step in list(layers.dense().values())[:2])
                gain = dense - layers.seconds(layers.sparse(Selection()), smoke)
                told.append(f"{length}: {gain * 1e6:+.1f} us")
                if gain > 0 and crossing is None:
                    crossing = float(length)
                    if before is not None:
                        share = -before[1] / (gain - before[1])
                        crossing = before[0] + share * (length - before[0])
                before = (length, gain)
                del layers
                _free(device)
            if crossing is not None:
                yield row(AREA, f"{shape.name}, batch {batch}", "break-even length", crossing, "tokens", device=device,
                          runs=9, note="gain at " + ", ".join(told))  # fmt: skip


def _prompt(device: str, small: bool) -> tuple[int, int, int, int, Tensor, Tensor, Tensor, Tensor, BlockSelection]:
    """Length, query heads, key-value heads, head size, then q, k, v, positions, and what is chosen."""
    length, heads, groups, size = (1024, 4, 2, 32) if small else (65536, 32, 8, 128)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(1, n, length, size, device=device, dtype=dtype) for n in (heads, groups, groups))
    positions = torch.arange(length, dtype=torch.int32, device=device)[None]
    return length, heads, groups, size, q, k, v, positions, BlockSelection(0.12)


def prefill(device: str, smoke: bool) -> Iterator[Row]:
    """A prompt over 12 % of its blocks, and flex_attention over the same."""
    small = smoke or device == "cpu"
    length, heads, groups, size, q, k, v, positions, how = _prompt(device, small)
    chosen = (q, k, positions, positions, size**-0.5, how.block_q, how.block_k, how.sink, how.recent, how.density,
              how.threshold, how.places(length))  # fmt: skip
    ops = torch.ops.effpass
    choice = measure(lambda: ops.choose_key_blocks(*chosen), device, warmup=1, runs=1 if small else 5)
    lists, counts = ops.choose_key_blocks(*chosen)
    arguments = (q, k, v, positions, positions, lists, counts, size**-0.5, 0.0, how.block_q, how.block_k)
    ours = measure(lambda: ops.block_sparse_attention(*arguments), device, warmup=2, runs=1 if small else 7)
    pairs = int(counts[..., 1].sum()) * (heads // groups) * how.block_q * how.block_k
    seen = heads * (length // how.block_q) * (length // how.block_k + 1) / 2 * how.block_q * how.block_k
    case = f"{heads}/{groups} x {size}, {length} tokens, {pairs / seen:.0%} of the blocks"
    if device != "cuda":
        yield row(AREA, case, "prompt, attention", ours.median * 1e3, "ms", device=device)
        return
    out = ops.block_sparse_attention(*arguments)
    flex, mask = _flex(lists, counts, heads // groups, length, how)
    peer = measure(lambda: flex(q, k, v, mask), device, warmup=2, runs=7)
    difference = float((flex(q, k, v, mask).transpose(1, 2) - out).abs().max())
    square = torch.randn(8192, 8192, device=device, dtype=q.dtype)
    peak = 2 * 8192**3 / measure(lambda: square @ square, device, warmup=2, runs=7).low
    ideal = 4 * pairs * size / peak
    yield row(AREA, case, "prompt, attention", ours.median * 1e3, "ms", device=device, peer=peer.median * 1e3,
              peer_name="flex_attention, the same blocks", bound=ideal * 1e3, runs=7,
              note=f"{ideal / ours.median:.0%} of the ideal; outputs differ by {difference:.1g}")  # fmt: skip
    yield row(AREA, case, "prompt, choice of blocks", choice.median * 1e3, "ms", device=device, runs=5)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        dense = measure(
            lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), device,
            warmup=1, runs=3,
        )  # fmt: skip
    total = ours.median + choice.median
    yield row(AREA, case, "prompt, choice and attention", total * 1e3, "ms", device=device, peer=dense.median * 1e3,
              peer_name="full: SDPA cuDNN", runs=3)  # fmt: skip


def prefill_tilings(device: str, smoke: bool) -> Iterator[Row]:
    """The same attention by other tilings of the kernel than the one that is used, the peer of each."""
    if device != "cuda":
        return
    from effpass.lowering.kernels import block_sparse_attention as kernels

    length, heads, groups, size, q, k, v, positions, how = _prompt(device, False)
    lists, counts = torch.ops.effpass.choose_key_blocks(
        q, k, positions, positions, size**-0.5, how.block_q, how.block_k, how.sink, how.recent, how.density,
        how.threshold, how.places(length),
    )  # fmt: skip
    arguments = (q, k, v, positions, positions, lists, counts, size**-0.5, 0.0, how.block_q, how.block_k)
    used = kernels.tiling(size * q.element_size(), how.block_q, how.block_k)
    ours = measure(lambda: kernels.block_sparse_attention(*arguments, used), device, warmup=2, runs=7)
    others = [(128, 128, 8, 2), (128, 128, 8, 4), (128, 64, 8, 3), (128, 64, 8, 5), (64, 64, 4, 3), (64, 64, 4, 5)]
    tilings = [kernels.Tiling(*sizes, described) for sizes in others for described in (True, False)]
    for how_else in [used._replace(has_descriptors=False), *tilings]:
        try:
            peer = measure(lambda t=how_else: kernels.block_sparse_attention(*arguments, t), device, warmup=2, runs=5)
        except RuntimeError as error:  # it does not fit
            print(f"{how_else}: {str(error).splitlines()[0]}")
            continue
        case = f"{heads}/{groups} x {size}, {length} tokens"
        yield row(AREA, case, f"prompt, {tuple(used)}", ours.median * 1e3, "ms", device=device,
                  peer=peer.median * 1e3, peer_name=f"{tuple(how_else)}", runs=5)  # fmt: skip


def end_to_end(device: str, smoke: bool) -> Iterator[Row]:
    """Decode steps of a model of Qwen3-8B's shape, sparse with all keys on the device, against full attention."""
    for length in (49152, 98304):
        yield from throughput(AREA, "qwen3-8b", length, [SPARSE], device, smoke)
        _free(device)


def end_to_end_mla(device: str, smoke: bool) -> Iterator[Row]:
    """The same of GLM-4.7-Flash's."""
    for length in (49152, 98304):
        yield from throughput(AREA, "glm-4.7-flash", length, [SPARSE], device, smoke)
        _free(device)


def _flex(lists: Tensor, counts: Tensor, repeat: int, length: int, how: BlockSelection) -> tuple[Any, Any]:
    """Compiled flex_attention and a mask of the same blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = -(-length // how.block_k)
    place = torch.arange(lists.shape[-1], device=lists.device)
    whole, end = counts[..., :1], counts[..., 1:]
    torn = lists.gather(-1, (place + whole).clamp(max=lists.shape[-1] - 1).long())

    def padded(x: Tensor, count: Tensor) -> Tensor:
        kept = torch.where(place < count, x, 0)
        return torch.nn.functional.pad(kept, (0, blocks - x.shape[-1])).repeat_interleave(repeat, 1)

    def of_heads(count: Tensor) -> Tensor:
        return count[..., 0].contiguous().repeat_interleave(repeat, 1)

    options: dict[str, Any] = {"BLOCK_SIZE": (how.block_q, how.block_k), "seq_lengths": (length, length)}
    if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters:
        options["compute_q_blocks"] = False
    mask = BlockMask.from_kv_blocks(
        of_heads(end - whole), padded(torn, end - whole), of_heads(whole), padded(lists, whole),
        mask_mod=lambda b, h, q, k: q >= k, **options,
    )  # fmt: skip
    compiled = torch.compile(flex_attention)
    return lambda q, k, v, m: compiled(q, k, v, block_mask=m, enable_gqa=True), mask


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "decode_gqa": decode_gqa,
    "decode_mla": decode_mla,
    "variants_gqa": variants_gqa,
    "variants_mla": variants_mla,
    "break_even": break_even,
    "prefill": prefill,
    "prefill_tilings": prefill_tilings,
    "end_to_end": end_to_end,
    "end_to_end_mla": end_to_end_mla,
    "small_operators": small_operators,
    "retention": retention,
    "retention_variants": retention_variants,
}
