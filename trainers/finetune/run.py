"""A complete supervised run: from a model and a file of samples to a checkpoint or an adapter.

:func:`tune` implements `effpass train sft` and `effpass train afa-lora`; other training runs use its parts. During the
run, checkpoints and metrics are in ``FOLDER.training``, from which it can be resumed. `FOLDER` is created when the run
is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from effpass.core.errors import EffpassError, ModelError
from effpass.core.fingerprint import Fingerprint
from effpass.core.model import load_model, read_source
from effpass.core.whole import write_text
from effpass.trainers.balance.plot import plot_balance
from effpass.trainers.balance.table import read_table, write_table
from effpass.trainers.finetune.balanced import LATENCY, BalancedRows, load_tuner, make_sparse
from effpass.trainers.finetune.loop import Tuner, check_packing, training_arguments
from effpass.trainers.finetune.memory import estimate, host_line
from effpass.trainers.finetune.packing import PackedBatches, check_lengths, row_length
from effpass.trainers.finetune.processes import Processes
from effpass.trainers.finetune.samples import file_hash, read_samples
from effpass.trainers.finetune.settings import Settings
from effpass.trainers.finetune.trained import Trained, check_trainable, make_trained
from effpass.trainers.lm.model import compile_layers, set_experts
from effpass.trainers.lm.plots import plot_losses
from effpass.trainers.memory import Estimate, check_memory
from effpass.trainers.run_folder import (
    METRICS,
    RUN,
    Recorder,
    check_places,
    cut_metrics,
    keep_model,
    last_checkpoint,
    read_metrics,
    same_model,
)

__all__ = ["begin", "check_plots", "check_same", "explained", "learned_line", "load", "publish", "read_model", "tune"]

# Settings that may differ between a run and its resumption. The number of micro-batches changes only the rounding.
_FREE = ("accumulate", "log_every", "evaluate_every", "save_every")
# Metrics that are reported to the user.
_SHOWN = ("loss", "eval_", "anneal", "balance_imbalance", "balance_bubble", "balance_budget", "balance_coverage")


def tune(
    source: str,
    data: Path,
    folder: Path,
    settings: Settings,
    *,
    validation: Path | None = None,
    latencies: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Fine-tune a model on samples.

    Args:
        source: model, as `effpass.load_model` accepts it.
        data: JSON lines file: see :mod:`effpass.trainers.finetune.samples`.
        folder: output folder; must not exist.
        settings: settings of the run.
        validation: file of held-out samples in the same forms; None for none.
        latencies: latency table for a balanced run; None for the one in the cache.
        resume: whether to resume from the last checkpoint in ``FOLDER.training``.
        say: function that receives messages for the user, called in the first process only.

    Returns:
        `folder`, which holds a transformers checkpoint with its tokenizer, or a PEFT adapter, and ``training.json``
        (settings, hash of the data, final losses), ``metrics.jsonl``, ``loss.png`` and, for a balanced run,
        ``balance.png``.

    Raises:
        EffpassError: if the settings or the data are invalid, the device has too little memory, or the output exists
            already.
        ModelError: if the model can't be read or trained.
    """
    work = folder.with_name(f"{folder.name}.training")
    check_places(folder, work, resume)
    check_plots()
    if latencies is not None:
        read_table(latencies)
    config, tokenizer = read_model(source)
    samples = read_samples(data, tokenizer)
    held_out = read_samples(validation, tokenizer) if validation is not None else []
    length = settings.sequence_length
    if length is None:
        length = row_length(samples)
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", length)
    if settings.sequence_length is None:
        length = min(length, most)
    if length > most:
        raise EffpassError(f"sequence_length: got {length}, and {source} has {most} positions")
    check_lengths(samples, length, data, most)
    if held_out:
        check_lengths(held_out, most, validation, most)
    run = {
        "command": "tune",
        "model": source,
        "data": file_hash(data),
        "validation": None if validation is None else file_hash(validation),
        "settings": {key: value for key, value in _plain(settings).items() if key not in _FREE},
    }
    if resume:
        check_same(run, work)
    args = training_arguments(settings, 1, work / "checkpoints")
    say = say if args.should_save else lambda line: None
    processes = Processes.of(args, settings.context, config)
    is_balanced = settings.sparse is not None and settings.sparse.is_balanced
    batches = (BalancedRows if is_balanced else PackedBatches)(
        samples, length=length, batch=settings.batch, accumulate=settings.accumulate, steps=settings.steps,
        epochs=settings.epochs, seed=settings.seed, is_packed=settings.is_packed, pad=pad_token(tokenizer),
        rank=processes.rank, world=processes.world,
    )  # fmt: skip
    args.max_steps = batches.steps
    schedule = settings.anneal.schedule(batches.steps) if settings.method == "afa-lora" else None
    graded, total = sum(int(s.graded.sum()) for s in samples), sum(len(s.tokens) for s in samples)
    say(
        f"{len(samples)} samples, {graded} graded tokens of {total}; {batches.steps} steps of {settings.batch}"
        f" row{'s' * (settings.batch > 1)} of up to {length} tokens, {batches.filling:.0%} full, {batches.passes:.3g}"
        f" epoch{'s' * (batches.passes != 1)}"
    )
    bfloat16 = settings.dtype == "bfloat16"
    found = estimate(
        config, settings.method, settings.lora, settings.optimizer.name,
        rows=settings.batch // (settings.accumulate * processes.world), length=length, bfloat16=bfloat16,
        device=args.device, sparse=settings.sparse, sharing=processes.sharing,
    )  # fmt: skip
    say(f"{found}; {host_line(found, args.device)}")
    check_memory(found, "raise --accumulate, lower --batch, or fine-tune an adapter: --method lora")
    trained, original = load(source, settings, schedule, args.device, work)
    set_experts(trained.model)
    say(learned_line(trained))
    sparse = None
    if settings.sparse is not None:
        kept = work / LATENCY if resume else latencies
        dtype = getattr(torch, settings.dtype)
        sparse = make_sparse(trained.model, settings.sparse, batches, dtype, kept, say, processes)
    if settings.is_packed:
        check_packing(trained.model, getattr(torch, settings.dtype))
    checkpoint, first_step = last_checkpoint(work) if resume else (None, 0)
    args.distributed_state.wait_for_everyone()  # none may still look for a folder that this run is about to make
    if args.process_index == 0:
        begin(work, run, first_step, original, resume=resume)
        if sparse is not None and sparse.table is not None:
            write_table(work / LATENCY, sparse.table)
    if resume:
        say(f"going on from step {first_step}")
    sparsity = None if sparse is None else sparse.tuner
    if sparsity is not None and checkpoint is not None:
        load_tuner(sparsity, checkpoint, args.process_index)
    if settings.compile:
        compile_layers(trained.model)
    recorder = Recorder(work / METRICS, batches.steps, say, _SHOWN, writes=args.should_save)
    trainer = Tuner(trained, settings, args, batches, first_step, recorder, held_out, sparsity, processes)
    autocast = trained.under_autocast() if bfloat16 else nullcontext()
    with explained(found, work, say, "--resume with a larger --accumulate"), autocast:
        if first_step == 0:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if not settings.evaluate_every:  # otherwise the Trainer has evaluated after the last step
            trainer.evaluate()
    if sparse is not None:
        sparse.close()
    if args.process_index == 0:
        facts = {**run, "steps": batches.steps, "passes": round(batches.passes, 3), "sequence_length": length,
                 "samples": len(samples), "device": str(args.device), "processes": args.world_size}  # fmt: skip
        publish(folder, work, trained, tokenizer, settings.dtype, facts)
    trainer.accelerator.wait_for_everyone()
    say(f"saved {folder}")
    return folder


# -- before -----------------------------------------------------------------------------------------------------------


def read_model(source: str) -> tuple[Any, Any]:
    """Return config and tokenizer of a model that can be trained, without reading its weights."""
    config, tokenizer = read_source(source)
    check_trainable(config, source)
    if tokenizer is None:
        raise ModelError(f"{source} has no tokenizer", hint="tokenizer.save_pretrained(folder)")
    return config, tokenizer


def load(source: str, settings: Any, schedule: Any, device: torch.device, work: Path) -> tuple[Trained, Fingerprint]:
    """Return the model on `device`, with the adapter that `settings` specify, and the fingerprint of the model alone.

    Raises:
        EffpassError: if the run in `work`, which is resumed, began with another model.
    """
    frozen = settings.method != "full"
    model = load_model(source, dtype=settings.dtype if frozen else "float32").model.to(device)
    original = same_model(work, model)
    torch.manual_seed(settings.seed)
    return make_trained(model, settings.method, settings.lora, settings.anneal, schedule), original


def check_plots() -> None:
    """Raise EffpassError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EffpassError("loss plots need matplotlib, which is not installed", hint="pip install 'effpass[train]'")


def check_same(run: dict[str, Any], work: Path) -> None:
    """Raise EffpassError if the run in `work` began with other settings or data."""
    before = json.loads((work / RUN).read_text())
    old, new = _flat(before), _flat(json.loads(json.dumps(run)))
    changed = [
        f"{key.removeprefix('settings.')} {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise EffpassError(
            f"this is not the run that began in {work}: {'; '.join(changed)}",
            hint="go on with the old settings, or start anew in another folder",
        )


def begin(work: Path, run: dict[str, Any], first_step: int, model: Fingerprint, *, resume: bool) -> None:
    """Create the folder of a run, or remove the metrics after the checkpoint from which it is resumed."""
    if not resume:
        (work / "checkpoints").mkdir(parents=True)
        keep_model(work, model)
        write_text(work / RUN, json.dumps(run, indent=2))
    cut_metrics(work / METRICS, first_step if first_step else -1)


def pad_token(tokenizer: Any) -> int:
    """Return the id of the token that fills rows; the loss does not count it, and no sample attends to it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def learned_line(trained: Trained) -> str:
    """Return a message about which share of the parameters is trained."""
    parameters = list(trained.model.named_parameters())
    learned = sum(p.numel() for _, p in parameters if p.requires_grad)
    line = f"{learned / 1e6:.3f} M of {sum(p.numel() for _, p in parameters) / 1e6:.3f} M parameters learn"
    stacked = sum(p.numel() for n, p in parameters if p.ndim == 3 and ".experts." in n and not p.requires_grad)
    return line + (f"; {stacked / 1e6:.2f} M of stacked experts have no adapter" if stacked else "")


@contextmanager
def explained(found: Estimate, work: Path, say: Callable[[str], None], hint: str) -> Iterator[None]:
    """Turn an interruption or a lack of memory inside this context into a message that says how to continue.

    Args:
        found: memory estimate of the run.
        work: working folder of the run.
        say: function that receives messages for the user.
        hint: hint for a lack of memory.
    """
    try:
        yield
    except KeyboardInterrupt:
        checkpoint, step = last_checkpoint(work)
        say("stopped: --resume goes on from " + ("the beginning" if checkpoint is None else f"step {step}"))
        raise
    except torch.OutOfMemoryError as error:
        raise EffpassError(f"no memory left on the device; estimated: {found}", hint=hint) from error


# -- after ------------------------------------------------------------------------------------------------------------


def publish(folder: Path, work: Path, trained: Trained, tokenizer: Any, dtype: str, facts: dict[str, Any]) -> None:
    """Write the output folder atomically, and remove the working folder."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        result = trained.finish()
        if trained.peft is None:
            result.config.use_cache = True  # the Trainer sets it to False
            result.to(getattr(torch, dtype))
            tokenizer.save_pretrained(temporary)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns if it finds no config to compare the embeddings' size with
            result.save_pretrained(temporary)
        shutil.copyfile(work / METRICS, temporary / METRICS)
        lines = read_metrics(work / METRICS)
        plot_losses(lines, temporary / "loss.png")
        if any("balance_imbalance" in line for line in lines):
            plot_balance(lines, temporary / "balance.png")
        weights = sorted(temporary.glob("*.safetensors"))
        record = {
            **facts,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
            | {"python": platform.python_version()},
            "weights_sha256": {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in weights},
            "final": {key: value for line in lines for key, value in line.items() if key not in ("step", "seconds")},
        }
        (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(work)


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return found
