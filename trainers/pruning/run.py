"""A pruning run from a model and a text to a keep-index artifact, and to a smaller checkpoint.

While it runs, everything stands in ``FOLDER.training``: tokens, metrics and checkpoints of the loop before the cut;
then the choice and the cut weights; then checkpoints of the loop after it. `FOLDER` appears when all is done.
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
from effpass.trainers.pruning.data import Rows, read_text, tokenize
from effpass.trainers.pruning.distillation import check_head
from effpass.trainers.pruning.loop import OffsetRecorder, mean_loss
from effpass.trainers.pruning.memory import estimate
from effpass.trainers.pruning.plots import plot_kept, plot_run
from effpass.trainers.pruning.settings import Settings
from effpass.trainers.pruning.stages import Problem, choose, cut, learn, recover, state_problem
from effpass.trainers.run_folder import METRICS, RUN, check_places, cut_metrics, last_checkpoint, read_metrics

__all__ = ["prune"]

# What may differ between a run and its resumption.
_FREE = ("accumulate", "log_every", "save_every")
_SAVED = "model_folder"  # where the checkpoint goes, once it is about to
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
    """Find out which units of a model stay, and train what is left.

    Args:
        source: model, as `effpass.load_model` takes it.
        data: a text, or JSON lines.
        folder: where the artifact goes; must not exist.
        settings: of the run.
        save_model: where the smaller checkpoint goes; without one nothing is trained after the cut.
        validation: a text whose loss is reported.
        resume: go on from what stands in ``FOLDER.training``.
        say: gets lines for people.

    Returns:
        `folder`: a keep-index artifact, with ``training.json``, ``metrics.jsonl``, ``loss.png`` and ``kept.png``.

    Raises:
        EffpassError: a fault of the settings or the data, no shape that costs what is to be kept, no room on the
            device, something in the way of the output.
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
    if not resume:
        _prepare(work, run, data, validation, tokenizer, settings)
    state = _Run(work, source, settings, problem, teacher, say, found, save_model is not None)
    keep = state.learned()
    model = state.recovered(keep) if save_model is not None else None
    if model is not None:
        assert save_model is not None
        if not is_saved:
            write_text(saved, str(save_model))  # what stands there from now on is this run's, and whole
            save_pruned(model.to(getattr(torch, settings.dtype)), save_model, tokenizer)
        say(f"saved {save_model}")
    _publish(folder, work, keep, problem, {**run, "device": str(device), **state.facts(keep)})
    say(f"saved {folder}")
    return folder


def _prepare(
    work: Path, run: dict[str, Any], data: Path, validation: Path | None, tokenizer: Any, settings: Settings
) -> None:
    try:
        for path, name in ((data, "data"), (validation, "validation")):
            if path is not None:
                tokenize(path, tokenizer, work / name)
                rows = 1 if name == "validation" else settings.batch
                read_text(work / name, rows, settings.sequence_length, path)
        write_text(work / RUN, json.dumps(run, indent=2))
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # nothing was learned
        raise


class _Run:
    """The stages of one run, each of which is there already or is made."""

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
        """What stays; the cut weights stand in the run's folder afterwards, where they are wanted."""
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
        learned.keep.artifact.save(self.work / _KEEP)  # last: whoever finds it finds the weights
        del student
        gc.collect()
        return learned.keep

    def recovered(self, keep: KeepIndices) -> Any:
        """The cut model, trained."""
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
        """What the record of the run says of its result."""
        return {"cost": self.problem.cost.unit, "kept": _told(self.problem, keep)}

    def _recorder(self, first: int) -> OffsetRecorder:
        return OffsetRecorder(first, self.work / METRICS, self.steps, self.say, _SHOWN)

    def _evaluate(self, recorder: OffsetRecorder, step: int, name: str, model: Any) -> None:
        """Record the loss of a model on the validation text, where there is one, and once: a killed run may have."""
        key, metrics = f"eval_loss_{name}", self.work / METRICS
        is_known = metrics.exists() and any(key in line for line in read_metrics(metrics))
        if is_known or not (self.work / "validation").exists():
            return
        length = self.settings.sequence_length
        tokens = torch.from_numpy(read_text(self.work / "validation", 1, length, "validation").training.astype("int64"))
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        batches: list[Tensor] = [part.to(self.device) for part in rows.split(self.settings.batch)]
        batches = [part for part in batches if len(part) == len(batches[0])]  # equal ones, whose mean is that of tokens
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            recorder.write(step, {key: mean_loss(model, batches)})


def _told(problem: Problem, keep: KeepIndices) -> str:
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
    """Write the folder beside its place, then give it its name."""
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
