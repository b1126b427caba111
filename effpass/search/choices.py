"""Choices of a search: the passes, each with options that make a difference, that could act on a model.

The options are fixed grids per pass. A pass that can't take part is returned with the reason, which ends up in the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from effpass.backend import DECODE_PASSES
from effpass.core import registry
from effpass.core.errors import EffpassError
from effpass.core.options import has_defaults
from effpass.core.registry import PassInfo
from effpass.search.workload import Goal, Workload

__all__ = ["Choice", "choices", "given_choice"]

# Options to try: the share of tokens that prefix_kv keeps, the share of the prompt's keys that a step of
# sparse_attention reads, and the share of a layer's weights that structured_pruning keeps.
_BUDGETS, _READ, _KEPT = (0.5, 0.25, 0.1), (0.5, 0.25), (0.95, 0.9, 0.8)
_NARROW = ((1.0, "int8"), (1.0, "int4"), (0.5, "int8"), (0.25, "int8"))
_BLOCK, _FEWEST = 64, 4  # sparse_attention: cache slots per block, and smallest number of candidate blocks


@dataclass(frozen=True)
class Choice:
    """One pass with its options.

    Attributes:
        name: registry key of the pass.
        label: name of the choice in messages; unique within a search.
        options: options as in a recipe. ``artifact`` is set once the artifact has been calibrated.
        needs: name of the artifact to calibrate for it; None when none is needed.
    """

    name: str
    label: str
    options: Mapping[str, Any]
    needs: str | None = None

    def __hash__(self) -> int:
        return hash(self.label)


def choices(
    model: Any, goal: Goal, workload: Workload, given: Iterable[Choice] = ()
) -> tuple[list[Choice], dict[str, str]]:
    """The choices of a search, before anything is calibrated.

    Args:
        model: a transformers causal LM.
        goal: quantity that the search minimizes; choices that can't improve it are left out.
        workload: sizes of the requests.
        given: choices with artifacts provided by the user.

    Returns:
        The choices, and the passes that are left out with the reason for each.
    """
    found, left_out = list(given), {}
    for info in registry.describe():
        reason = _reason(info, model, goal)
        options = list(_options(info, goal, workload)) if reason is None else []
        found += options
        if not any(choice.name == info.name for choice in found):
            left_out[info.name] = reason or "it needs an artifact: give one with --artifact"
    return found, left_out


def given_choice(folder: Path) -> Choice:
    """The choice that applies the artifact in `folder`.

    Raises:
        EffpassError: the artifact can't be read, or its pass has no option ``artifact``.
    """
    try:
        name = json.loads((folder / "effpass.json").read_text(encoding="utf-8"))["pass"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EffpassError(f"--artifact {folder}: is no artifact: {error}", hint="give its folder") from error
    if "artifact" not in {field.name for field in fields(registry.load(name).Options)}:
        raise EffpassError(f"--artifact {folder}: is for {name}, whose options name no artifact")
    return Choice(name, f"{name} {folder}", {"artifact": str(folder.absolute())})


def _reason(info: PassInfo, model: Any, goal: Goal) -> str | None:
    """Why a pass can't take part in the search, whatever its options; None when it can."""
    on_gpu = model.device.type == "cuda"
    if info.error is not None:
        return info.error
    if info.name in DECODE_PASSES:
        return "the decode engine applies it by itself"
    if info.name == "merge_lora":
        return "it merges adapters, and a search takes the model without one: merge first"
    if info.name == "sparse_verification":
        return "it acts on the trees of a draft, and a search decodes without one"
    if info.name == "kv_offload" and not on_gpu:
        return "keys and values are in host memory as it is"
    if info.name == "kv_offload" and goal != "memory":
        return "it makes room, and no step faster"
    if info.name == "sparse_attention" and goal == "memory" and not on_gpu:
        return "it reads less, and holds an index more"
    return None


def _options(info: PassInfo, goal: Goal, workload: Workload) -> Iterator[Choice]:
    """The choices for one pass; a pass not listed here takes part with its default options, if it has defaults."""
    name = info.name
    if name == "structured_pruning":
        for share in _KEPT:
            yield Choice(name, f"{name} {share:.0%}", {"artifact": "."}, f"keep-{100 * share:.0f}")
    elif name == "prefix_kv":
        plain = [(share, "auto") for share in _BUDGETS]
        for share, dtype in [*plain, *_NARROW] if goal == "memory" else plain:
            label = f"{name} {share:.0%}" + ("" if dtype == "auto" else f" {dtype}")
            options = {"budget": share} | ({} if dtype == "auto" else {"kv_cache_dtype": dtype})
            # A cache that keeps all tokens has no budget to divide among layers, and needs no profile.
            yield Choice(name, label, options, "profile" if share < 1 else None)
    elif name == "sparse_attention":
        for tokens in dict.fromkeys(max(_BLOCK, round(share * workload.prompt)) for share in _READ):
            candidates = max(_FEWEST, -(-2 * tokens // _BLOCK))
            options = {"tokens": tokens, "blocks": candidates, "dense_below": 1}
            yield Choice(name, f"{name} {tokens}", options, "channels")
    elif not info.needs_artifact and has_defaults(registry.load(name).Options):
        yield Choice(name, name, {})
