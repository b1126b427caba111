"""What `effpass demo --full` ends with: recipes that have a name, measured beside the model as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from effpass.search.measure import Trial
    from effpass.search.workload import Workload

__all__ = ["DENSE", "RECIPES", "WORKLOAD", "measure_recipes", "recipes_table"]

#: Those for dense models.
RECIPES = ("fast-decode", "long-context", "small-memory")
DENSE = "dense"
#: Batch, prompt, new tokens, pieces of text: half a minute a recipe on a CPU.
WORKLOAD = (1, 1024, 24, 4)


def measure_recipes(
    load: Callable[[], Any], tokenizer: Any, workload: Workload, step: Callable[[str], AbstractContextManager[None]]
) -> dict[str, Trial]:
    """Measure the dense model and each recipe.

    Args:
        load: a model as it comes.
        tokenizer: of that model.
        workload: requests.
        step: shows what is going on.
    """
    from effpass import api
    from effpass.search.measure import measure
    from effpass.search.texts import Texts, builtin_text

    texts = Texts.of(builtin_text(), None, tokenizer, workload)
    found = {}
    for name in (DENSE, *RECIPES):
        with step(f"measure {name}: {workload.sequences} prompts of {workload.prompt} tokens"):
            model = api.prepare(load(), {"passes": []} if name == DENSE else name)
            found[name] = measure(model, texts.selection, workload)
    return found


def recipes_table(found: dict[str, Trial]) -> Table:
    """Speed, memory and quality; the loss is compared text by text."""
    from rich import box
    from rich.table import Table

    from effpass.cli.console import megabytes

    table = Table("recipe", box=box.SIMPLE_HEAD)
    for column in ("time per token", "tokens/s", "weights + cache", "perplexity", "loss"):
        table.add_column(column, justify="right")
    dense = found[DENSE]
    for name, trial in found.items():
        added = mean(ours - theirs for ours, theirs in zip(trial.losses, dense.losses, strict=True))
        table.add_row(
            name,
            f"{1e3 * trial.step_seconds:.1f} ms",
            f"{1 / trial.step_seconds:.1f}",
            f"{megabytes(trial.weight_bytes)} + {megabytes(trial.cache_bytes)}",
            f"{math.exp(mean(trial.losses)):.3f}",
            f"{100 * math.expm1(added):+.2f} %",
        )
    return table
