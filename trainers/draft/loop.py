"""The training loop of a draft head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from effpass.runtime.speculative.eagle_head import EagleHead
from effpass.trainers.draft.loss import accepted, divergence
from effpass.trainers.draft.settings import Settings
from effpass.trainers.draft.target import Target
from effpass.trainers.draft.unrolled import unroll
from effpass.trainers.finetune.packing import PackedBatches, make_rows, pack
from effpass.trainers.finetune.samples import Sample
from effpass.trainers.finetune.trained import AdapterTrainer, Trained
from effpass.trainers.loop import Loop
from effpass.trainers.run_folder import Recorder

__all__ = ["DraftLoop", "known_tokens"]


class DraftLoop(AdapterTrainer, Loop):
    """Trains a head to predict the distribution of its model.

    Args:
        trained: the head, with its adapter if there is one.
        target: the model.
        settings: settings of the run.
        args: training arguments of the transformers `Trainer`.
        batches: training batches.
        first_step: number of steps that were done before this run was resumed.
        recorder: recorder of metrics.
        held_out: texts to evaluate on.
    """

    most_workers = 0  # building a batch takes less time than queueing a step

    def __init__(
        self,
        trained: Trained,
        target: Target,
        settings: Settings,
        args: TrainingArguments,
        batches: PackedBatches,
        first_step: int,
        recorder: Recorder,
        held_out: Sequence[Sample],
    ) -> None:
        self.trained, self.target, self.settings = trained, target, settings
        self.batches, self.held_out = batches, held_out
        self.known = known_tokens(trained.model)
        super().__init__(trained.model, args, batches, first_step, settings.optimizer, settings.schedule, recorder)
        for callback in trained.callbacks():
            self.add_callback(callback)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        ids, positions = inputs["input_ids"], inputs["position_ids"]
        seen = self.target.see(ids, positions)
        proposed = unroll(self.trained.model, ids, positions, seen.features, self.settings.unrolled)
        weights = inputs["weights"]
        return divergence(proposed, seen.logits, self.known, positions, weights, self.settings.decay)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["tokens"] = float(self.state.global_step * self.batches.batch * self.batches.length)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Compute the loss on held-out texts, and the mean number of tokens that a round with a chain emits on them."""
        self.control.should_evaluate = False  # otherwise the Trainer evaluates again at the end of the last epoch
        model, steps, like = self.trained.model, self.settings.unrolled, self.batches
        was_training = model.training
        model.eval()
        length = max(like.length, *(len(sample.tokens) for sample in self.held_out))
        rows = pack(self.held_out, range(len(self.held_out)), length)
        size = max(1, like.batch // (like.accumulate * like.world))
        lost, graded, run, starts = (torch.zeros((), dtype=torch.float64, device=self.known.device) for _ in range(4))
        with self.compute_loss_context_manager():
            for first in range(0, len(rows), size):
                part = [[self.held_out[n] for n in row] for row in rows[first : first + size]]
                batch = {k: v.to(self.known.device) for k, v in make_rows(part, length, like.pad).items()}
                ids, positions = batch["input_ids"], batch["position_ids"]
                seen = self.target.see(ids, positions)
                proposed = unroll(model, ids, positions, seen.features, steps)
                counts = batch["graded"].float()
                lost += divergence(proposed, seen.logits, self.known, positions, counts, self.settings.decay).double()
                graded += counts.sum().double()
                more = accepted(proposed, seen.logits, self.known, positions, batch["graded"])
                run, starts = run + more[0], starts + more[1]
        model.train(was_training)
        metrics = {
            "eval_loss_validation": float(lost / graded),
            "eval_acceptance_length": 1 + float(run / starts.clamp(min=1)),
        }
        self.log(metrics)
        return metrics


def known_tokens(head: EagleHead) -> Tensor:
    """Return the tokens of the target that a head can propose, int64 `[U]`."""
    tokens = torch.arange(head.head_config.draft_vocabulary, device=head.device)
    return tokens if head.d2t is None else tokens + head.d2t
