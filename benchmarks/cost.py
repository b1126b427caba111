"""Area `cost`: what the cost model predicts, against what was measured.

`committed` predicts the decode steps of the committed rows from the ceilings of the device they were taken on; models
are traced on the meta device, so that any shape needs no memory. `here` measures this device and its steps in one run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.backend import _compile, _decode_step, _free, _graphed
from benchmarks.rows import Row, measure, row
from benchmarks.shapes import SHAPES, random_model
from effpass.core.dynamo import program_from_dynamo
from effpass.core.kernels import kernels
from effpass.core.manager import PassManager
from effpass.core.program import Program
from effpass.core.roofline import KNOWN, Ceilings, ceilings, predict

AREA = "cost"
RESULTS = Path(__file__).parent / "results" / "backend.jsonl"
MERGE = {"passes": [{"merge_lora": {"require": True}}]}


def _with_adapter(base: Any) -> Any:
    """As in the area `backend`: rank 16 on every linear layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, config).eval().requires_grad_(False)


def _predicted(at: Ceilings, step: Callable[[Callable[..., Any]], Callable[[], Any]], *, merge: bool = False) -> float:
    """Seconds that the model predicts for the one graph that `step(compiled)` runs."""
    programs: list[Program] = []

    def collect(gm: Any, inputs: Any) -> Any:
        programs.append(program_from_dynamo(gm, inputs))
        if merge:
            PassManager.from_recipe(_recipe()).run(programs[-1])
        return gm.forward

    torch._dynamo.reset()
    step(collect)()
    torch._dynamo.reset()
    (program,) = programs
    return sum(predict(kernel, at) for kernel in kernels(program))


def _recipe() -> Any:
    from effpass.core.recipe import Recipe

    return Recipe.parse({"version": 1, **MERGE}, base=Path(), source="benchmark")


def _decode(model: Any, device: str, backend: Any, **how: Any) -> Callable[[], Any]:
    return _decode_step(model, device, _compile(model, device, backend=backend, **how))


# -- committed rows ---------------------------------------------------------------------------------------------------


def committed(device: str, smoke: bool) -> Iterator[Row]:
    """Predictions for every committed decode step on a device whose ceilings are known."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in RESULTS.read_text().splitlines():
        found = json.loads(line)
        if found["metric"].startswith("step time"):
            latest[found["device"], found["case"]] = found
    for at in KNOWN.values():
        errors: list[float] = []
        for (measured_on, case), found in latest.items():
            if measured_on == at.device and (not smoke or case.startswith("smollm2-135m decode")):
                yield from _committed_row(at, case, found, errors)
        yield from _summary("committed decode steps", errors, at.device)


def _committed_row(at: Ceilings, case: str, found: dict[str, Any], errors: list[float]) -> Iterator[Row]:
    shape = next(name for name in SHAPES if case.startswith(name))
    with_adapter = "LoRA" in case
    times = [("ours", "adapter merged", True), ("peer", "adapter unmerged", False)]
    predicted = {}
    for key, what, merge in times if with_adapter else [("ours", "retraced", False)]:
        model = random_model(shape, "meta", torch.bfloat16)
        model = _with_adapter(model) if with_adapter else model
        predicted[key] = _predicted(at, functools.partial(_decode, model, "meta"), merge=merge)
        errors.append(abs(predicted[key] * 1e3 / found[key] - 1))
        yield _compared(case, what, predicted[key], found[key] / 1e3, at.device)
    if with_adapter:
        yield _gain(case, predicted["peer"] / predicted["ours"], found["ratio"], at.device)


def _compared(case: str, what: str, predicted: float, measured: float, device: str) -> Row:
    made = row(AREA, case, f"predicted step time, {what}", predicted * 1e3, "ms", device="cpu", peer=measured * 1e3,
               peer_name="measured", note=f"{predicted / measured - 1:+.0%}")  # fmt: skip
    return replace(made, device=device)


def _gain(case: str, predicted: float, measured: float, device: str) -> Row:
    note = f"the sign is {'right' if (predicted > 1) == (measured > 1) else 'WRONG'}"
    made = row(AREA, case, "predicted gain of merging", predicted, "x", device="cpu", peer=measured,
               peer_name="measured", note=note)  # fmt: skip
    return replace(made, device=device)


def _summary(what: str, errors: list[float], device: str) -> Iterator[Row]:
    if errors:
        note = f"largest {max(errors):.0%}, over {len(errors)} steps"
        made = row(AREA, what, "median error of the prediction", median(errors) * 100, "%", device="cpu", note=note)
        yield replace(made, device=device)


# -- this device ------------------------------------------------------------------------------------------------------


def here(device: str, smoke: bool) -> Iterator[Row]:
    """Ceilings of this device, then decode, prefill and a merged adapter: predicted and measured in one run."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    at = ceilings(device, dtype)
    shape, layers = ("tiny", 2) if smoke else ("smollm2-135m", 8 if device == "cuda" else 4)

    def build() -> Any:
        return random_model(shape, device, dtype, num_hidden_layers=layers)

    def timed(step: Callable[[], Any]) -> float:
        return measure(step, device, warmup=3, runs=3 if smoke else 9, inner=1 if smoke else 5).median

    name = f"{shape}, {layers} layers, {at.dtype}"
    errors, steps = [], {}
    cases: dict[str, tuple[bool, bool, int | None]] = {"decode, batch 1, static cache 1024": (False, False, None)}
    cases |= {f"prefill, {tokens} tokens": (False, False, tokens) for tokens in ((32,) if smoke else (128, 1024))}
    cases |= {"decode, LoRA unmerged": (True, False, None), "decode, LoRA merged": (True, True, None)}
    for case, (with_adapter, merge, tokens) in cases.items():
        model = _with_adapter(build()) if with_adapter else build()

        def step(backend: Any, model: Any = model, tokens: int | None = tokens, **how: Any) -> Callable[[], Any]:
            if tokens is None:
                return _decode(model, device, backend, **how)
            compiled = _compile(model, device, backend=backend, **how)
            ids = torch.full((1, tokens), 5, device=device)
            return lambda: _no_cache(compiled, ids)

        predicted = _predicted(at, step, merge=merge)
        if merge:
            run = step("effpass", options=_graphed(MERGE, device))
        else:
            run = step("inductor")
        measured = timed(run)
        steps[case] = predicted, measured
        errors.append(abs(predicted / measured - 1))
        yield _compared(f"{name}: {case}", "here", predicted, measured, at.device)
        del model, run
        _free(device)
    unmerged, merged = steps["decode, LoRA unmerged"], steps["decode, LoRA merged"]
    yield _gain(name, unmerged[0] / merged[0], unmerged[1] / merged[1], at.device)
    yield from _summary(f"{name}, measured here", errors, at.device)


def _no_cache(compiled: Callable[..., Any], ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return compiled(input_ids=ids, use_cache=False).logits


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {"committed": committed, "here": here}
