"""Area `sparse_attention`: a decode step's kernels, cut in other ways than the one that is used.

`ours` is the step as it is, the peer the same step with one of its launches cut otherwise, so that a ratio below 1 says
that the other way is faster. Both are timed in CUDA graphs, with the launches in front and behind. Where a shape leaves
nothing to choose, two ways are the same program, and their ratio shows what the figures are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.backend import _free
from benchmarks.rows import Row, row
from benchmarks.sparse_attention_layers import GQA, MLA, TINY, Layers, Shape
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection

__all__ = ["variants_gqa", "variants_mla"]

AREA = "sparse_attention"


def variants_gqa(device: str, smoke: bool) -> Iterator[Row]:
    """Ways to cut a step of grouped-query attention."""
    yield from _variants(GQA, device, smoke)


def variants_mla(device: str, smoke: bool) -> Iterator[Row]:
    """Ways to cut a step over latents, sparse and dense."""
    yield from _variants(MLA, device, smoke)


def _variants(shape: Shape, device: str, smoke: bool) -> Iterator[Row]:
    if device != "cuda":
        return
    how = Selection(tokens=64, blocks=8, block=16) if smoke else Selection()
    shape = TINY[shape] if smoke else shape
    for length in (512,) if smoke else (32768, 98304):
        for batch in (1, 8):
            layers = Layers(shape, batch, length, device)
            case = f"{shape.name}, {length} tokens, batch {batch}"
            yield from _sparse(layers, how, case, smoke)
            if shape.is_latent:
                yield from _dense(layers, case, smoke)
            del layers
            _free(device)


def _sparse(layers: Layers, how: Selection, case: str, smoke: bool) -> Iterator[Row]:
    indices = layers.indices(how)
    used, others = _tilings()
    before = layers.seconds(_step(layers, indices, used), smoke)
    chosen = _chosen(indices)
    fastest: dict[str, tuple[float, str]] = {}
    for launch, ways in others.items():
        for name, tiling in ways.items():
            found = _timed(layers, _step(layers, indices, tiling), f"{case}, {launch}, {name}", smoke)
            if found is None:
                continue
            differing = int((_chosen(indices) != chosen).any(-1).sum())
            fastest[launch] = min(fastest.get(launch, (before, "as it is")), (found, name))
            note = f"{differing} heads choose otherwise" if differing else ""
            yield row(AREA, case, f"two levels, {launch}", before * 1e6, "us", device=layers.device, peer=found * 1e6,
                      peer_name=name, runs=9, note=note)  # fmt: skip
    after = layers.seconds(_step(layers, indices, used), smoke)
    yield row(AREA, case, "two levels, as it is", before * 1e6, "us", device=layers.device, peer=after * 1e6,
              peer_name="the same again", runs=9,
              note="fastest: " + ", ".join(f"{launch}: {name}" for launch, (_, name) in fastest.items()))  # fmt: skip
    # Scores of keys of one length are distributed normally, which the search for the largest begins with.
    for keys, _ in layers.caches:
        keys.mul_(torch.randn(*keys.shape[:3], 1, device=layers.device).exp())
    found = layers.seconds(_step(layers, layers.indices(how), used), smoke)
    yield row(AREA, case, "two levels, as it is", before * 1e6, "us", device=layers.device, peer=found * 1e6,
              peer_name="keys of many lengths", runs=9)  # fmt: skip


def _tilings() -> tuple[Any, dict[str, dict[str, Any]]]:
    """How a step is cut, and other ways, by launch and name."""
    from effpass.lowering.kernels.chosen_attention import TILING, Programs

    def otherwise(**changes: Any) -> Any:
        return TILING._replace(**changes)

    return TILING, {
        "score": {f"{size} KiB of statistics": otherwise(scored=size << 10) for size in (8, 32, 64)}
        | {f"{count} warps a multiprocessor": otherwise(scoring=count) for count in (16, 64)}
        | {"as many programs as tiles": otherwise(scoring=1 << 16)},
        "choose": {
            "1 program of 16 warps": otherwise(choose=Programs(1, 16, 16)),
            "2 programs of 8 warps": otherwise(choose=Programs(2, 8, 8)),
            "3 programs of 8 warps": otherwise(choose=Programs(3, 8, 8)),
            "1 program of 32 warps": otherwise(choose=Programs(1, 32, 32)),
        },
        "attend": {
            "1 program of 16 warps": otherwise(attend=Programs(1, 16, 16)),
            "1 program of 8 warps": otherwise(attend=Programs(1, 8, 8)),
            "in tiles": otherwise(whole=0),
            "in tiles, 1 program of 8 warps": otherwise(whole=0, attend=Programs(1, 8, 8)),
            "tiles of 20 KiB": otherwise(whole=0, tile=20 << 10),
        },
    }


def _step(layers: Layers, indices: list[KeyIndex], tiling: Any) -> Callable[[], None]:
    from effpass.lowering.kernels.two_level_attention import two_level_attention

    def step() -> None:
        for index, query, (keys, values) in zip(indices, layers.queries, layers.caches, strict=True):
            how = index.selection
            two_level_attention(
                query, keys, values, None, None, layers.positions, layers.now, layers.filled, index.channels,
                index.statistics, index.seen, index.labels, index.ranges, index.scores, index.chosen_blocks,
                index.chosen_tokens, layers.scale, 0.0, how.block, how.sink, how.recent, how.statistic,
                how.aggregation, how.is_pipelined, tiling,
            )  # fmt: skip

    return step


def _chosen(indices: list[KeyIndex]) -> torch.Tensor:
    return torch.stack([index.chosen_tokens for index in indices])


def _dense(layers: Layers, case: str, smoke: bool) -> Iterator[Row]:
    """Dense attention over latents, by other tiles."""
    from effpass.lowering.kernels import latent_attention as kernels

    def step(tiling: Any) -> Callable[[], None]:
        def run() -> None:
            for query, (keys, values) in zip(layers.queries, layers.caches, strict=True):
                kernels.cached_attention(
                    query, keys, values, layers.positions, layers.now, layers.filled, layers.scale, 0, 0.0, tiling
                )

        return run

    ours = layers.seconds(step(kernels.TILING), smoke)
    for sizes in ((64, 8, 2), (32, 8, 4), (32, 8, 2, 2), (64, 4, 2, 1, False), (64, 8, 2, 1, False)):
        tiling = kernels.Tiling(*sizes)
        found = _timed(layers, step(tiling), f"{case}, dense, {tiling}", smoke)
        if found is not None:
            yield row(AREA, case, f"full, {tuple(kernels.TILING)}", ours * 1e6, "us", device=layers.device,
                      peer=found * 1e6, peer_name=f"{tuple(tiling)}", runs=9)  # fmt: skip


def _timed(layers: Layers, step: Callable[[], None], what: str, smoke: bool) -> float | None:
    try:
        return layers.seconds(step, smoke)
    except RuntimeError as error:  # it does not fit
        print(f"{what}: {str(error).splitlines()[0]}")
        return None
