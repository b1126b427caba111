"""transformers' Trainer with our data, loss, optimisers and metrics."""

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
    """What the Trainer is told; making it starts the process group where torchrun started several processes."""
    every = config.evaluate_every
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        gradient_accumulation_steps=config.accumulate,
        max_grad_norm=config.optimizer.clip,
        bf16=config.dtype == "bfloat16",
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it waits for the device at every micro-batch
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=2,
        ignore_data_skip=True,  # our loader begins where the checkpoint ended
        fsdp=config.fsdp or None,  # type: ignore[arg-type]  # its annotation is that of the older, textual option
        fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"} if config.fsdp else None,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


class Pretrainer(Loop):
    """The loop.

    Args:
        config: of the run.
        model: in float32.
        args: of :func:`training_arguments`.
        batches: micro-batches of this process.
        first_step: how many steps are done already.
        metrics: JSON-lines file that the first process appends to.
        say: gets a line for people now and then, in the first process.
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
        self._losses = torch.zeros(2, len(self.names), device=args.device)  # sums and counts, since the last line

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.device.type == "cpu":  # accelerate shards on GPUs alone
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's, but of every kind of model: some are saved under other names than they have in memory."""
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
        """The mean over sequences of each sequence's weighted loss, plus the router's where the model has one."""
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
        """Held-out loss of each source, nats for a graded token; of tasks and pictures the share of right answers."""
        model, config = self.model, self.run_config
        assert model is not None
        stage = config.stages[self.batches.stage_of(max(0, min(self.state.global_step, config.steps) - 1))[0]]
        sums = torch.zeros(3, len(self.names), device=self.args.device)
        model.eval()
        # Compiled layers would be compiled once more for every shape that occurs here.
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
    """The weighted loss of each sequence: float32 `[B]` of logits `[B, T, vocab]`."""
    ids, weights = batch["input_ids"][:, 1:], batch["weights"][:, 1:]
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids.flatten(), reduction="none")
    return (losses.view_as(weights) * weights).sum(1)
