"""Learning a profile: what the search finds on a few prompts, for every budget, in the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.attention import reading_cache
from effpass.runtime.engine import check_decodable
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.plan import Settings
from effpass.runtime.prefix_kv.prefix import PrefixKV
from effpass.runtime.prefix_kv.profile import BUDGETS, Profile
from effpass.runtime.prefix_kv.search import threshold_counts
from effpass.runtime.prefix_kv.session import BudgetSession

__all__ = ["SHORTEST", "calibrate"]

SHORTEST = 128  # tokens: in fewer, what is protected is most of a small budget


def calibrate(
    model: Any,
    prompts: Iterable[dict[str, Tensor]],
    *,
    importance: Literal["full", "window", "both"] = "both",
    pool: int = 7,
    sink: int = 4,
    recent: int = 32,
    chunk: int = 4096,
    provenance: dict[str, Any] | None = None,
    each: Callable[[int], None] = lambda tokens: None,
) -> Profile:
    """The mean over `prompts` of what the search gives each layer.

    Args:
        model: a transformers causal LM.
        prompts: `input_ids` `[1, T]`, and where they hold images `pixel_values`.
        importance: as the pass will use it.
        pool: likewise.
        sink: likewise.
        recent: likewise.
        chunk: tokens to run at once.
        provenance: kept in the profile.
        each: called with the length of each prompt that was run.

    Raises:
        EffpassError: an even `pool`, no prompts, one that is too short, or one longer than the model's positions.
        ModelError: the engine can't run the model, or every layer has a sliding window.
    """
    if pool < 1 or pool % 2 == 0:
        raise EffpassError(f"pool: got {pool}, expected an odd number")
    check_decodable(model)
    settings = Settings(PrefixKV(None, importance, pool), Budget(ratio=0.5), sink=sink, recent=recent)
    found: list[Tensor] = []
    lengths: list[int] = []
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    with torch.inference_mode(False), torch.no_grad(), reading_cache(model):
        for prompt in prompts:
            ids = prompt["input_ids"].to(model.device)
            _check(len(found), ids.shape[1], most)
            images = {name: x.to(model.device) for name, x in prompt.items() if name in ("pixel_values", "image_sizes")}
            found.append(_shares(BudgetSession(model, 1, ids.shape[1], None, settings), ids, chunk, images))
            lengths.append(ids.shape[1])
            each(ids.shape[1])
    if not found:
        raise EffpassError("there is no prompt to calibrate with", hint="give text, or fewer tokens a sample")
    options = {"importance": importance, "pool": pool, "sink": sink, "recent": recent}
    told = {**(provenance or {}), "samples": len(found), "tokens": sum(lengths)}
    return Profile.make(model, torch.stack(found).mean(0), options, told)


def _check(index: int, tokens: int, most: int | None) -> None:
    if tokens < SHORTEST:
        raise EffpassError(
            f"prompt {index} has {tokens} tokens; a profile needs {SHORTEST} or more", hint="give longer texts"
        )
    if most is not None and tokens > most:
        raise EffpassError(f"prompt {index} has {tokens} tokens, and the model {most} positions", hint="shorten it")


def _shares(session: BudgetSession, ids: Tensor, chunk: int, images: dict[str, Tensor]) -> Tensor:
    """float32 `[R, L]` of one prompt."""
    if not session.full:
        raise ModelError("every layer of the model has a sliding window: there is no budget to share out")
    session.begin(1)
    staging = session.stage(ids, chunk, images)
    length = ids.shape[1]
    mass, high = session.mass(staging, length)
    low = [1] * len(session.full)  # what is protected is a share of a prompt's length, and another one of the next's
    totals = [max(round(budget * length * len(low)), sum(low)) for budget in BUDGETS]
    return torch.tensor([threshold_counts(mass, [total], low, high)[0] for total in totals]) / length
