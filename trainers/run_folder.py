"""Working folder of a training run, ``FOLDER.training``, and the metrics file in it.

A run keeps its checkpoints and metrics in ``FOLDER.training``, from which it can be resumed, and creates its output
`FOLDER` when it is complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effpass.core.errors import ArtifactError, EffpassError
from effpass.core.fingerprint import Fingerprint
from effpass.core.whole import write_text

__all__ = [
    "METRICS",
    "RUN",
    "Recorder",
    "check_places",
    "cut_metrics",
    "keep_model",
    "last_checkpoint",
    "read_metrics",
    "same_model",
]

METRICS, RUN = "metrics.jsonl", "run.json"
_MODEL = "model.json"  # fingerprint of the model


def check_places(folder: Path, work: Path, resume: bool) -> None:
    """Raise EffpassError if the folders do not allow the run to start or to resume.

    Args:
        folder: output folder; it must not exist.
        work: working folder; it must exist for a run that is resumed, and must not exist for a new one.
        resume: whether the run is resumed.
    """
    if folder.exists():
        raise EffpassError(f"{folder} exists", hint="give another folder, or remove it")
    if work.exists() and not (work / RUN).exists():
        raise EffpassError(f"{work} holds what a run wrote before it began", hint="remove it, and leave out --resume")
    if resume and not work.exists():
        raise EffpassError(f"{work} holds no run to go on with", hint="leave out --resume")
    if not resume and work.exists():
        raise EffpassError(f"{work} holds a run that did not end", hint="go on with --resume, or remove it")


def same_model(work: Path, model: Any) -> Fingerprint:
    """Return the fingerprint of the model of a run, and compare it with the one that a resumed run began with.

    Raises:
        EffpassError: if they differ.
    """
    if (work / _MODEL).exists():
        try:
            Fingerprint.from_json(json.loads((work / _MODEL).read_text())).check(model)
        except ArtifactError as error:
            raise EffpassError(
                f"the model is not the one that the run began with: {error}",
                hint="go on with the old model, or start anew in another folder",
            ) from None
    return Fingerprint.of(model)


def keep_model(work: Path, model: Fingerprint) -> None:
    """Keep what :func:`same_model` compares with, in the folder of a run that begins."""
    write_text(work / _MODEL, json.dumps(model.to_json()))


def last_checkpoint(work: Path) -> tuple[Path | None, int]:
    """Return the newest complete checkpoint and its step; None and 0 if there is none.

    A checkpoint is complete if its ``trainer_state.json`` is, because the Trainer writes that file last.
    """
    whole = {
        int(path.parent.name.rpartition("-")[2]): path.parent
        for path in (work / "checkpoints").glob("checkpoint-*/trainer_state.json")
        if _is_json(path)
    }
    return (whole[max(whole)], max(whole)) if whole else (None, 0)


def cut_metrics(path: Path, step: int) -> None:
    """Remove the metrics of steps after `step`, which a resumed run measures again."""
    if path.exists():
        kept = [json.dumps(line) for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the complete lines of a metrics file."""
    lines = path.read_text().splitlines()
    if lines and not lines[-1].endswith("}"):
        lines.pop()  # the process was killed while writing it
    return [json.loads(line) for line in lines]


class Recorder:
    """Appends metrics to a file and reports some of them to the user.

    Args:
        path: JSON lines file.
        steps: number of optimizer steps of the run.
        say: function that receives messages for the user.
        shown: names of the metrics to report; a name that ends in ``_`` stands for all metrics with this prefix.
        writes: whether this process writes and reports; true for one of several processes.
    """

    def __init__(
        self, path: Path, steps: int, say: Callable[[str], None], shown: tuple[str, ...], *, writes: bool = True
    ) -> None:
        self.path, self.steps, self.say, self.shown, self.writes = path, steps, say, shown, writes
        self._started = time.perf_counter()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step, together with the seconds since the recorder was created."""
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
