"""The folder beside a run's output that holds its checkpoints and metrics until all is done: ``FOLDER.training``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from effpass.core.errors import EffpassError
from effpass.core.whole import write_text

__all__ = ["METRICS", "RUN", "Recorder", "check_places", "cut_metrics", "last_checkpoint", "read_metrics"]

METRICS, RUN = "metrics.jsonl", "run.json"


def check_places(folder: Path, work: Path, resume: bool) -> None:
    """Raise EffpassError when something is in the way of the output, or there is nothing to resume."""
    if folder.exists():
        raise EffpassError(f"{folder} exists", hint="give another folder, or remove it")
    if work.exists() and not (work / RUN).exists():
        raise EffpassError(f"{work} holds what a run wrote before it began", hint="remove it, and leave out --resume")
    if resume and not work.exists():
        raise EffpassError(f"{work} holds no run to go on with", hint="leave out --resume")
    if not resume and work.exists():
        raise EffpassError(f"{work} holds a run that did not end", hint="go on with --resume, or remove it")


def last_checkpoint(work: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that was written to its end, and its step; the Trainer writes its state last."""
    whole = {
        int(path.parent.name.rpartition("-")[2]): path.parent
        for path in (work / "checkpoints").glob("checkpoint-*/trainer_state.json")
        if _is_json(path)
    }
    return (whole[max(whole)], max(whole)) if whole else (None, 0)


def cut_metrics(path: Path, step: int) -> None:
    """Forget what was measured after the checkpoint: it will be measured again."""
    if path.exists():
        kept = [json.dumps(line) for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file that were written to their end."""
    lines = path.read_text().splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()  # the process was killed while it wrote it
    return [json.loads(line) for line in lines]


class Recorder:
    """Appends lines of metrics to a file, and says them.

    Args:
        path: JSON lines.
        steps: of the run.
        say: gets a line for people.
        shown: keys that people see, or, ending in ``_``, their beginnings.
        writes: whether this process does; one of several.
    """

    def __init__(
        self, path: Path, steps: int, say: Callable[[str], None], shown: tuple[str, ...], *, writes: bool = True
    ) -> None:
        self.path, self.steps, self.say, self.shown, self.writes = path, steps, say, shown, writes
        self._started = time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if not self.writes:
            return
        seconds = time.perf_counter() - self._started
        line = {"step": step, **metrics, "seconds": round(seconds, 3)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        parts = tuple(name for name in self.shown if name.endswith("_"))
        seen = {key: value for key, value in line.items() if key in self.shown or key.startswith(parts)}
        values = "  ".join(f"{key} {value:.4g}" for key, value in seen.items())
        self.say(f"step {step}/{self.steps}  {seconds:.0f} s  {values}")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
