"""Training loop of supervised fine-tuning on packed samples, and the loss on held-out samples.

:mod:`.run` creates the trainer. Graded tokens are those whose prediction the loss counts (:mod:`.samples`), and a row
is one sequence of packed samples (:mod:`.packing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from effpass.core.errors import ModelError
from effpass.trainers.balance.tuner import SparsityTuner, documents_of
from effpass.trainers.finetune.balanced import save_tuner
from effpass.trainers.finetune.packing import PackedBatches, make_rows, pack
from effpass.trainers.finetune.processes import ALONE, Processes
from effpass.trainers.finetune.samples import Sample
from effpass.trainers.finetune.settings import Settings
from effpass.trainers.finetune.trained import AdapterTrainer, Trained
from effpass.trainers.loop import Loop
from effpass.trainers.run_folder import Recorder

__all__ = ["HeldOut", "Tuner", "check_packing", "held_out_loss", "training_arguments"]

# Largest change of a logit by another sample in its row, relative to the largest logit; allows for bfloat16 rounding.
_LEAK = 2e-2


@dataclass(frozen=True)
class HeldOut:
    """Loss on held-out samples.

    Attributes:
        loss: mean negative log-likelihood per graded token, in nats.
        error: standard error of the loss, with samples as the random units.
        tokens: number of graded tokens.
    """

    loss: float
    error: float
    tokens: int


def training_arguments(settings: Settings, steps: int, folder: Path) -> TrainingArguments:
    """Return the arguments of the Trainer.

    Creating them starts the process group if torchrun started several processes.
    """
    every = settings.evaluate_every
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.optimizer.clip,
        bf16=settings.dtype == "bfloat16",
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # the filter would synchronize with the device at every micro-batch
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        ignore_data_skip=True,  # the data loader already starts where the checkpoint ended
        ddp_broadcast_buffers=False,  # all processes have loaded the same; a broadcast would wait for the first process
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


class Tuner(AdapterTrainer, Loop):
    """Trainer of supervised fine-tuning.

    Args:
        trained: model with its adapter, if it has one.
        settings: settings of the run.
        args: arguments from :func:`training_arguments`.
        batches: micro-batches of this process.
        first_step: number of steps that are done already.
        recorder: recorder of metrics.
        validation: held-out samples; may be empty.
        sparsity: tuner of the budgets of sparse attention; None to keep them fixed.
        processes: which processes read different data, and which share micro-batches.
    """

    most_workers = 0  # making a micro-batch takes less time than launching a step

    def __init__(
        self,
        trained: Trained,
        settings: Settings,
        args: TrainingArguments,
        batches: PackedBatches,
        first_step: int,
        recorder: Recorder,
        validation: Sequence[Sample] = (),
        sparsity: SparsityTuner | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.trained = trained
        self.processes = processes
        self.sparsity = sparsity
        self.validation = validation
        self.batches = batches
        super().__init__(trained.model, args, batches, first_step, settings.optimizer, settings.schedule, recorder)
        for callback in trained.callbacks():
            self.add_callback(callback)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return all micro-batches of a step, after the tuner has planned the step with them."""
        found = super().get_batch_samples(*args, **kwargs)
        if self.sparsity is not None and found[0]:
            documents = [documents_of(batch) for batch in found[0]]
            self.sparsity.begin_step(documents)
            # Given the document boundaries, attention does not have to search for them.
            for batch, lengths in zip(found[0], documents, strict=True):
                batch["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return [self.processes.part(batch) for batch in found[0]], *found[1:]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.sparsity is not None and "loss" in logs:
            logs |= self.sparsity.metrics()
        super().log(logs, start_time)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.sparsity is not None:  # on each process, before the Trainer's state completes the checkpoint
            save_tuner(self.sparsity, Path(output_dir), self.args.process_index)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return this micro-batch's part of the mean over the graded tokens of a step, plus the router loss, if any."""
        weights, targets = inputs.pop("weights"), inputs.pop("targets")
        outputs = model(**inputs, use_cache=False, **self.asks_router)
        # Gradients are averaged over processes, but the losses of the parts of a micro-batch must be added up.
        loss = (_token_losses(outputs.logits, targets) * weights).sum() * self.processes.sharing
        return self.with_balance(loss, outputs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the held-out loss and its standard error; empty without held-out samples."""
        if not self.validation:
            return {}
        with self.compute_loss_context_manager():
            found = held_out_loss(self.model, self.validation, self.batches, self.processes)
        metrics = {"eval_loss_validation": found.loss, "eval_error_validation": found.error}
        self.log(metrics)
        return metrics


@torch.no_grad()
def held_out_loss(model: Any, samples: Sequence[Sample], like: PackedBatches, processes: Processes = ALONE) -> HeldOut:
    """Return the loss on samples, in rows and micro-batches like those of training.

    Args:
        model: model, which is left in its training or evaluation mode.
        samples: held-out samples.
        like: micro-batches of training, which determine packing, row length and rows per micro-batch. Rows are longer
            if the longest sample requires it.
        processes: which processes share micro-batches; the others do the same work.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    length = max(like.length, *(len(sample.tokens) for sample in samples))
    order = range(len(samples))
    rows = pack(samples, order, length) if like.is_packed else [[number] for number in order]
    size = max(1, like.batch // (like.accumulate * like.world))
    sums, counts = [], []
    # Eager, because compiled layers would be recompiled for every shape.
    with torch.compiler.set_stance("force_eager"):
        for first in range(0, len(rows), size):
            part = [[samples[n] for n in row] for row in rows[first : first + size]]
            widest = max(sum(len(sample.tokens) for sample in row) for row in part)
            batch = {name: value.to(device) for name, value in make_rows(part, widest, like.pad).items()}
            batch = processes.part(batch)
            graded, owner, targets = (batch.pop(name) for name in ("graded", "sample", "targets"))
            logits = model(**batch, use_cache=False).logits
            weights, owners = graded.flatten().double(), owner.flatten()
            none = weights.new_zeros(sum(map(len, part)))
            losses = _token_losses(logits, targets).flatten() * weights
            sums.append(processes.total(none.index_add(0, owners, losses)).cpu())
            counts.append(processes.total(none.index_add(0, owners, weights)).cpu())
    model.train(was_training)
    total, tokens = torch.cat(sums), torch.cat(counts)
    loss = float(total.sum() / tokens.sum())
    spread = float(((total - loss * tokens) ** 2).sum()) * len(total) / max(1, len(total) - 1)
    return HeldOut(loss, math.sqrt(spread) / float(tokens.sum()), int(tokens.sum()))


@torch.no_grad()
def check_packing(model: Any, dtype: torch.dtype) -> None:
    """Raise ModelError if a packed sample changes the logits of the next sample in its row.

    This happens if layers carry a state along the row, or if attention does not use transformers' masks.
    """
    was_training, device = model.training, next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    model.eval()
    ids = torch.arange(16, device=device)[None] * 7 % vocabulary
    other = torch.cat([(ids[:, :8] + 1) % vocabulary, ids[:, 8:]], dim=1)
    positions = torch.arange(8, device=device).repeat(2)[None]
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    way_out = "--no-packing gives each sample a row of its own"
    try:
        with autocast:
            one, two = (model(input_ids=i, position_ids=positions, use_cache=False).logits[:, 8:] for i in (ids, other))
    except ModelError as error:  # a hybrid whose layers can't be told where samples end
        raise ModelError(f"{type(model).__name__} takes no packed samples: {error}", hint=way_out) from None
    finally:
        model.train(was_training)
    if float((one - two).abs().max()) > _LEAK * float(one.abs().max()):
        raise ModelError(f"{type(model).__name__} lets packed samples see each other", hint=way_out)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of `targets`, float32 `[B, T]`, from logits `[B, T, vocabulary]`."""
    losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)
