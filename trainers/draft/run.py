"""The training run of `effpass train draft`, from a model and a file of prompts or texts to a draft head.

During training, answers, checkpoints and metrics are in ``FOLDER.training``. ``FOLDER`` is created when training is
complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effpass.core.errors import EffpassError
from effpass.core.model import LoadedModel, load_model
from effpass.runtime.speculative.eagle_format import read_head, write_head
from effpass.runtime.speculative.eagle_head import EagleHead
from effpass.trainers.draft.answers import answer, read_prompts
from effpass.trainers.draft.head import frequent_tokens, head_config, layers_of, new_head
from effpass.trainers.draft.loop import DraftLoop
from effpass.trainers.draft.memory import estimate
from effpass.trainers.draft.plot import plot_acceptance
from effpass.trainers.draft.settings import Settings
from effpass.trainers.draft.target import Target
from effpass.trainers.finetune.loop import check_packing, training_arguments
from effpass.trainers.finetune.packing import PackedBatches, check_lengths, row_length
from effpass.trainers.finetune.run import begin, check_plots, check_same, explained, learned_line, pad_token, read_model
from effpass.trainers.finetune.samples import Sample, file_hash, read_samples
from effpass.trainers.finetune.trained import Trained, make_trained
from effpass.trainers.memory import check_memory
from effpass.trainers.run_folder import METRICS, Recorder, check_places, last_checkpoint, read_metrics, same_model

__all__ = ["train_draft"]

# Settings that may change when a run is resumed; the number of micro-batches affects gradients by rounding only.
_FREE = ("accumulate", "log_every", "evaluate_every", "save_every")
_HELD_OUT = 32  # maximum number of held-out texts, which are a twentieth of all


def train_draft(
    source: str,
    data: Path,
    folder: Path,
    settings: Settings,
    *,
    start: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Train an EAGLE-3 head for a model.

    Args:
        source: model, as for `effpass.load_model`.
        data: JSON lines file of prompts (:mod:`effpass.trainers.draft.answers`) or, with ``answers=0``, of texts
            (:mod:`effpass.trainers.finetune.samples`).
        folder: folder of the head to create; must not exist.
        settings: settings of the run.
        start: folder of a head to continue from; None for a new head.
        resume: whether to continue from the last checkpoint in ``FOLDER.training``.
        say: function that receives messages for the user.

    Returns:
        `folder`, which holds the head in the `speculators` format, ``training.json``, ``metrics.jsonl`` and
        ``acceptance.png``.

    Raises:
        EffpassError: if settings or data are unsuitable, the device has too little memory, or `folder` exists.
        ModelError: if the model can't be read, or no head can be created for its architecture.
    """
    work = folder.with_name(f"{folder.name}.training")
    check_places(folder, work, resume)
    check_plots()
    if settings.method != "full" and start is None:
        raise EffpassError(
            f"{settings.method} adapts a head that there is", hint="--from HEAD, or --method full for a new one"
        )
    config, tokenizer = read_model(source)
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
    if settings.sequence_length is not None and settings.sequence_length > most:
        raise EffpassError(f"sequence_length: got {settings.sequence_length}, and {source} has {most} positions")
    # Texts are checked before the folder is made; answers are kept in it.
    texts = None if settings.answers else _texts(read_samples(data, tokenizer), data, settings, most)
    prompts = read_prompts(data, tokenizer) if settings.answers else []
    run = {
        "command": "draft",
        "model": source,
        "data": file_hash(data),
        "from": None if start is None else str(start),
        "settings": {key: value for key, value in _plain(settings).items() if key not in _FREE},
    }
    if resume:
        check_same(run, work)
    args = training_arguments(settings, 1, work / "checkpoints")  # type: ignore[arg-type]
    if args.world_size > 1:
        raise EffpassError(f"{args.world_size} processes: a head learns in one", hint="start it without torchrun")
    loaded = load_model(source, dtype=settings.dtype)
    original = same_model(work, loaded.model)
    loaded.model.to(args.device)
    layers = layers_of(loaded.model)
    shape = head_config(config, settings.taps, settings.vocabulary, layers)
    head = None if start is None else _read_start(start, shape, layers)
    checkpoint, first_step = last_checkpoint(work) if resume else (None, 0)
    begin(work, run, first_step, original, resume=resume)
    samples, length = texts or _answered(loaded, prompts, work, settings, most, say)
    held_out, samples = _split(samples, settings.seed)
    bfloat16 = settings.dtype == "bfloat16"
    found = estimate(
        config, shape, settings.optimizer.name, rows=settings.batch // settings.accumulate, length=length,
        steps=settings.unrolled, bfloat16=bfloat16, device=args.device,
    )  # fmt: skip
    say(str(found))
    if args.device.type == "cuda":  # the model's weights are allocated already
        found = type(found)(found.parameters, found.state, found.activations, found.where, torch.cuda.mem_get_info()[1])
    check_memory(found, "raise --accumulate, or lower --batch, --sequence-length or --unrolled")
    batches = PackedBatches(
        samples, length=length, batch=settings.batch, accumulate=settings.accumulate, steps=settings.steps,
        epochs=settings.epochs, seed=settings.seed, pad=pad_token(tokenizer),
    )  # fmt: skip
    args.max_steps = batches.steps
    graded = sum(int(s.graded.sum()) for s in samples)
    say(
        f"{len(samples)} texts and {len(held_out)} held out, {graded} graded tokens; {batches.steps} steps of"
        f" {settings.batch} rows of {length} tokens, {batches.filling:.0%} full, {batches.passes:.3g} epochs"
    )
    trained = _trained(loaded, shape, samples, settings, head, batches.steps, args.device)
    say(learned_line(trained))
    check_packing(loaded.model, getattr(torch, settings.dtype))
    recorder = Recorder(work / METRICS, batches.steps, say, ("loss", "eval_", "anneal"))
    target = Target(loaded.model, trained.model.head_config.taps)
    trainer = DraftLoop(trained, target, settings, args, batches, first_step, recorder, held_out)
    autocast = trained.under_autocast() if bfloat16 else nullcontext()
    with explained(found, work, say, "--resume with a larger --accumulate"), autocast:
        if first_step == 0:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if not settings.evaluate_every:  # otherwise the Trainer has evaluated after the last step
            trainer.evaluate()
    facts = {**run, "steps": batches.steps, "sequence_length": length, "texts": len(samples), "graded": graded,
             "device": str(args.device)}  # fmt: skip
    _publish(folder, work, trained, loaded, settings, facts)
    say(f"saved {folder}")
    return folder


def _texts(samples: list[Sample], data: Path, settings: Settings, most: int) -> tuple[list[Sample], int]:
    """Return the texts of the data as samples to train on, and the number of tokens per row."""
    length = settings.sequence_length
    if length is None:
        length = min(most, row_length(samples))
    check_lengths(samples, length, data, most)
    return samples, length


def _answered(
    loaded: LoadedModel, prompts: list[Any], work: Path, settings: Settings, most: int, say: Callable[[str], None]
) -> tuple[list[Sample], int]:
    """Return the prompts with the model's answers as samples to train on, and the number of tokens per row."""
    length = settings.sequence_length
    room = most if length is None else length
    samples = answer(
        loaded, prompts, work / "answers.jsonl", most=settings.answers, length=room, temperature=settings.temperature,
        seed=settings.seed, say=say,
    )  # fmt: skip
    if len(samples) < len(prompts):
        say(f"{len(prompts) - len(samples)} prompts have no room for an answer in {room} tokens, or got none")
    if length is None:
        length = min(most, row_length(samples))
    return samples, length


def _split(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split the samples into held-out texts and training texts."""
    if len(samples) < 2:
        raise EffpassError("one text alone is nothing to learn from", hint="give more lines")
    count = max(1, min(_HELD_OUT, len(samples) // 20))
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    return [samples[i] for i in sorted(order[:count])], [samples[i] for i in sorted(order[count:])]


def _trained(
    loaded: LoadedModel, shape: Any, samples: list[Sample], settings: Settings, head: EagleHead | None, steps: int,
    device: torch.device,
) -> Trained:  # fmt: skip
    """Return `head`, or a new head if it is None, with float32 weights to train and the embeddings of the model."""
    if head is None:
        tokens = frequent_tokens(samples, shape.draft_vocabulary, shape.layer.vocab_size)
        head = new_head(loaded.model, shape, tokens, settings.seed)
    else:
        head.share(loaded.model)
        for name, parameter in head.named_parameters():
            if not name.startswith("embed_tokens"):
                parameter.data = parameter.data.to(device, torch.float32)
        head.to(device)
    learns = [p for name, p in head.named_parameters() if not name.startswith("embed_tokens")]
    if settings.method == "full":
        for parameter in learns:
            parameter.requires_grad_(True)
        return Trained(head)
    torch.manual_seed(settings.seed)
    anneal = settings.anneal.schedule(steps) if settings.method == "afa-lora" else None
    return make_trained(head, settings.method, settings.lora, settings.anneal, anneal)


def _read_start(start: Path, shape: Any, layers: Any) -> EagleHead:
    """Load the head to continue from, and check that it fits the model."""
    head = read_head(start, layers)
    ours, theirs = shape.layer, head.config
    if (ours.hidden_size, ours.vocab_size) != (theirs.hidden_size, theirs.vocab_size):
        raise EffpassError(
            f"{start} is a head of width {theirs.hidden_size} with {theirs.vocab_size} tokens, and the model has"
            f" {ours.hidden_size} and {ours.vocab_size}",
            hint="give a head of this model",
        )
    return head


def _publish(
    folder: Path, work: Path, trained: Trained, loaded: LoadedModel, settings: Settings, facts: dict[str, Any]
) -> None:
    """Write the result to a temporary folder, rename it to `folder`, and remove the working folder."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    head: Any = trained.finish()
    if trained.peft is not None:
        head = trained.afa.merge() if trained.afa is not None else head.merge_and_unload()
    dtype = getattr(torch, settings.dtype)
    for name, parameter in head.named_parameters():
        if not name.startswith("embed_tokens"):
            parameter.data = parameter.data.to(dtype)
    try:
        name = loaded.name
        verifier = str(Path(name).resolve()) if Path(name).is_dir() else name
        write_head(
            head, temporary, verifier=verifier, architecture=type(loaded.model).__name__, tokens=settings.unrolled
        )
        shutil.copyfile(work / METRICS, temporary / METRICS)
        lines = read_metrics(work / METRICS)
        plot_acceptance(lines, temporary / "acceptance.png")
        record = {
            **facts,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "weights_sha256": hashlib.sha256((temporary / "model.safetensors").read_bytes()).hexdigest(),
            "final": {key: value for line in lines for key, value in line.items() if key not in ("step", "seconds")},
        }
        (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(work)


def _plain(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))
