"""Stands in for the measured tolerance of an export."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effpass.lowering.targets.decode_graph import DecodeGraph
from effpass.lowering.targets.validation import DecodeCase, Recording, Tolerance, largest_value

__all__ = ["fixed_tolerance"]

# float32 as the checks of these tests want it; float16 rounds at 5e-4, bfloat16 at 4e-3
SHARES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def fixed_tolerance(graph: DecodeGraph, cases: Sequence[DecodeCase], rewritten: Sequence[Recording]) -> Tolerance:
    share = SHARES[graph.dtype]
    logits = tuple(share * largest_value([r.logits]) for r in rewritten)
    return Tolerance(logits, tuple(share * largest_value(r.cache) for r in rewritten), "fixed for this test")
