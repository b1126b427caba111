"""A complete conversion run: from a model and a text to an artifact for the pass `fg2_gdn`.

:func:`convert` implements `effpass train fg2-gdn`. An artifact is a folder with data that was learned for a pass
(:mod:`effpass.core.artifact`). During the run, tokens, metrics, checkpoints and the results of the stages are in
``FOLDER.training``, from which the run can be resumed. `FOLDER` is created when the run is complete.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from effpass.core.errors import EffpassError, ModelError
from effpass.core.fingerprint import Fingerprint
from effpass.core.model import load_model
from effpass.passes.weights.fg2_gdn import make_artifact
from effpass.runtime.linear_attention import GatedDeltaAttention, is_hybrid, make_hybrid
from effpass.runtime.linear_attention.attention_layers import attention_layers
from effpass.trainers.fg2_gdn.initial import chosen_layers, layer_settings, start_from
from effpass.trainers.fg2_gdn.memory import estimate
from effpass.trainers.fg2_gdn.settings import STAGES, Settings, Stage
from effpass.trainers.fg2_gdn.stages import run_stage
from effpass.trainers.finetune.run import check_plots, check_same, explained, read_model
from effpass.trainers.finetune.samples import file_hash
from effpass.trainers.lm.corpus import Corpus
from effpass.trainers.lm.plots import plot_losses
from effpass.trainers.memory import Estimate, check_memory
from effpass.trainers.pruning.data import Rows, begin_run, read_text
from effpass.trainers.pruning.distillation import check_head
from effpass.trainers.pruning.loop import OffsetRecorder, mean_loss
from effpass.trainers.run_folder import (
    METRICS,
    check_places,
    cut_metrics,
    keep_model,
    last_checkpoint,
    read_metrics,
    same_model,
)

__all__ = ["StagedRun", "convert"]

# Settings that may differ between a run and its resumption.
_FREE = ("accumulate", "log_every", "save_every")
_SHOWN = ("loss", "loss_", "eval_")


def convert(
    source: str,
    data: Path,
    folder: Path,
    settings: Settings,
    *,
    validation: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Train layers of linear attention to replace attention layers of a model.

    Args:
        source: model, as `effpass.load_model` accepts it.
        data: text file or JSON lines file with training data.
        folder: folder for the artifact; must not exist.
        settings: settings of the conversion.
        validation: text file or JSON lines file on which the losses of the whole model and of the hybrid after each
            stage are reported; None for none.
        resume: whether to resume the run in ``FOLDER.training``.
        say: function that receives messages for the user.

    Returns:
        `folder`, which holds an artifact for `fg2_gdn`, ``training.json``, ``metrics.jsonl`` and ``loss.png``.

    Raises:
        EffpassError: if the settings or the data are invalid, the device has too little memory, or an output exists
            already.
        ModelError: if the model can't be read, or has no attention that can be replaced.
    """
    work = folder.with_name(f"{folder.name}.training")
    check_places(folder, work, resume)
    check_plots()
    config, tokenizer = read_model(source)
    if is_hybrid(config):
        raise ModelError(f"{source} has linear attention already", hint="convert the model that it was made from")
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", settings.sequence_length)
    if settings.sequence_length > most:
        raise EffpassError(f"sequence_length: got {settings.sequence_length}, and {source} has {most} positions")
    layers, shape = chosen_layers(settings, text.num_hidden_layers), layer_settings(settings, config)
    run = {
        "command": "fg2-gdn",
        "model": source,
        "data": file_hash(data) if data.is_file() else None,
        "validation": None if validation is None or not validation.is_file() else file_hash(validation),
        "settings": {k: v for k, v in json.loads(json.dumps(asdict(settings))).items() if k not in _FREE},
    }
    if resume:
        check_same(run, work)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = estimate(config, settings, layers, shape, device)
    say(str(found))
    check_memory(found, "raise --accumulate, lower --batch, or train no whole model: --whole 0")
    teacher: Any = load_model(source, dtype=settings.dtype).model.to(device).requires_grad_(False)
    check_head(teacher)
    if not resume:
        begin_run(work, run, data, validation, tokenizer, settings.batch, settings.sequence_length)
    student: Any = load_model(source, dtype="float32").model.to(device)
    original = same_model(work, student)
    if not resume:
        keep_model(work, original)
    torch.manual_seed(settings.seed)
    old = {i: getattr(parent, name) for i, (parent, name) in attention_layers(student, layers).items()}
    made = make_hybrid(student, layers, shape)
    taken = [start_from(layer, old[i]) for i, layer in made.items()]
    del old
    say(
        f"layers {', '.join(map(str, layers))} of {text.num_hidden_layers} become {settings.mode};"
        f" {'their projections are those of the attention' if all(taken) else 'they begin at random'}; a sequence's"
        f" state is {shape.state_bytes / 1024:.0f} KiB a layer"
    )
    state = StagedRun(work, settings, teacher, student, made, say, found)
    for stage in STAGES:
        if settings.steps_of(stage):
            state.stage(stage)
    trained = {} if not settings.steps_of("whole") else state.rest()
    record = {**run, "device": str(device), "layers": layers, "state_bytes": shape.state_bytes}
    _publish(folder, work, original, made, trained, record)
    say(f"saved {folder}")
    return folder


class StagedRun:
    """Stages of a run; a stage whose result exists in the folder of the run is not repeated."""

    def __init__(
        self,
        work: Path,
        settings: Settings,
        teacher: Any,
        student: Any,
        layers: dict[int, GatedDeltaAttention],
        say: Callable[[str], None],
        found: Estimate,
    ) -> None:
        self.work, self.settings, self.teacher, self.student = work, settings, teacher, student
        self.layers, self.say, self.found = layers, say, found
        self.corpus: Corpus = read_text(work / "data", settings.batch, settings.sequence_length, "data")

    def stage(self, stage: Stage) -> None:
        """Train the student in place, or load the result of the stage."""
        learned, s = self.work / f"{stage}.safetensors", self.settings
        if learned.exists():
            self._read(learned)
            return
        first, steps = s.first_of(stage), s.steps_of(stage)
        checkpoint, step = last_checkpoint(self.work / stage)
        cut_metrics(self.work / METRICS, first + step if first + step else -1)
        recorder = OffsetRecorder(first, self.work / METRICS, s.steps, self.say, _SHOWN)
        if first + step == 0:
            self._evaluate(recorder, 0, "teacher", self.teacher)
        rows = Rows(self.corpus, s.batch, s.accumulate, s.sequence_length, steps, s.seed, first)
        self.say(f"{stage}: {steps} steps" + (f", from step {step}" if step else ""))
        with explained(self.found, self.work / stage, self.say, "--resume with a larger --accumulate"):
            run_stage(
                stage, self.student, self.layers, self.teacher, s, rows, self.work / stage / "checkpoints", recorder,
                checkpoint=checkpoint, first_step=step,
            )  # fmt: skip
        self._evaluate(recorder, steps, f"after_{stage}", self.student)
        self._write(learned, whole=stage == "whole")

    def rest(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the student outside of its new layers."""
        own = {id(p) for layer in self.layers.values() for p in layer.parameters()}
        dtype = getattr(torch, self.settings.dtype)
        return {name: p.detach().to(dtype) for name, p in self.student.named_parameters() if id(p) not in own}

    def _write(self, path: Path, whole: bool) -> None:
        tensors = {f"{i}.{n}": p.detach() for i, layer in self.layers.items() for n, p in layer.named_parameters()}
        if whole:
            tensors |= {name: p.detach() for name, p in self.student.named_parameters()}
        temporary = path.with_suffix(".tmp")
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        temporary.rename(path)

    @torch.no_grad()
    def _read(self, path: Path) -> None:
        tensors = load_file(path)
        for i, layer in self.layers.items():
            for name, parameter in layer.named_parameters():
                parameter.copy_(tensors[f"{i}.{name}"])
        for name, parameter in self.student.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])
        self.student.eval()

    def _evaluate(self, recorder: OffsetRecorder, step: int, name: str, model: Any) -> None:
        """Record the loss of a model on the validation text, if there is one."""
        if not (self.work / "validation").exists():
            return
        length, device = self.settings.sequence_length, next(model.parameters()).device
        tokens = torch.from_numpy(read_text(self.work / "validation", 1, length, "validation").training.astype("int64"))
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        batches = [part.to(device) for part in rows.split(self.settings.batch)]
        # Only batches of equal size, so that the mean over batches is the mean over tokens.
        batches = [part for part in batches if len(part) == len(batches[0])]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            recorder.write(step, {f"eval_loss_{name}": mean_loss(model, batches)})


def _publish(
    folder: Path,
    work: Path,
    original: Fingerprint,
    layers: dict[int, GatedDeltaAttention],
    rest: dict[str, torch.Tensor],
    record: dict[str, Any],
) -> None:
    """Write the output folder atomically, and remove the working folder."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        lines = read_metrics(work / METRICS)
        final = {key: value for line in lines for key, value in line.items() if key not in ("step", "seconds")}
        record |= {
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "final": final,
        }
        losses = {key: value for key, value in final.items() if key.startswith("eval_")}
        metrics = losses | {key.replace("loss", "perplexity"): math.exp(value) for key, value in losses.items()}
        provenance = {key: record[key] for key in ("model", "data", "settings", "state_bytes")}
        make_artifact(temporary, original, layers, rest=rest, provenance=provenance, metrics=metrics)
        shutil.copyfile(work / METRICS, temporary / METRICS)
        plot_losses(lines, temporary / "loss.png")
        (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(work)
