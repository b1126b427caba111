"""Learning a profile for PrefixKV, as `effpass calibrate prefix-kv` does.

The global threshold search runs on a few prompts for each of the budgets :data:`BUDGETS`, and the profile holds the
mean of the shares that it finds for each layer.
"""

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

SHORTEST = 128  # minimum number of tokens of a prompt; in fewer, protected tokens use up most of a small budget


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
    """Learn a profile: the mean over `prompts` of the shares that the search finds for each layer.

    The options `importance`, `pool`, `sink` and `recent` are those of the pass `prefix_kv`, and should be equal to the
    ones that the profile is used with.

    Args:
        model: a transformers causal LM.
        prompts: inputs of the prompts, each with `input_ids` `[1, T]` and, if it holds images, `pixel_values`.
        importance: attention that tokens are ranked by.
        pool: width of the window over which scores of neighboring tokens are averaged, an odd number.
        sink: number of first tokens that are always kept.
        recent: number of last tokens that are always kept.
        chunk: number of tokens to run at once.
        provenance: provenance to store in the profile, along with the numbers of prompts and tokens.
        each: function that is called with the length of each prompt after it was run.

    Raises:
        EffpassError: if `pool` is even, there are no prompts, or a prompt has fewer than :data:`SHORTEST` tokens or
            more than the model has positions.
        ModelError: if the decode engine can't run the model, or every layer has a sliding window.
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
    recorded = {**(provenance or {}), "samples": len(found), "tokens": sum(lengths)}
    return Profile.make(model, torch.stack(found).mean(0), options, recorded)


def _check(index: int, tokens: int, most: int | None) -> None:
    if tokens < SHORTEST:
        raise EffpassError(
            f"prompt {index} has {tokens} tokens; a profile needs {SHORTEST} or more", hint="give longer texts"
        )
    if most is not None and tokens > most:
        raise EffpassError(f"prompt {index} has {tokens} tokens, and the model {most} positions", hint="shorten it")


def _shares(session: BudgetSession, ids: Tensor, chunk: int, images: dict[str, Tensor]) -> Tensor:
    """Return the layers' shares for one prompt at all budgets, float32 `[R, L]`."""
    if not session.full:
        raise ModelError("every layer of the model has a sliding window: there is no budget to share out")
    session.begin(1)
    staging = session.stage(ids, chunk, images)
    length = ids.shape[1]
    mass, high = session.mass(staging, length)
    low = [1] * len(session.full)  # without `sink` and `recent`, whose share of a prompt depends on its length
    totals = [max(round(budget * length * len(low)), sum(low)) for budget in BUDGETS]
    return torch.tensor([threshold_counts(mass, [total], low, high)[0] for total in totals]) / length
