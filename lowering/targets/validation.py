"""Comparison of an exported decoder with the rewritten program and the original model.

Two errors are measured and reported separately. The *export error* compares the file with the rewritten program run by
PyTorch. The *method loss* compares the rewritten program with the original model. Each test case feeds a sequence in
chunks of tokens, and every implementation carries its own cache from one chunk to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.cache_name import cache_name
from effpass.core.errors import ExportError
from effpass.lowering.targets.cache_layers import CacheLayer
from effpass.lowering.targets.decode_graph import Step
from effpass.lowering.targets.device import CPU
from effpass.lowering.targets.tracing import plain_attention

__all__ = [
    "TOLERANCE",
    "Check",
    "DecodeCase",
    "Recording",
    "Tolerance",
    "compare",
    "decode_cases",
    "largest_difference",
    "largest_value",
    "record_model",
    "record_step",
    "require_no_method_loss",
    "require_ok",
]

# Upper bound of any tolerance, relative to the largest value that is compared. Correct evaluations of a whole decoder
# in float32 typically differ by 4e-6 of it, and by 3e-4 at single tokens where the model amplifies rounding errors. A
# wrong mask, position or activation causes differences from 1e-2 on. The float32 bound lies in between. The rounding
# error is 5e-4 in float16 and 4e-3 in bfloat16.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1.6e-1}


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences between an export and the rewritten model.

    Attributes:
        logits: largest allowed absolute difference of logits, per test case.
        cache: largest allowed absolute difference of cache tensors, per test case.
        why: derivation of the numbers, as text for the user.
    """

    logits: tuple[float, ...]
    cache: tuple[float, ...]
    why: str


@dataclass(frozen=True)
class DecodeCase:
    """A test case: token ids, and how they are split over calls.

    Attributes:
        name: description of the case.
        input_ids: `[B, N]`, token ids.
        attention_mask: `[B, N]`, 1 for tokens and 0 for padding.
        chunks: tokens per call, with sum N; (7, 1) fills a cache with 7 positions and decodes one token.
    """

    name: str
    input_ids: Tensor
    attention_mask: Tensor
    chunks: tuple[int, ...]

    def calls(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ids `[B, T]`, mask `[B, P + T]` and positions `[B, T]` of each call, on `device`."""
        ids, mask = self.input_ids.to(device), self.attention_mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        stop = 0
        for tokens in self.chunks:
            start, stop = stop, stop + tokens
            yield ids[:, start:stop], mask[:, :stop], positions[:, start:stop]


@dataclass(frozen=True)
class Recording:
    """Outputs of one implementation on one test case, at positions that are not padding, as float32 in host memory.

    Attributes:
        logits: `[positions, vocab]`, logits of all calls.
        cache: cache tensors after the last call, keys and values as `[positions, G, K or V]` and tensors of
            linear-attention layers in their own shape; empty for the original model, whose cache may differ in shape.
    """

    logits: Tensor
    cache: list[Tensor]


@dataclass(frozen=True)
class Check:
    """Errors of one test case, as largest absolute differences.

    Attributes:
        case: name of the test case.
        export_error: difference between the logits of the file and of the rewritten program.
        tolerance: largest allowed `export_error`.
        cache_error: difference between the caches of the file and of the rewritten program.
        cache_tolerance: largest allowed `cache_error`.
        method_loss: difference between the logits of the rewritten program and of the original model.
    """

    case: str
    export_error: float
    tolerance: float
    cache_error: float
    cache_tolerance: float
    method_loss: float

    @property
    def ok(self) -> bool:
        """Whether export error and cache error are within tolerance; NaN is not."""
        return self.export_error <= self.tolerance and self.cache_error <= self.cache_tolerance

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def decode_cases(vocab_size: int) -> list[DecodeCase]:
    """Return the test cases of an export, with token ids drawn from a vocabulary of `vocab_size`.

    They cover empty and filled caches, one and several tokens, left padding, and a prefill with three decode steps.
    """
    generator = torch.Generator().manual_seed(0)

    def case(name: str, padding: Sequence[int], *chunks: int) -> DecodeCase:
        ids = torch.randint(vocab_size, (len(padding), sum(chunks)), generator=generator)
        mask = torch.ones_like(ids)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        return DecodeCase(name, ids, mask, chunks)

    return [
        case("one token, and one on a cache of 1", [0], 1, 1),
        case("prefill of 5", [0], 5),
        case("prefill of 6 with padding, 3 decode steps", [2, 0], 6, 1, 1, 1),
        case("one token on a cache of 7 with padding", [3, 0, 1], 7, 1),
        case("3 tokens on a cache of 4", [0, 0], 4, 3),
    ]


@torch.no_grad()
def record_model(model: Any, cases: Sequence[DecodeCase]) -> list[Recording]:
    """Run a transformers causal LM on `cases` with its own attention and transformers' `DynamicCache`."""
    from transformers import DynamicCache

    recordings = []
    for case in cases:
        cache = DynamicCache(config=model.config)
        logits = []
        for ids, mask, positions in case.calls(model.device):
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{cache_name(): cache}
            )
            logits.append(out.logits)
        recordings.append(Recording(_attended(torch.cat(logits, 1), case), []))
    return recordings


@torch.no_grad()
def record_step(
    step: Step,
    layers: Sequence[CacheLayer],
    dtype: torch.dtype,
    cases: Sequence[DecodeCase],
    device: torch.device = CPU,
) -> list[Recording]:
    """Run a decode graph on `cases`: a captured program, or a loaded file.

    Args:
        step: function ``(input_ids, attention_mask, position_ids, *past) -> (logits, *present)``.
        layers: cache shapes, one entry per layer, from which the empty cache of the first call is created.
        dtype: dtype of the cache.
        cases: test cases to run.
        device: device that `step` runs on.
    """
    recordings = []
    for case in cases:
        batch = len(case.input_ids)
        past: list[Tensor] = [tensor for layer in layers for tensor in layer.zeros(batch, 0, dtype, device)]
        logits = []
        with plain_attention(device):
            for ids, mask, positions in case.calls(device):
                out, *past = step(ids, mask, positions, *past)
                logits.append(out)
        kinds = [layer for layer in layers for _ in layer.parts]
        cache = [
            _attended(tensor.transpose(1, 2), case) if layer.grows else tensor.cpu().float()
            for layer, tensor in zip(kinds, past, strict=True)
        ]
        recordings.append(Recording(_attended(torch.cat(logits, 1), case), cache))
    return recordings


def compare(
    cases: Sequence[DecodeCase],
    exported: Sequence[Recording],
    rewritten: Sequence[Recording],
    original: Sequence[Recording],
    tolerance: Tolerance,
) -> list[Check]:
    """Return export error and method loss of each test case."""
    checks = []
    allowed = zip(tolerance.logits, tolerance.cache, strict=True)
    for case, file, program, model, (logits, cache) in zip(cases, exported, rewritten, original, allowed, strict=True):
        checks.append(
            Check(
                case.name,
                export_error=largest_difference([file.logits], [program.logits]),
                tolerance=logits,
                cache_error=largest_difference(file.cache, program.cache),
                cache_tolerance=cache,
                method_loss=largest_difference([program.logits], [model.logits]),
            )
        )
    return checks


def require_no_method_loss(
    checks: Sequence[Check], original: Sequence[Recording], dtype: torch.dtype, what: str
) -> None:
    """Raise an :class:`ExportError` if the method loss exceeds rounding errors.

    Called only if all passes are exact and keep the model's outputs.
    """
    for check, model in zip(checks, original, strict=True):
        allowed = TOLERANCE[dtype] * largest_value([model.logits])
        if not check.method_loss <= allowed:
            raise ExportError(
                f"{what}: every pass is exact, but in {check.case!r} the rewritten model's logits differ from the "
                f"original's by {check.method_loss:.2g}, {allowed:.2g} is allowed; no file was left behind",
                hint="leave passes out of the recipe one by one, and report the one that changes the model",
            )


def require_ok(checks: Sequence[Check], what: str) -> None:
    """Raise an :class:`ExportError` that names the worst test case if any is out of tolerance."""
    bad = [c for c in checks if not c.ok]
    if not bad:
        return
    logits = max(bad, key=lambda c: _ratio(c.export_error, c.tolerance))
    cache = max(bad, key=lambda c: _ratio(c.cache_error, c.cache_tolerance))
    if _ratio(logits.export_error, logits.tolerance) > 1:
        part, case, error, allowed = "logits", logits, logits.export_error, logits.tolerance
    else:
        part, case, error, allowed = "cache", cache, cache.cache_error, cache.cache_tolerance
    raise ExportError(
        f"{what} is out of tolerance in {len(bad)} of {len(checks)} cases: in {case.case!r} its {part} differ from the "
        f"rewritten model's by {error:.2g}, {allowed:.2g} is allowed; no file was left behind",
        hint="leave passes out of the recipe one by one to find the one whose operators are translated wrongly",
    )


def _ratio(error: float, tolerance: float) -> float:
    return math.inf if math.isnan(error) else error / max(tolerance, 1e-300)


def _attended(values: Tensor, case: DecodeCase) -> Tensor:
    """Return `values` `[B, N, ...]` at positions that are not padding, `[positions, ...]`; others are meaningless."""
    return values.cpu()[case.attention_mask.bool()].float()


def largest_value(tensors: Sequence[Tensor]) -> float:
    """Return the largest absolute value in all `tensors`."""
    return max(float(t.abs().max()) for t in tensors)


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the largest absolute difference between corresponding tensors; NaN if any difference is NaN."""
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return math.nan if any(math.isnan(d) for d in differences) else max(differences)
