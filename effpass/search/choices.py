"""What each pass could do to a model: itself with options that make a difference, or why it is left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from effpass.backend import DECODE_PASSES
from effpass.core import registry
from effpass.core.errors import EffpassError
from effpass.core.registry import PassInfo
from effpass.search.workload import Goal, Workload

__all__ = ["Choice", "choices", "given_choice"]

# Shares of the tokens that a cache keeps, and of the prompt's keys that a step reads, and of a layer's weights.
_BUDGETS, _READ, _KEPT = (0.5, 0.25, 0.1), (0.5, 0.25), (0.95, 0.9, 0.8)
_NARROW = ((1.0, "int8"), (1.0, "int4"), (0.5, "int8"), (0.25, "int8"))
_BLOCK, _FEWEST = 64, 4  # of sparse attention: slots, and blocks that are looked into


@dataclass(frozen=True)
class Choice:
    """One pass with options.

    Attributes:
        name: of the pass.
        label: what people see; no two choices of a search have the same.
        options: as in a recipe; ``artifact`` comes with what was calibrated.
        needs: name of what is calibrated for it; None for nothing.
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
    """What a search could go through, before anything is calibrated.

    Args:
        model: a transformers causal LM.
        goal: of the search: a choice that can't serve it is left out.
        workload: its requests.
        given: choices with artifacts that the user has.

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
    """The choice that an artifact makes.

    Raises:
        EffpassError: it can't be read, or belongs to a pass whose options name no artifact.
    """
    try:
        name = json.loads((folder / "effpass.json").read_text(encoding="utf-8"))["pass"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EffpassError(f"--artifact {folder}: is no artifact: {error}", hint="give its folder") from error
    if "artifact" not in {field.name for field in fields(registry.load(name).Options)}:
        raise EffpassError(f"--artifact {folder}: is for {name}, whose options name no artifact")
    return Choice(name, f"{name} {folder}", {"artifact": str(folder.absolute())})


def _reason(info: PassInfo, model: Any, goal: Goal) -> str | None:
    """Why a pass can't serve a search, whatever its options."""
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
    """A pass's choices; of one that is not known here its defaults, where it has them."""
    name = info.name
    if name == "structured_pruning":
        for share in _KEPT:
            yield Choice(name, f"{name} {share:.0%}", {"artifact": "."}, f"keep-{100 * share:.0f}")
    elif name == "prefix_kv":
        plain = [(share, "auto") for share in _BUDGETS]
        for share, dtype in [*plain, *_NARROW] if goal == "memory" else plain:
            label = f"{name} {share:.0%}" + ("" if dtype == "auto" else f" {dtype}")
            options = {"budget": share} | ({} if dtype == "auto" else {"kv_cache_dtype": dtype})
            # A cache that keeps everything has nothing to share out.
            yield Choice(name, label, options, "profile" if share < 1 else None)
    elif name == "sparse_attention":
        for tokens in dict.fromkeys(max(_BLOCK, round(share * workload.prompt)) for share in _READ):
            candidates = max(_FEWEST, -(-2 * tokens // _BLOCK))
            options = {"tokens": tokens, "blocks": candidates, "dense_below": 1}
            yield Choice(name, f"{name} {tokens}", options, "channels")
    elif not info.needs_artifact:
        try:
            registry.load(name).Options()
        except TypeError:
            return  # an option has no default
        yield Choice(name, name, {})
