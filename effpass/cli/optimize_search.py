"""`effpass optimize --goal`: run a search, and show what it came to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from effpass.cli.console import megabytes, stderr, stdout
from effpass.cli.text import read_text
from effpass.core.errors import EffpassError, ModelError

if TYPE_CHECKING:
    from effpass.core.model import LoadedModel
    from effpass.search.recipes import Candidate
    from effpass.search.run import Search
    from effpass.search.workload import Goal, Workload

__all__ = ["search", "show"]


def search(
    model: str,
    goal: Goal,
    limit: float,
    workload: Workload,
    folder: Path,
    *,
    data: Path | None,
    validation: Path | None,
    artifacts: Sequence[Path],
    most: int,
    trials: int | None,
    resume: bool,
    device: str,
    load: Callable[[bool], LoadedModel],
) -> bool:
    """Search, keep all in `folder` and show it; False where Ctrl-C ended it.

    Args:
        model: as the user calls it.
        goal, limit, workload: see :class:`effpass.search.run.Search`.
        folder: of the search.
        data: calibrates; by default Python's reference.
        validation: losses are measured on it; by default the second half of `data`.
        artifacts: folders of what recipes may apply.
        most: passes of a recipe.
        trials: recipes to measure now, at most.
        resume: go on with the search in `folder`.
        device: that the model is loaded on.
        load: loads the model, and says so where it is told to.
    """
    text, other = _texts(data, validation)
    from effpass.search.choices import given_choice
    from effpass.search.log import Log
    from effpass.search.plot import can_plot
    from effpass.search.run import Search
    from effpass.search.texts import Texts

    given = [given_choice(path) for path in dict.fromkeys(artifacts)]
    settings = {
        "model": model, "goal": goal, "quality_loss": limit, "workload": vars(workload), "passes": most,
        "data": _hash(text), "validation": None if other is None else _hash(other),
        "artifacts": [choice.label for choice in given], **_machine(device),
    }  # fmt: skip
    log = Log.open(folder, settings, resume=resume)
    loaded = load(True)
    if loaded.tokenizer is None:
        raise ModelError(f"{model} has no tokenizer", hint="save the tokenizer into the model's folder")
    log.settle(_loaded(loaded.model))
    texts = Texts.of(text, other, loaded.tokenizer, workload)
    del loaded
    say = stderr()
    if not can_plot():
        say.print("no plot without matplotlib: pip install 'effpass[train]'", markup=False)
    found = Search(
        log, lambda: load(False).model, texts, goal, limit, workload, most, given,
        "Python's reference" if data is None else data.name, lambda line: say.print(line, markup=False, soft_wrap=True),
    )  # fmt: skip
    ended, chosen, is_stopped = False, None, False
    try:
        found.begin()
        ended = found.run(trials)
        chosen = found.confirm() if ended else None
    except KeyboardInterrupt:
        ended, chosen, is_stopped = False, None, True
    found.picture()
    show(found, chosen)
    if not ended:
        why = "stopped" if is_stopped else f"measured as many as --trials {trials} asks for"
        stdout().print(f"{why}; go on: effpass optimize … -o {folder} --resume", markup=False, soft_wrap=True)
    return not is_stopped


def _texts(data: Path | None, validation: Path | None) -> tuple[str, str | None]:
    from effpass.search.texts import builtin_text

    other = None if validation is None else read_text(validation, "--validation")
    text = builtin_text() if data is None else read_text(data)
    if other is not None and other == text:
        raise EffpassError("--data and --validation are the same text", hint="losses are measured on another one")
    return text, other


def _loaded(model: Any) -> dict[str, str]:
    """The dtype and a digest of the weights, which the name of a model does not say."""
    from effpass.core.fingerprint import Fingerprint

    return {"dtype": str(model.dtype), "weights": _hash(json.dumps(Fingerprint.of(model).to_json()))}


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _machine(device: str) -> dict[str, str]:
    """Times of one machine are not compared with another's."""
    import torch

    from effpass.core.roofline import device_name

    is_here = device.partition(":")[0] == "cpu" or torch.cuda.is_available()  # loading says what is wrong with it
    return {
        "device": device_name(torch.device(device)) if is_here else device,
        "torch": torch.__version__,
        "effpass": version("effpass"),
    }


def show(found: Search, chosen: Candidate | None) -> None:
    """What was measured and what was left out, the choice last.

    Args:
        chosen: what held on the last text; None where the search has not come so far.
    """
    from effpass.search.run import RECIPE

    console = stdout()
    if not found.trials:
        console.print("nothing was measured")
        return
    for name, reason in found.log.left_out.items():
        console.print(f"left out: {name}: {reason}", style="dim", markup=False, soft_wrap=True)
    console.print(_table(found, found.log.chosen["recipe"]))
    if chosen is None:
        console.print(f"best so far: {found.log.chosen['recipe']}", markup=False, soft_wrap=True)
    else:
        _conclude(found, chosen)
    place = found.log.folder / RECIPE
    console.print(f"{place}: effpass generate MODEL -r {place}", markup=False, soft_wrap=True)


def _table(found: Search, chosen: str) -> Any:
    """Every measured recipe, the best in the goal first; those not beaten in both goal and loss have a mark."""
    from rich import box
    from rich.table import Table

    from effpass.search.explore import added_loss, frontier, quality_loss
    from effpass.search.plot import AXES

    trials, name = found.trials, AXES[found.goal][0]
    table = Table("recipe", "", box=box.SIMPLE_HEAD)
    for column in ("ms a step", "tokens/s", "weights + cache", "perplexity", "loss"):
        table.add_column(column, justify="right")
    best = frontier(trials, found.goal)
    measured = [candidate for candidate, trial in trials.items() if trial.is_measured]
    for candidate in sorted(measured, key=lambda c: trials[c].of(found.goal)):
        trial = trials[candidate]
        error = 100 * added_loss(trials, candidate)[1]  # of a small loss in nats, that of a share
        table.add_row(
            candidate.key, "chosen" if candidate.key == chosen else "frontier" if candidate in best else "",
            f"{1e3 * trial.step_seconds:.1f}", f"{trial.tokens_per_second:.1f}",
            megabytes(trial.weight_bytes + trial.cache_bytes), f"{math.exp(mean(trial.losses)):.3f}",
            f"{100 * quality_loss(trials, candidate):+.2f} ± {error:.2f} %",
        )  # fmt: skip
    table.caption = f"goal: {found.goal} ({name}); frontier: beaten by none in both goal and loss"
    return table


def _conclude(found: Search, chosen: Candidate) -> None:
    from effpass.search.explore import quality_loss
    from effpass.search.plot import AXES
    from effpass.search.recipes import DENSE

    console, trials = stdout(), found.trials
    if chosen == DENSE:
        console.print(
            f"No legal recipe serves {found.goal} better within {100 * found.limit:g} %: the recipe is empty.",
            markup=False,
        )
        return
    name, factor = AXES[found.goal]
    before, after = (factor * trials[candidate].of(found.goal) for candidate in (DENSE, chosen))
    loss = 100 * quality_loss(trials, chosen, confirmed=True)
    console.print(
        f"{chosen.key}: {before:.4g} → {after:.4g} {name}; perplexity {loss:+.2f} % on text that nothing was chosen by",
        markup=False, soft_wrap=True,
    )  # fmt: skip
