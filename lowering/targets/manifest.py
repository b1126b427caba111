"""The manifest that every exported file carries, so that the file can be checked later without the model.

A :class:`Manifest` is stored as text metadata with the keys ``effpass.version``, ``effpass.target``,
``effpass.recipe`` and so on, in the place that the file format has for metadata. ``effpass.digest`` is a hash over the
metadata and the rest of the file, which detects any accidental change. It is not a signature: whoever can write the
file can also write a matching digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import ExportError
from effpass.core.strict_json import parse_json
from effpass.lowering.targets.cache_layers import CacheLayer
from effpass.lowering.targets.device import DEVICES
from effpass.lowering.targets.limits import Limits
from effpass.lowering.targets.validation import Check, DecodeCase, Recording, Tolerance

__all__ = ["PREFIX", "Manifest", "Reference", "reference_of", "seal", "unseal"]

PREFIX = "effpass."
_DIGEST = f"{PREFIX}digest"

# Number of reference logits stored per sequence: the largest ones, and some at even distances in the vocabulary.
_TOP, _SPACED = 8, 16


@dataclass(frozen=True)
class Reference:
    """Some logits of the rewritten model on one test case, at the last position of each sequence.

    Attributes:
        case: the inputs.
        picked: `[B, N]`, vocabulary indices of the stored logits.
        logits: `[B, N]`, the logits at these indices.
    """

    case: DecodeCase
    picked: Tensor
    logits: Tensor


def reference_of(case: DecodeCase, recording: Recording) -> Reference:
    """Select the logits to store from a recording of the rewritten model."""
    last = case.attention_mask.sum(1).cumsum(0) - 1  # padding is on the left: the last position is never padding
    logits = recording.logits[last]
    vocabulary = logits.shape[1]
    spaced = torch.arange(0, vocabulary, max(1, vocabulary // _SPACED))[:_SPACED]
    top = logits.topk(min(_TOP, vocabulary)).indices
    picked = torch.cat([top, spaced.expand(len(logits), -1)], 1)
    return Reference(case, picked, logits.gather(1, picked))


@dataclass(frozen=True)
class Manifest:
    """Description of an exported file; see the module docstring.

    Attributes:
        version: version of effpass that wrote the file.
        target: name of the target.
        recipe: text of the recipe; empty if there was none.
        dtype: dtype of logits and cache.
        layers: cache shapes, one entry per layer.
        device: type of the device that the file runs on, ``"cpu"`` or ``"cuda"``.
        limits: sizes that the file accepts.
        tolerance: allowed differences, per test case.
        checks: errors measured when the file was written.
        executed: whether these checks executed the file itself.
        reference: reference logits of the rewritten model, one entry per test case.
        machine: requirements of native code on the machine; empty for files without native code.
    """

    version: str
    target: str
    recipe: str
    dtype: torch.dtype
    layers: tuple[CacheLayer, ...]
    device: str
    limits: Limits
    tolerance: Tolerance
    checks: list[Check]
    executed: bool
    reference: list[Reference]
    machine: dict[str, str] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        values = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "cache": [layer.to_json() for layer in self.layers],
            "limits": asdict(self.limits),
            "tolerance": asdict(self.tolerance),
            "validation": [c.to_json() for c in self.checks],
            "executed": self.executed,
            "reference": [_reference_to_json(r) for r in self.reference],
            "machine": self.machine,
        }
        text = {"version": self.version, "target": self.target, "recipe": self.recipe, "device": self.device}
        return {PREFIX + k: v for k, v in text.items()} | {PREFIX + k: json.dumps(v) for k, v in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Manifest:
        """Parse the result of :meth:`to_metadata`.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: if `metadata` does not have the form that it writes.
        """
        text = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        names = ("dtype", "cache", "limits", "tolerance", "validation", "executed", "reference", "machine")
        v: dict[str, Any] = {name: parse_json(text[name].encode()) for name in names}
        dtype = getattr(torch, v["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{v['dtype']!r} is no dtype")
        if text["device"] not in DEVICES:
            raise ValueError(f"{text['device']!r} is no device that files run on")
        for check in v["validation"]:
            del check["ok"]
        return cls(
            version=text["version"],
            target=text["target"],
            recipe=text["recipe"],
            dtype=dtype,
            layers=tuple(CacheLayer(*map(int, sizes)) for sizes in v["cache"]),
            device=text["device"],
            limits=_limits_from_json(v["limits"]),
            tolerance=Tolerance(**v["tolerance"]),
            checks=[Check(**check) for check in v["validation"]],
            executed=bool(v["executed"]),
            reference=[_reference_from_json(entry) for entry in v["reference"]],
            machine={str(k): str(x) for k, x in v["machine"].items()},
        )


def _limits_from_json(entry: Mapping[str, Any]) -> Limits:
    indices = tuple(tuple((int(f), int(b), int(t), int(p)) for f, b, t, p in elements) for elements in entry["indices"])
    return Limits(entry["batch"], entry["length"], indices)


def _reference_to_json(reference: Reference) -> dict[str, Any]:
    case = reference.case
    return {
        "case": case.name,
        "input_ids": case.input_ids.tolist(),
        "attention_mask": case.attention_mask.tolist(),
        "chunks": list(case.chunks),
        "picked": reference.picked.tolist(),
        "logits": reference.logits.tolist(),
    }


def _reference_from_json(entry: Mapping[str, Any]) -> Reference:
    ids, mask = torch.tensor(entry["input_ids"]), torch.tensor(entry["attention_mask"])
    case = DecodeCase(str(entry["case"]), ids, mask, tuple(map(int, entry["chunks"])))
    return Reference(case, torch.tensor(entry["picked"]), torch.tensor(entry["logits"]))


def seal(metadata: Mapping[str, str], content: str) -> dict[str, str]:
    """Return `metadata` with a digest added, which covers it and `content`, the digest of the rest of the file."""
    return {**metadata, _DIGEST: _digest(metadata, content)}


def unseal(metadata: Mapping[str, str], content: str, what: str) -> Manifest:
    """Verify the digest in a file's metadata and return its manifest.

    Args:
        metadata: all metadata of the file; keys of other tools are ignored.
        content: digest of the rest of the file, from :meth:`Target.digest`.
        what: name of the file, for messages.

    Raises:
        ExportError: if the file has no manifest, or was changed after it was written.
    """
    ours = {k: v for k, v in metadata.items() if k.startswith(PREFIX) and k != _DIGEST}
    if _DIGEST not in metadata:
        raise ExportError(
            f"{what} holds no record of a check by effpass",
            hint="effpass validate reads what effpass export wrote; a file of another tool has nothing to compare with",
        )
    if _digest(ours, content) != metadata[_DIGEST]:
        raise ExportError(
            f"{what} was changed after it was exported: its digest differs", hint="copy or export it again"
        )
    try:
        return Manifest.from_metadata(ours)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportError(
            f"{what}: its metadata can't be read: {type(error).__name__}: {error}",
            hint="a newer version of effpass may have written it",
        ) from error


def _digest(metadata: Mapping[str, str], content: str) -> str:
    text = json.dumps([sorted(metadata.items()), content])
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(parts: Sequence[str]) -> str:
    """Combine several digests into one."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
