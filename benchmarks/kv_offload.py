"""Area `kv_offload`: keys and values in host memory: the bus, the pool's hit rates, and what a decode step takes.

`gather` measures the kernel that copies blocks, and attention that reads keys through the bus. `hits` records which
keys decoding chooses in trained models over text, and runs the pool's own operator over that: hit rates are those of
the product. The steps (:mod:`benchmarks.kv_offload_steps`) then miss as often as that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kv_offload_steps
from benchmarks.quality import MODELS, _tiny
from benchmarks.rows import Row, measure_pair, row
from effpass.lowering.ops.block_pool import COUNTED, BlockPool
from effpass.lowering.ops.two_level_attention import attend
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection
from effpass.runtime.attention import reading_cache
from effpass.runtime.host_memory import HostMemory
from effpass.runtime.session import Session

AREA = "kv_offload"
_WARM = 32  # steps that fill the pool and are not counted


# -- the bus ----------------------------------------------------------------------------------------------------------


def gather(device: str, smoke: bool) -> Iterator[Row]:
    """Blocks from anywhere in pinned host memory into pages, against one large copy of as many bytes."""
    if device != "cuda":
        return
    from effpass.lowering.kernels.block_pool import copy_blocks

    dtype, most = torch.bfloat16, 4096
    for name, groups, width in (("32 KiB", 8, 256), ("72 KiB", 1, 576)):
        blocks = 2 * most // groups
        slab = HostMemory().take((1, groups, blocks, 64, width), dtype, torch.device(device))
        slab.tensor.normal_()
        pages = torch.zeros(most, 64, width, dtype=dtype, device=device)
        for count in (16, 64, 256, 1024, most):
            of_head = count // groups
            chosen = torch.stack([torch.randperm(blocks)[:of_head] for _ in range(groups)])
            places = torch.randperm(most)[:count].view(groups, of_head)
            moves = torch.stack((chosen, places), -1)[None].to(device, torch.int32)
            moved = torch.full((1, groups), of_head, dtype=torch.int32, device=device)
            flat, near = slab.tensor.view(-1)[: count * 64 * width], pages.view(-1)[: count * 64 * width]
            repeats = max(1, 1024 // count)

            def ours(moves: Tensor = moves, moved: Tensor = moved, slab: Any = slab, pages: Tensor = pages) -> None:
                copy_blocks(slab.seen, pages, moves, moved)

            def peer(near: Tensor = near, flat: Tensor = flat) -> None:
                near.copy_(flat, non_blocking=True)

            graphs = _graph(ours, repeats), _graph(peer, repeats)
            a, b = measure_pair(graphs[0].replay, graphs[1].replay, device, warmup=2, runs=9)
            moved_bytes = repeats * flat.nbytes
            yield row(
                AREA, f"{count} blocks of {name} in random order", "host to device", moved_bytes / a.median / 1e9,
                "GB/s", device=device, peer=moved_bytes / b.median / 1e9, peer_name="one cudaMemcpyAsync of all bytes",
                lower_is_better=False, runs=9, note=f"{a.median / repeats * 1e6:.1f} us; both in CUDA graphs",
            )  # fmt: skip
        yield from _through_the_bus(slab.seen, groups, device)
        del slab


def _graph(step: Callable[[], None], repeats: int) -> torch.cuda.CUDAGraph:
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            step()
    return graph


def _through_the_bus(host: Tensor, groups: int, device: str) -> Iterator[Row]:
    """Attention of a step whose keys have no page at all, and of one whose keys all have."""
    latent = groups == 1
    shape = (1, 20 if latent else 32, 1, 576 if latent else 128)
    value_size, of_label = (512, 128) if latent else (128, 32)
    slots = host.shape[2] * 64
    how = Selection()
    channels = torch.stack([torch.randperm(shape[3])[:of_label] for _ in range(groups)]).to(device, torch.int32)
    index = KeyIndex.empty(how, channels, 1, slots, shape[3], host.dtype)
    positions = torch.arange(slots, dtype=torch.int32, device=device)[None]
    filled = torch.tensor([slots], dtype=torch.int32, device=device)
    index.add(host.flatten(2, 3)[..., : shape[3]], positions, torch.zeros_like(filled), filled, slots)
    query = torch.randn(shape, dtype=host.dtype, device=device)
    pool = BlockPool.empty(host, how.kept_blocks + 1, how.kept_blocks, how.kept_blocks)
    pages = pool.cached(shape[3], value_size)

    def step() -> None:
        attend(index, query, *pages, positions, positions[:, -1:], filled, 0.1, 0.0, pool.block_table, pool.host)

    with torch.inference_mode():
        step()
        chosen = index.chosen_blocks.clone()
        missing = _graph(step, 8)
        far, _ = measure_pair(missing.replay, None, device, warmup=2, runs=9)
        pool.fetch(chosen, filled, how.block)
        torch.cuda.synchronize()
        near, _ = measure_pair(_graph(step, 8).replay, None, device, warmup=2, runs=9)
    read = groups * how.tokens * host.shape[-1] * host.element_size()
    more = (far.median - near.median) / 8
    what = "latents of 576" if latent else f"{groups} heads of 128"
    yield row(
        AREA, f"{what}, 2048 keys of each", "attention with all keys in host memory", far.median / 8 * 1e6, "us",
        device=device, peer=near.median / 8 * 1e6, peer_name="all keys in pages", runs=9,
        note=f"{read / 1e6:.1f} MB come through the bus at {read / more / 1e9:.1f} GB/s",
    )  # fmt: skip


# -- hit rates --------------------------------------------------------------------------------------------------------


def _trained(smoke: bool, device: str) -> Iterator[tuple[str, Any, Any, int, list[Selection]]]:
    """Name, model, tokenizer, prompt, and what is chosen: shares of the context as in one of 96k and a third of it."""
    if smoke:
        model, tokenizer, name = _tiny(device)
        yield name, model, tokenizer, 300, [Selection(tokens=32, blocks=4, block=16, recent=1)]
        return
    import effpass

    few, many = Selection(tokens=128, blocks=8), Selection(tokens=512, blocks=32)
    for name in os.environ.get("EFFPASS_MODEL", "tiny-long,smollm2").split(","):
        loaded = effpass.load_model("smollm2" if name == "smollm2" else MODELS / name)
        model = loaded.model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        prompt = min(model.config.max_position_embeddings * 3 // 4, 24576 if device == "cuda" else 12288)
        yield name, model, loaded.tokenizer, prompt, [few, many]


def _text(smoke: bool) -> str:
    if smoke:
        return "All the world's a stage, and all the men and women merely players. " * 40
    place = os.environ.get("EFFPASS_DATA")
    if place is None:
        raise SystemExit("kv_offload: set EFFPASS_DATA (or --data) to the folder that holds wikitext-2/valid.txt")
    return (Path(place) / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")


def choices(model: Any, ids: Tensor, prompt: int, how: Selection) -> Iterator[Tensor]:
    """The keys that steps choose, int32 `[L, G, k]`; the text itself goes on behind the prompt."""
    import effpass

    options = {"tokens": how.tokens, "blocks": how.blocks, "block": how.block, "recent": how.recent, "dense_below": 1}
    ready = effpass.prepare(model, {"version": 1, "passes": [{"sparse_attention": options}]})
    with torch.no_grad(), reading_cache(ready):
        session = Session(ready, 1, ids.shape[1], None)
        session.begin(1)
        session.prefill(ids[:, :prompt], None, 4096)
        for at in range(prompt, ids.shape[1]):
            session.tokens.copy_(ids[:, at : at + 1])
            session.step()
            reader: Any = session.cache.reader
            yield torch.cat([state.index.chosen_tokens for state in reader.layers.values()])


def hits(device: str, smoke: bool) -> Iterator[Row]:
    """Shares of blocks and keys that a step finds in pools of several sizes."""
    steps = 24 if smoke else 512 + _WARM
    warm = 8 if smoke else _WARM
    for name, model, tokenizer, prompt, selections in _trained(smoke, device):
        ids = torch.tensor([tokenizer(_text(smoke), add_special_tokens=False, verbose=False)["input_ids"]])
        ids = ids[:, : prompt + steps].to(device)
        for how in selections:
            trace = list(choices(model, ids, prompt, how))
            layers, groups, _ = trace[0].shape
            blocks = -(-ids.shape[1] // how.block)
            host = torch.zeros(layers, groups, blocks, how.block, 1, device=device)
            for times in (1.5, 2.0, 3.0, 4.0):
                slots = int(times * how.blocks)
                if slots >= blocks:
                    continue
                pool = BlockPool.empty(host, slots, how.blocks, 16)
                for at, chosen in enumerate(trace):
                    if at == warm:
                        pool.counts.zero_()
                    pool.fetch(chosen, torch.tensor([prompt + at + 1], dtype=torch.int32, device=device), 1)
                if device == "cuda":
                    torch.cuda.synchronize()
                found = dict(zip(COUNTED, pool.counts.sum((0, 1)).tolist(), strict=True))
                case = f"{name}, {prompt} tokens of text, {how.tokens} keys in {how.blocks} blocks of {how.block}"
                each = (len(trace) - warm) * layers * groups
                yield row(
                    AREA, case, f"blocks found in a pool of {times:g} times a step's",
                    100 - 100 * found["missing_blocks"] / found["blocks"], "%", device=device, runs=len(trace) - warm,
                    note=f"{100 - 100 * found['missing_tokens'] / found['tokens']:.2f} % of the keys; a step reads"
                    f" {found['blocks'] / each:.1f} blocks of a head, and {found['copied'] / each:.2f} are copied; the"
                    f" pool is {slots / blocks:.0%} of the context",
                )  # fmt: skip


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "gather": gather,
    "hits": hits,
    "step": kv_offload_steps.step,
    "qwen3_48k": kv_offload_steps.qwen3_48k,
    "qwen3_96k": kv_offload_steps.qwen3_96k,
    "glm_48k": kv_offload_steps.glm_48k,
    "glm_96k": kv_offload_steps.glm_96k,
}
