"""The latency table of a model of 3 billion parameters (Qwen2.5-3B's sizes), measured without its 36 layers in memory:
models of 2 and of 6 layers tell what one more layer takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.balance_lengths import BUDGETS, DEFAULT, MOST
from effpass.core.roofline import device_name
from effpass.trainers.balance.measure import attention_seconds, grid, rest_seconds
from effpass.trainers.balance.table import LatencyTable

__all__ = ["BLOCK", "measured", "with_fixed_budget"]

BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model."""

    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    vocabulary: int


LARGE = Sizes(36, 2048, 11008, 16, 2, 151936)
TINY = Sizes(3, 64, 128, 4, 2, 128)


def with_fixed_budget(table: LatencyTable, device: str, smoke: bool) -> LatencyTable:
    """The table where budgets can't move: attention measured again with buffers for the default alone."""
    of, dtype = _of(device, smoke)
    size, budgets = of.width // of.heads, (DEFAULT if DEFAULT in table.budgets else table.budgets[0],)
    place = torch.device(device)
    attention = attention_seconds(of.heads, of.groups, size, size, table.lengths, budgets, BLOCK, place, dtype)
    return dataclasses.replace(table, budgets=budgets, attention=attention)


def _of(device: str, smoke: bool) -> tuple[Sizes, torch.dtype]:
    small = smoke or device == "cpu"
    return (TINY if small else LARGE), torch.float32 if device == "cpu" else torch.bfloat16


def measured(device: str, smoke: bool) -> LatencyTable:
    """Seconds of bfloat16 on a GPU; tiny sizes and float32 on a CPU."""
    of, dtype = _of(device, smoke)
    small, place = of is TINY, torch.device(device)
    lengths, budgets = (grid(1024), (512, 1024)) if small else (grid(MOST), BUDGETS)
    tokens = grid(256) if small else grid(8192)
    size = of.width // of.heads
    attention = attention_seconds(of.heads, of.groups, size, size, lengths, budgets, BLOCK, place, dtype)
    few, more = (rest_seconds(_model(of, n, place, dtype), tokens, place, dtype) for n in (2, 6))
    rest = [a + max(0.0, b - a) / 4 * (of.layers - 2) for a, b in zip(few, more, strict=True)]
    words = f"{of.layers} layers of {of.heads} query and {of.groups} key-value heads of {size}, blocks of {BLOCK}"
    return LatencyTable(
        "measured", device_name(place), str(dtype).removeprefix("torch."), torch.__version__, words, of.layers, lengths,
        tuple(budgets), attention, tokens, tuple(rest),
    )  # fmt: skip


def _model(of: Sizes, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=of.vocabulary, hidden_size=of.width, intermediate_size=of.inner, num_hidden_layers=layers,
        num_attention_heads=of.heads, num_key_value_heads=of.groups, max_position_embeddings=MOST, dtype=dtype,
        tie_word_embeddings=True,
    )  # fmt: skip
    with device:
        return Qwen2ForCausalLM(config).to(dtype).requires_grad_(True)
