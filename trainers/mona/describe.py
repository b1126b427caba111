"""Table of the optimizer's choices, which :meth:`.optimizer.MONA.describe` returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from effpass.trainers.mona.groups import Choice
from effpass.trainers.mona.layout import Part

__all__ = ["describe"]


def describe(
    groups: list[dict[str, Any]],
    choices: Mapping[Tensor, Choice],
    parts: Mapping[Tensor, tuple[Part, ...]],
    dtypes: Callable[[Tensor], tuple[torch.dtype, torch.dtype]],
) -> str:
    """Return a table in which parameters whose names differ only in numbers share a line, and the size of the state.

    Args:
        groups: parameter groups of the optimizer.
        choices: choice of each parameter.
        parts: parts of each parameter that MONA optimizes.
        dtypes: function that returns the dtypes of momentum and acceleration of a parameter.
    """
    lines: dict[tuple[str, ...], int] = {}
    size = {"mona": 0, "adamw": 0}
    weights = 0
    by = "\u00d7"
    for group in groups:
        for parameter in group["params"]:
            choice = choices[parameter]
            name = re.sub(r"\b\d+\b", "*", choice.name)
            shape = by.join(map(str, parameter.shape))
            cut = " + ".join(by.join(map(str, part.matrices)) for part in parts.get(parameter, ()))
            key = (name, shape, choice.algorithm, cut, choice.reason)
            lines[key] = lines.get(key, 0) + 1
            weights += parameter.numel()
            if group["algorithm"] == "mona":
                momentum, extra = dtypes(parameter)
                buffers = 0 if group["alpha"] == 0 else 1 if group["form"] == "exact" else 2
                size["mona"] += parameter.numel() * (momentum.itemsize + buffers * extra.itemsize)
            else:
                size["adamw"] += 2 * parameter.numel() * parameter.element_size()
    table: list[tuple[str, ...]] = [("parameter", "count", "shape", "algorithm", "matrices", "because")]
    table += [(name, str(count), *rest) for (name, *rest), count in lines.items()]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    total = sum(size.values())
    text.append(
        f"{weights:,} parameters; state {total / 2**20:,.1f} MiB: "
        f"MONA {size['mona'] / 2**20:,.1f}, AdamW {size['adamw'] / 2**20:,.1f}"
    )
    return "\n".join(text)
