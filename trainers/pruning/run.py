"""A complete pruning run: from a model and a text to a keep-index artifact and a smaller checkpoint.

:func:`prune` implements `effpass train prune`. During the run all files are in ``FOLDER.training``: first the tokens,
metrics and checkpoints of the training before the cut, then the choice of units and the cut weights, then the
checkpoints of the training after the cut. An interrupted run can be resumed from them. `FOLDER` is created when the run
is complete.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.core.model import load_model
from effpass.core.whole import write_text
from effpass.passes.weights.keep_indices import KeepIndices
from effpass.passes.weights.structured_pruning import check_cut, save_pruned
from effpass.trainers.finetune.run import check_plots, check_same, explained, read_model
from effpass.trainers.finetune.samples import file_hash
from effpass.trainers.lm.corpus import Corpus
from effpass.trainers.memory import Estimate, check_memory
from effpass.trainers.pruning.data import Rows, begin_run, read_text
from effpass.trainers.pruning.distillation import check_head
from effpass.trainers.pruning.loop import OffsetRecorder, mean_loss
from effpass.trainers.pruning.memory import estimate
from effpass.trainers.pruning.plots import plot_kept, plot_run
from effpass.trainers.pruning.settings import Settings
from effpass.trainers.pruning.stages import Problem, choose, cut, learn, recover, state_problem
from effpass.trainers.run_folder import (
    METRICS,
    check_places,
    cut_metrics,
    keep_model,
    last_checkpoint,
    read_metrics,
    same_model,
)

__all__ = ["prune"]

# Settings that may differ between a run and its resumption.
_FREE = ("accumulate", "log_every", "save_every")
_SAVED = "model_folder"  # file with the path of the checkpoint, written just before the checkpoint
_SHOWN = ("loss", "cost", "kept_", "eval_", "anneal")
_LEARNING, _RECOVERY, _KEEP, _CUT = "learning", "recovery", "keep", "cut"


def prune(
    source: str,
    data: Path,
    folder: Path,
    settings: Settings,
    *,
    save_model: Path | None = None,
    validation: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Choose the units of a model to keep, and train the pruned model.

    Args:
        source: model, as `effpass.load_model` accepts it.
        data: text file or JSON lines file with training data.
        folder: folder for the artifact; must not exist.
        settings: settings of the run.
        save_model: folder for the smaller checkpoint; None to write none and to skip the training after the cut.
        validation: text file or JSON lines file on which losses are reported; None to report no losses.
        resume: whether to resume the run in ``FOLDER.training``.
        say: function that receives messages for the user.

    Returns:
        `folder`, which holds a keep-index artifact, ``training.json``, ``metrics.jsonl``, ``loss.png`` and
        ``kept.png``.

    Raises:
        EffpassError: the settings or the data are invalid, no shape has the requested cost, the device has too little
            memory, or an output exists already.
        ModelError: the model can't be read or pruned.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EffpassError("pruning runs in one process", hint="start it without torchrun")
    work = folder.with_name(f"{folder.name}.training")
    check_places(folder, work, resume)
    saved = work / _SAVED
    is_saved = save_model is not None and save_model.exists()
    if is_saved and not (resume and saved.exists() and saved.read_text() == str(save_model)):
        raise EffpassError(f"{save_model} exists", hint="give another folder, or remove it")
    check_plots()
    config, tokenizer = read_model(source)
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", settings.sequence_length)
    if settings.sequence_length > most:
        raise EffpassError(f"sequence_length: got {settings.sequence_length}, and {source} has {most} positions")
    run = {
        "command": "prune",
        "model": source,
        "data": file_hash(data) if data.is_file() else None,
        "validation": None if validation is None or not validation.is_file() else file_hash(validation),
        "saves": save_model is not None,
        "settings": {k: v for k, v in json.loads(json.dumps(asdict(settings))).items() if k not in _FREE},
    }
    if resume:
        check_same(run, work)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = estimate(config, settings, device)
    say(str(found))
    check_memory(found, "raise --accumulate, lower --batch, or learn an adapter: --method lora")
    teacher: Any = load_model(source, dtype=settings.dtype).model.to(device).requires_grad_(False)
    problem = state_problem(teacher, settings)
    check_head(teacher)
    original = same_model(work, teacher)
    if not resume:
        begin_run(work, run, data, validation, tokenizer, settings.batch, settings.sequence_length)
        keep_model(work, original)
    state = _Run(work, source, settings, problem, teacher, say, found, save_model is not None)
    keep = state.learned()
    if save_model is not None:
        if not is_saved:
            model = state.recovered(keep)
            write_text(saved, str(save_model))  # from now on, an existing checkpoint is a complete one of this run
            save_pruned(model.to(getattr(torch, settings.dtype)), save_model, tokenizer)
        say(f"saved {save_model}")
    _publish(folder, work, keep, problem, {**run, "device": str(device), **state.facts(keep)})
    say(f"saved {folder}")
    return folder


class _Run:
    """Stages of a run; a stage whose result exists in the folder of the run is not repeated."""

    def __init__(
        self,
        work: Path,
        source: str,
        settings: Settings,
        problem: Problem,
        teacher: Any,
        say: Callable[[str], None],
        found: Estimate,
        recovers: bool,
    ) -> None:
        self.work, self.source, self.settings, self.problem = work, source, settings, problem
        self.teacher, self.say, self.found = teacher, say, found
        self.device = next(teacher.parameters()).device
        self.corpus: Corpus = read_text(work / "data", settings.batch, settings.sequence_length, "data")
        self.steps = settings.learning_steps + (settings.recovery_steps if recovers else 0)
        self.recovers = recovers

    def learned(self) -> KeepIndices:
        """Return the choice of units, and write the cut weights to the folder of the run if recovery follows."""
        if (self.work / _KEEP).exists():
            return KeepIndices.load(self.work / _KEEP)
        s = self.settings
        rows = Rows(self.corpus, s.batch, s.accumulate, s.sequence_length, s.learning_steps, s.seed)
        checkpoint, step = last_checkpoint(self.work / _LEARNING)
        cut_metrics(self.work / METRICS, step if step else -1)
        recorder = self._recorder(0)
        if not step:
            self._evaluate(recorder, 0, "whole", self.teacher)
        if s.learning_steps:
            student = load_model(self.source, dtype="float32" if s.method == "full" else s.dtype).model.to(self.device)
            self.say(f"learning which units stay: {s.learning_steps} steps" + (f", from step {step}" if step else ""))
            with explained(self.found, self.work / _LEARNING, self.say, "--resume with a larger --accumulate"):
                student, learned = learn(
                    student, self.teacher, self.problem, s, rows, self.work / _LEARNING / "checkpoints", recorder,
                    checkpoint=checkpoint, first_step=step,
                )  # fmt: skip
        else:
            learned = choose(self.teacher, self.problem, s, rows)
            student = load_model(self.source, dtype="float32" if s.recovery == "full" else s.dtype).model.to(
                self.device
            )
        self.say(f"stays: {_told(self.problem, learned.keep)}")
        check_cut(student, learned.keep)
        cut(student, self.problem, learned, rows.calibration(1)[0].to(self.device))
        self._evaluate(recorder, s.learning_steps, "cut", student)
        if self.recovers:
            shutil.rmtree(self.work / _CUT, ignore_errors=True)
            save_pruned(student, self.work / _CUT)
        learned.keep.artifact.save(self.work / _KEEP)  # written last, so that the weights exist if it does
        del student
        gc.collect()
        return learned.keep

    def recovered(self, keep: KeepIndices) -> Any:
        """Train the cut model after the cut and return it."""
        s = self.settings
        first = s.learning_steps
        rows = Rows(self.corpus, s.batch, s.accumulate, s.sequence_length, s.recovery_steps, s.seed, first)
        checkpoint, step = last_checkpoint(self.work / _RECOVERY)
        cut_metrics(self.work / METRICS, first + step)
        recorder = self._recorder(first)
        self.say(f"recovery: {s.recovery_steps} steps" + (f", from step {step}" if step else ""))
        model = load_model(self.work / _CUT, dtype="auto").model.to(self.device)
        with explained(self.found, self.work / _RECOVERY, self.say, "--resume with a larger --accumulate"):
            model = recover(
                model, self.teacher, s, rows, self.work / _RECOVERY / "checkpoints", recorder, checkpoint=checkpoint,
                first_step=step,
            )  # fmt: skip
        self._evaluate(recorder, s.recovery_steps, "recovered", model)
        return model

    def facts(self, keep: KeepIndices) -> dict[str, Any]:
        """Return the description of the result for ``training.json``."""
        return {"cost": self.problem.cost.unit, "kept": _told(self.problem, keep)}

    def _recorder(self, first: int) -> OffsetRecorder:
        return OffsetRecorder(first, self.work / METRICS, self.steps, self.say, _SHOWN)

    def _evaluate(self, recorder: OffsetRecorder, step: int, name: str, model: Any) -> None:
        """Record the loss on the validation text, if there is one and an interrupted run has not recorded it yet."""
        key, metrics = f"eval_loss_{name}", self.work / METRICS
        is_known = metrics.exists() and any(key in line for line in read_metrics(metrics))
        if is_known or not (self.work / "validation").exists():
            return
        length = self.settings.sequence_length
        tokens = torch.from_numpy(read_text(self.work / "validation", 1, length, "validation").training.astype("int64"))
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        batches: list[Tensor] = [part.to(self.device) for part in rows.split(self.settings.batch)]
        batches = [part for part in batches if len(part) == len(batches[0])]  # equal sizes: mean over tokens
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            recorder.write(step, {key: mean_loss(model, batches)})


def _told(problem: Problem, keep: KeepIndices) -> str:
    """Describe what is kept."""
    if keep.layers:
        return f"{len(keep.layers)} of {keep.before.num_hidden_layers} layers"
    sizes = {u.size: _size(problem, u.family, keep) for u in problem.units.values() if u.size == u.family}
    share = problem.cost.share(problem.shapes.share(sizes))
    parts = [f"{number} of {problem.shapes.counts[size]} {size}" for size, number in sizes.items()]
    return f"{', '.join(parts)}; {share:.3f} of the {problem.cost.unit}"


def _size(problem: Problem, family: str, keep: KeepIndices) -> int:
    kept = next(iter(keep.units[family].values())).shape[-1]
    return kept // problem.units[family].rows if family == "experts" else kept


def _publish(folder: Path, work: Path, keep: KeepIndices, problem: Problem, record: dict[str, Any]) -> None:
    """Write the artifact, metrics and plots to a temporary folder, and rename it to `folder`."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        lines = read_metrics(work / METRICS) if (work / METRICS).exists() else []
        final = {key: value for line in lines for key, value in line.items() if key not in ("step", "seconds")}
        record |= {
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "final": final,
        }
        artifact = keep.artifact
        artifact.provenance.update({key: record[key] for key in ("model", "data", "settings", "kept")})
        artifact.metrics.update({key: value for key, value in final.items() if key.startswith("eval_")})
        artifact.save(temporary)
        if lines:
            shutil.copyfile(work / METRICS, temporary / METRICS)
            plot_run(lines, temporary / "loss.png")
        if keep.units:
            counts = {f: u.rows * u.count if f == "experts" else u.count for f, u in problem.units.items()}
            plot_kept(keep.units, counts, temporary / "kept.png")
        (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(work)
