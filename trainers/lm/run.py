"""A complete pretraining run: from a config to a folder that records everything the run was made of.

:func:`train` implements `effpass train lm`. During the run, checkpoints, metrics and tokens are in ``FOLDER.training``,
from which it can be resumed. `FOLDER` is created when the run is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from effpass.core.errors import EffpassError
from effpass.core.whole import write_text
from effpass.trainers.lm.batches import MicroBatches, source_names
from effpass.trainers.lm.config import Config, load_config
from effpass.trainers.lm.corpus import Corpus, TextFile, find_files, read_corpus, write_corpus
from effpass.trainers.lm.loop import Pretrainer, training_arguments
from effpass.trainers.lm.memory import estimate
from effpass.trainers.lm.model import compile_layers, make_model, model_config, set_experts
from effpass.trainers.lm.pictures_input import check_pictures, make_processor, picture_input
from effpass.trainers.lm.plots import plot_losses
from effpass.trainers.lm.tokenizer import load_tokenizer
from effpass.trainers.memory import check_memory
from effpass.trainers.run_folder import METRICS, RUN, check_places, cut_metrics, last_checkpoint, read_metrics

__all__ = ["train"]


def train(path: Path, folder: Path, *, resume: bool = False, say: Callable[[str], None] = print) -> Path:
    """Pretrain a model according to the config at `path`.

    Args:
        path: config file.
        folder: output folder; must not exist.
        resume: whether to resume from the last checkpoint in ``FOLDER.training``.
        say: function that receives messages for the user, called in the first process only.

    Returns:
        `folder`: a transformers checkpoint with its tokenizer or processor, ``training.yaml`` (the config),
        ``training.json`` (seed, files with their hashes, curves, final losses, hash of the weights), ``metrics.jsonl``
        and ``loss.png``.

    Raises:
        EffpassError: if the config or its data are invalid, the device has too little memory, or the output exists
            already.
    """
    work = folder.with_name(f"{folder.name}.training")
    config = load_config(path)
    check_places(folder, work, resume)
    if importlib.util.find_spec("matplotlib") is None:
        raise EffpassError("loss plots need matplotlib, which is not installed", hint="pip install 'effpass[train]'")
    tokenizer = load_tokenizer(config.tokenizer)
    longest = max(stage.sequence_length for stage in config.stages)
    architecture = model_config(config.model, tokenizer, longest)
    pictures = picture_input(architecture)
    check_pictures(config, pictures)
    files = {
        i: find_files(source.text, path.absolute().parent, f"data[{i}]")
        for i, source in enumerate(config.data)
        if source.text is not None
    }
    run = {"config": _plain(config), "data": {str(i): [asdict(f) for f in found] for i, found in files.items()}}
    if resume:
        _check_same(run, work)
    args = training_arguments(config, work / "checkpoints")
    if config.fsdp and args.world_size == 1:
        raise EffpassError(
            "fsdp: one process has nothing to share", hint="torchrun --nproc-per-node N -m effpass train lm …"
        )
    if config.fsdp and config.optimizer.name == "muon":
        raise EffpassError("torch.optim.Muon does not know sharded parameters", hint="optimizer: {name: mona, …}")
    say = say if args.should_save else lambda line: None
    found = estimate(config, architecture, args.device, args.world_size, pictures)
    say(str(found))
    check_memory(found, f"raise 'accumulate', or lower 'batch' or 'sequence_length' of {found.where}")
    args.distributed_state.wait_for_everyone()  # none may still look for a folder that this run is about to make
    with args.main_process_first(local=False, desc="tokenizing"):
        if args.process_index == 0 and not resume:
            _prepare(work, run, config, files, tokenizer)
    corpora = {i: read_corpus(work / "data" / str(i)) for i in files}
    batches = MicroBatches(config, corpora, args.process_index, args.world_size, pictures)
    checkpoint, first_step = last_checkpoint(work) if resume else (None, 0)
    if args.process_index == 0:
        cut_metrics(work / METRICS, first_step)
    model = make_model(architecture, config.model.get("from"), config.seed)
    set_experts(model)
    if config.compile:
        compile_layers(model)
    trainer = Pretrainer(config, model, args, batches, first_step, work / METRICS, say)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise EffpassError(
            f"no memory left on {args.device} at step {trainer.state.global_step}; estimated: {found}",
            hint="raise 'accumulate', or lower 'batch'; the last checkpoint stays",
        ) from error
    if not config.evaluate_every:  # otherwise the Trainer has evaluated after the last step
        trainer.evaluate()
    state = _gathered(trainer.accelerator.unwrap_model(trainer.model))
    if args.process_index == 0:
        record = _record(config, files, corpora, args)
        processor = tokenizer if pictures is None else make_processor(pictures, architecture, tokenizer)
        _publish(folder, work, path, architecture, state, processor, config, record)
    trainer.accelerator.wait_for_everyone()
    return folder


# -- before -------------------------------------------------------------------------------------------------------


def _check_same(run: dict[str, Any], work: Path) -> None:
    """Raise EffpassError if config or data differ from those that the run began with."""
    before = json.loads((work / RUN).read_text())
    changed = [key for key in run["config"] if before["config"].get(key) != run["config"][key]]
    if changed:
        raise EffpassError(
            f"the config is not the one that the run in {work} began with: {', '.join(changed)} changed",
            hint="go on with the old config, or start anew in another folder",
        )
    for source, files in run["data"].items():
        old = {f["name"]: f["sha256"] for f in before["data"][source]}
        new = {f["name"]: f["sha256"] for f in files}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                what = "is new" if name not in old else "is gone" if name not in new else "has changed"
                raise EffpassError(f"data[{source}]: {name} {what} since the run in {work} began")


def _prepare(work: Path, run: dict[str, Any], config: Config, files: dict[int, list[TextFile]], tokenizer: Any) -> None:
    """Tokenize the text and record the run in the folder `work`, which is removed again if that fails."""
    try:
        for i, found in files.items():
            text_tokenizer = None if config.tokenizer == "bytes" else tokenizer
            write_corpus(work / "data" / str(i), found, text_tokenizer, config.held_out, config.seed, f"data[{i}]")
        MicroBatches(config, {i: read_corpus(work / "data" / str(i)) for i in files})
        (work / "checkpoints").mkdir(parents=True)
        write_text(work / RUN, json.dumps(run, indent=2))
    except EffpassError:
        shutil.rmtree(work, ignore_errors=True)  # it holds no results yet
        raise


# -- after --------------------------------------------------------------------------------------------------------


def _record(config: Config, files: dict[int, list[TextFile]], corpora: dict[int, Corpus], args: Any) -> dict[str, Any]:
    """Return what ``training.json`` says about the run, without weights and metrics."""
    names = source_names(config)
    data = []
    for i, source in enumerate(config.data):
        entry: dict[str, Any] = {"name": names[i], "weight": source.weight}
        if i in corpora:
            corpus = corpora[i]
            entry |= {"tokens": len(corpus.training), "held_out_tokens": len(corpus.held_out)}
            entry["files"] = [{"name": f.name, "sha256": f.sha256, "bytes": f.bytes} for f in files[i]]
        elif source.task is not None:
            entry |= {"task": source.task, "options": source.options}
        else:
            entry |= {"pictures": source.pictures}
        data.append(entry)
    is_cuda = args.device.type == "cuda"
    return {
        "seed": config.seed,
        "steps": config.steps,
        "tokens": sum(s.steps * s.batch * s.sequence_length for s in config.stages),
        "optimizer": config.optimizer.name,
        "data": data,
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if is_cuda else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        },
    }


def _publish(
    folder: Path,
    work: Path,
    path: Path,
    architecture: Any,
    state: dict[str, torch.Tensor],
    processor: Any,
    config: Config,
    record: dict[str, Any],
) -> None:
    """Write the output folder atomically, and remove the working folder."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        architecture.use_cache = True  # the Trainer sets it to False
        model = make_model(architecture, None, 0)
        _load(model, state)
        model.to(getattr(torch, config.dtype))
        model.save_pretrained(temporary)  # type: ignore[operator]
        processor.save_pretrained(temporary)
        shutil.copyfile(path, temporary / "training.yaml")
        shutil.copyfile(work / METRICS, temporary / METRICS)
        lines = read_metrics(work / METRICS)
        plot_losses(lines, temporary / "loss.png")
        weights = sorted(temporary.glob("*.safetensors"))
        record["weights_sha256"] = {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in weights}
        record["parameters"] = sum(p.numel() for p in model.parameters())
        final = {key: value for line in lines for key, value in line.items() if key not in ("step", "seconds")}
        record["final"] = final
        record["curves"] = lines
        (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(work)


def _gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights on the host, gathered from all processes if they are sharded; a collective call."""
    state = model.state_dict()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu() for name, t in state.items()}


def _load(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load `state` into `model`, where only tied weights may be missing."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    if unexpected or set(missing) - tied:
        raise EffpassError(f"the trained weights don't fit the model: {[*unexpected, *missing][:4]}")


def _plain(config: Config) -> dict[str, Any]:
    """Return the settings that a resumed run must not change; those of logging, evaluation and saving are left out."""
    free = ("log_every", "evaluate_every", "save_every", "version")
    return json.loads(json.dumps({key: value for key, value in asdict(config).items() if key not in free}))
