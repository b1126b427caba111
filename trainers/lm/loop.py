"""Training loop of a pretraining run: transformers' Trainer with the run's data, loss, optimizer and metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from effpass.core.errors import EffpassError
from effpass.trainers.lm.batches import MicroBatches, evaluation_batches, source_names
from effpass.trainers.lm.config import Config
from effpass.trainers.lm.pictures_input import model_inputs
from effpass.trainers.loop import Loop
from effpass.trainers.run_folder import Recorder

__all__ = ["Pretrainer", "training_arguments"]


def training_arguments(config: Config, folder: Path) -> TrainingArguments:
    """Return the arguments of the Trainer.

    Creating them starts the process group if torchrun started several processes.
    """
    every = config.evaluate_every
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        gradient_accumulation_steps=config.accumulate,
        max_grad_norm=config.optimizer.clip,
        bf16=config.dtype == "bfloat16",
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # the filter would synchronize with the device at every micro-batch
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=2,
        ignore_data_skip=True,  # the data loader already starts where the checkpoint ended
        fsdp=config.fsdp or None,  # type: ignore[arg-type]  # the annotation is that of the older option, a string
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"} if config.fsdp else None,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


class Pretrainer(Loop):
    """Trainer of a pretraining run.

    Args:
        config: config of the run.
        model: model in float32.
        args: arguments from :func:`training_arguments`.
        batches: micro-batches of this process.
        first_step: number of steps that are done already.
        metrics: JSON lines file to which the first process appends metrics.
        say: function that receives messages for the user, called in the first process only.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        args: TrainingArguments,
        batches: MicroBatches,
        first_step: int,
        metrics: Path,
        say: Callable[[str], None],
    ) -> None:
        recorder = Recorder(metrics, config.steps, say, ("loss", "loss_", "eval_"), writes=args.should_save)
        super().__init__(model, args, batches, first_step, config.optimizer, config.schedule, recorder)
        self.run_config = config
        self.batches = batches
        self.names = source_names(config)
        self._losses = torch.zeros(2, len(self.names), device=args.device)  # sums and counts since the last log line

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.device.type == "cpu":  # accelerate itself shards on GPUs only
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of any architecture; some save weights under other names than in memory."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        mine: Any = self.model
        saved, found = type(mine).from_pretrained(
            resume_from_checkpoint, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        lacking = sorted(found["missing_keys"])
        if lacking:
            raise EffpassError(f"{resume_from_checkpoint} lacks {', '.join(lacking[:4])}", hint="start anew")
        mine.load_state_dict(saved.state_dict())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the mean of the weighted losses of the sequences, plus the router loss, if the model has one."""
        outputs = model(**model_inputs(inputs), use_cache=False, **self.asks_router)
        losses = _sequence_losses(outputs.logits, inputs)
        self._losses.index_add_(1, inputs["source"], torch.stack([losses.detach(), torch.ones_like(losses)]))
        return self.with_balance(losses.mean(), outputs)

    # -- metrics --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._log_losses(logs)
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the held-out loss of each source in nats per graded token, and the accuracy of tasks and pictures."""
        model, config = self.model, self.run_config
        assert model is not None
        stage = config.stages[self.batches.stage_of(max(0, min(self.state.global_step, config.steps) - 1))[0]]
        sums = torch.zeros(3, len(self.names), device=self.args.device)
        model.eval()
        # Eager, because compiled layers would be recompiled for every shape.
        with torch.no_grad(), self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            for batch in evaluation_batches(config, self.batches.corpora, stage, self.batches.pictures):
                batch = self._prepare_inputs(batch)
                logits = model(**model_inputs(batch), use_cache=False).logits
                is_wrong = (logits[:, :-1].argmax(-1) != batch["input_ids"][:, 1:]) & (batch["weights"][:, 1:] > 0)
                is_right = ~is_wrong.any(1)
                losses = _sequence_losses(logits, batch)
                sums.index_add_(1, batch["source"], torch.stack([losses, is_right.float(), torch.ones_like(losses)]))
        model.train()
        metrics: dict[str, float] = {"eval_sequence_length": stage.sequence_length}
        for name, source, (loss, right, count) in zip(self.names, config.data, sums.T.tolist(), strict=True):
            if count:
                metrics[f"eval_loss_{name}"] = loss / count
                metrics |= {} if source.text is not None else {f"eval_accuracy_{name}": right / count}
        self.log(metrics)
        return metrics

    def _log_losses(self, logs: dict[str, float]) -> None:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(self._losses)
        sums, counts = self._losses.tolist()
        self._losses.zero_()
        logs |= {f"loss_{name}": s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}


def _sequence_losses(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the weighted loss of each sequence, float32 `[B]`, from logits `[B, T, vocabulary]`."""
    ids, weights = batch["input_ids"][:, 1:], batch["weights"][:, 1:]
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids.flatten(), reduction="none")
    return (losses.view_as(weights) * weights).sum(1)
