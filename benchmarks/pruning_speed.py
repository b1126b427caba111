"""Area `pruning`: decode steps and prompts of the whole model and of the pruned shape, on the decode engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

import effpass
from benchmarks.backend import _dtype, _free
from benchmarks.decode import NO_PASSES, PROMPT, _greedy
from benchmarks.rows import Row, measure, row
from benchmarks.shapes import head_dim, random_model
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.pruning.settings import Settings
from effpass.trainers.pruning.stages import state_problem

__all__ = ["decode", "prefill"]

AREA = "pruning"
KEEP = 0.7


def _shapes(device: str, smoke: bool) -> list[str]:
    if smoke or device == "cpu":
        return ["tiny"]
    return os.environ.get("EFFPASS_SHAPES", "smollm2-135m,llama-3.1-8b").split(",")


def _pruned_sizes(shape: str, keep: float) -> tuple[dict[str, int], str]:
    """Config of the shape that keeps the same share of every kind of unit, and how rows call it."""
    with torch.device("meta"):
        whole: Any = random_model(shape, "meta", torch.bfloat16)
    config = whole.config
    problem = state_problem(whole, Settings(OptimizerConfig(lr=1e-4), keep=keep))
    sizes = problem.even(Settings(OptimizerConfig(lr=1e-4), keep=keep))
    groups, channels = sizes["kv_groups"], sizes["ffn_channels"]
    share = problem.cost.share(problem.shapes.share(sizes))
    own = config.num_attention_heads // config.num_key_value_heads
    changes = {"num_key_value_heads": groups, "num_attention_heads": groups * own, "head_dim": head_dim(config),
               "intermediate_size": channels}  # fmt: skip
    return changes, f"{groups} of {config.num_key_value_heads} groups, {channels} channels, {share:.3f} of the layers"


def decode(device: str, smoke: bool) -> Iterator[Row]:
    """Tokens a second at batches of 1 and 32."""
    keep = 0.6 if _shapes(device, smoke) == ["tiny"] else KEEP
    for shape in _shapes(device, smoke):
        changes, told = _pruned_sizes(shape, keep)
        found: dict[tuple[bool, int], tuple[float, float]] = {}
        for is_pruned in (False, True):
            model = random_model(shape, device, _dtype(device), **(changes if is_pruned else {}))
            model = effpass.prepare(model, NO_PASSES)
            for rows in (1, 32):
                seconds, _, bound = _greedy(model, rows, smoke, device)
                found[is_pruned, rows] = seconds, bound
            del model
            _free(device)
        for rows in (1, 32):
            (whole, whole_bound), (pruned, pruned_bound) = found[False, rows], found[True, rows]
            case = f"{shape}, {_dtype(device)}, batch {rows}, prompt {PROMPT}, {told}".replace("torch.", "")
            yield row(
                AREA, case, "decoding, pruned", rows / pruned, "tokens/s", device=device, peer=rows / whole,
                peer_name="the whole model", lower_is_better=False, bound=rows / pruned_bound, runs=5,
                note=f"the bound's gain is {whole_bound / pruned_bound:.3f}",
            )  # fmt: skip
            gain, most = whole / pruned, whole_bound / pruned_bound
            yield row(
                AREA, case, "gain, as a share of the bound's", 100 * gain / most, "%", device=device, runs=5,
                note=f"{gain:.3f} of {most:.3f}; goal 90 %",
            )  # fmt: skip


def prefill(device: str, smoke: bool) -> Iterator[Row]:
    """The first token of a long prompt."""
    shape = _shapes(device, smoke)[-1]
    changes, told = _pruned_sizes(shape, 0.6 if shape == "tiny" else KEEP)
    length = 64 if shape == "tiny" else 8192
    seconds, flops = [], []
    for is_pruned in (False, True):
        model = random_model(
            shape, device, _dtype(device), **(changes if is_pruned else {}), max_position_embeddings=16384
        )
        flops.append(_prefill_flops(model, length))
        model = effpass.prepare(model, NO_PASSES)
        ids = torch.randint(5, model.config.vocab_size, (1, length), device=device)
        one = {"input_ids": ids, "max_new_tokens": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        timing = measure(lambda m=model, one=one: m.generate(**one), device, warmup=1, runs=1 if smoke else 5)
        seconds.append(timing.median)
        del model
        _free(device)
    (whole, pruned), gain = seconds, flops[0] / flops[1]
    case = f"{shape}, {_dtype(device)}, batch 1, prompt {length}, {told}".replace("torch.", "")
    yield row(
        AREA, case, "first token, pruned", pruned * 1e3, "ms", device=device, peer=whole * 1e3,
        peer_name="the whole model", runs=5,
        note=f"{whole / pruned:.3f} times as fast, {100 * whole / pruned / gain:.0f} % of {gain:.3f}, the FLOPs' gain",
    )  # fmt: skip


def _prefill_flops(model: Any, length: int) -> float:
    """Of the layers' products and causal attention; the head runs on one token."""
    config = model.config
    linears = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim(config) * length
    return 2 * length * (linears + attention)
