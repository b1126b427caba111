"""Passes together in files: what a file computes is what the plain model computes, with padding and any weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composition.cells import FILES, WEIGHTS, Made, dense_equivalent, hybrid_of, weighted
from families import make, padded
from fixed_tolerance import fixed_tolerance

import effpass
from effpass.lowering.targets import export
from effpass.lowering.targets.cache_layers import cache_layers
from effpass.passes.weights.quantized import dequantize_linears

SUFFIXES = {"onnx": ".onnx", "inductor": ".safetensors", "aoti": ".pt2", "tensorrt": ".engine"}


@pytest.fixture(autouse=True)
def _fixed_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "measure_tolerance", fixed_tolerance)  # to measure one takes a compilation


def merged_and_pruned(made: Made) -> tuple[list[Any], Callable[[], Any]]:
    return [made.adapter(), made.pruned()], lambda: dense_equivalent(made, merged=True, pruned=True)


def linear(made: Made) -> tuple[list[Any], Callable[[], Any]]:
    return [made.linear()], lambda: hybrid_of(made)


MAKE = {("merge_lora", "structured_pruning"): merged_and_pruned, ("fg2_gdn",): linear}


@pytest.mark.parametrize(
    ("names", "family", "target", "weights"),
    [
        pytest.param(
            *case, id=f"{' x '.join(case[0])} x {case[2]}, {case[1]}, {case[3]}", marks=[pytest.mark.slow] * (not quick)
        )
        for *case, quick in FILES
    ],
)
def test_a_file_computes_what_the_plain_model_does(
    names: tuple[str, ...], family: str, target: str, weights: str, tmp_path: Path
) -> None:
    if target == "tensorrt":
        pytest.importorskip("tensorrt_rtx_bindings")
    items, reference = MAKE[names](Made(family, tmp_path))
    recipe, start = {"version": 1, "passes": items}, make(family)
    dtype = torch.bfloat16 if target in ("inductor", "aoti") else torch.float32
    if weights in ("int8", "float8"):
        model, recipe = weighted(effpass.prepare(start, recipe), weights, dtype), {"version": 1, "passes": []}
        plain = weighted(reference(), weights, dtype)
    else:
        model, plain = start.to(dtype), reference().to(dtype)
    file = tmp_path / f"model{SUFFIXES[target]}"
    exported = effpass.export(model, recipe, file, target=target)
    assert all(check.ok for check in exported.checks)
    if target == "tensorrt":
        return  # an engine runs on a GPU; the ONNX that it is built from was run
    step = effpass.load_exported(file, allow_native=True)
    prompt = padded(23)
    mask = prompt["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    smaller = effpass.prepare(make(family), {"version": 1, "passes": items})  # fewer heads than in `plain`
    past = [t for layer in cache_layers(smaller) for t in layer.zeros(4, 0, dtype, torch.device("cpu"))]
    first = step(prompt["input_ids"][:, :17], mask[:, :17], positions[:, :17], *past)
    logits = torch.cat((first[0], step(prompt["input_ids"][:, 17:], mask, positions[:, 17:], *first[1:])[0]), 1)
    exact = copy.deepcopy(plain)
    dequantize_linears(exact, torch.float32)
    with torch.no_grad():
        expected, unrounded = (
            model(**prompt, position_ids=positions, use_cache=False).logits for model in (plain, exact.float())
        )
    for row, tokens in enumerate(mask.bool()):
        ours, theirs, spread = (x[row, tokens].float() for x in (logits, expected, expected - unrounded))
        # As exports are judged: four times what rounding does to the plain model; in float32, sums in another order.
        within = max(4 * spread.abs().max(), WEIGHTS["float32"] * theirs.abs().max())
        assert (ours - theirs).abs().max() <= within, row
