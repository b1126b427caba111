"""How the router's weight is covered by few keys, in a model that was trained: what the simulator assumes, measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.balance_lengths import EXPONENT
from benchmarks.balance_lengths import coverage as assumed
from benchmarks.balance_quality import BLOCK, MODELS, _code, _load, _logits, _packed
from benchmarks.quality import _tiny
from benchmarks.rows import Row, row
from effpass.runtime.routed_attention import install

AREA = "balance"
SHARES = (0.0625, 0.125, 0.25, 0.5)


def coverage(device: str, smoke: bool) -> Iterator[Row]:
    """Of `tiny-long` over code, by the length of a document; mean and spread over layers."""
    model, _, name = _tiny(device) if smoke else _load(str(MODELS / "tiny-long"), device)
    block = 32 if smoke else BLOCK
    exponents = []
    routed = install(model, block=block, budget=8 * block)
    try:
        for length in (1024,) if smoke else (2048, 4096, 8192) if device == "cpu" else (2048, 4096, 8192, 16384, 32768):
            budgets = [int(length * part) for part in SHARES if length * part >= 2 * block]
            routed.watch(torch.tensor(budgets, device=device, dtype=torch.int32))
            curves = []
            for number in range(1 if smoke or device == "cpu" else 8):
                inputs, _ = _packed([_code(np.random.default_rng((7, number)), length)], device)
                with torch.no_grad():
                    _logits(model, inputs, device)
                assert routed.curves is not None
                curves.append(routed.curves.double().cpu().numpy())
            found = np.mean(curves, 0)  # layers, budgets
            for place, keys in enumerate(budgets):
                held = float(found[:, place].mean())
                exponents.append(math.log(held) / math.log(keys / length))
                guess = float(assumed(np.array([[float(length)]]), np.array([float(keys)]))[0, 0])
                yield row(
                    AREA, f"{name}, {length} tokens of code, blocks of {block}", f"coverage of {keys} keys", held,
                    "", device=device, peer=guess, peer_name=f"(k/s)^{EXPONENT}, as simulated", runs=len(curves),
                    lower_is_better=False, note=f"layers {found[:, place].min():.3f} to {found[:, place].max():.3f}",
                )  # fmt: skip
    finally:
        routed.undo()
    yield row(
        AREA, f"{name}, code, blocks of {block}", "exponent of the coverage, in the mean", float(np.mean(exponents)),
        "", device=device, peer=EXPONENT, peer_name="as simulated", runs=len(exponents),
        note=f"{min(exponents):.3f} to {max(exponents):.3f}; ours is measured, and neither is better",
    )  # fmt: skip
