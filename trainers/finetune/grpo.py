"""Reinforcement learning with a verifiable reward, on TRL's GRPOTrainer (GRPO, arXiv 2402.03300).

In each cycle a group of completions is sampled for each of several prompts, and the model is trained on them in one or
more optimizer steps. Sampling and training must use the same policy, so that their probability ratio is meaningful.
Therefore β of an AFA adapter (:mod:`effpass.trainers.afa_lora`) stays constant within a cycle, dropout is disabled, and
the decode engine samples with the adapter and its activation in place. A merged adapter, as a serving engine would run
it, is another policy while β > 0. :func:`reinforce` implements `effpass train grpo`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from effpass.core.errors import EffpassError, ModelError
from effpass.trainers.afa_lora.lora import LoraSettings
from effpass.trainers.finetune.memory import estimate, host_line
from effpass.trainers.finetune.reward import load_reward
from effpass.trainers.finetune.rollouts import use_engine
from effpass.trainers.finetune.run import (
    begin,
    check_plots,
    check_same,
    explained,
    learned_line,
    load,
    publish,
    read_model,
)
from effpass.trainers.finetune.samples import check_messages, file_hash, read_lines
from effpass.trainers.finetune.settings import Anneal, Method
from effpass.trainers.finetune.trained import AdapterTrainer, Trained
from effpass.trainers.lm.config import OptimizerConfig, Schedule
from effpass.trainers.lm.model import set_experts
from effpass.trainers.lm.optimizers import make_optimizer, rate
from effpass.trainers.loop import MetricsCallback
from effpass.trainers.memory import Estimate, check_memory
from effpass.trainers.run_folder import METRICS, Recorder, check_places, last_checkpoint

__all__ = ["GrpoSettings", "reinforce"]


@dataclass(frozen=True)
class GrpoSettings:
    """Settings of a GRPO run.

    Attributes:
        method: what is trained: all weights, a LoRA adapter, or an AFA adapter.
        optimizer: optimizer with its learning rate.
        schedule: learning rate schedule.
        steps: number of optimizer steps.
        prompts: number of prompts per cycle.
        group: number of completions per prompt.
        updates: number of optimizer steps per cycle, each on its share of the completions.
        accumulate: number of micro-batches per optimizer step.
        max_new_tokens: maximum number of tokens per completion.
        temperature: sampling temperature.
        kl: weight of the KL divergence from the initial model.
        clip_ratio: clipping range ε of the policy ratio.
        lora, anneal: settings of the adapter and of its annealing.
        dtype: dtype of computation.
        seed: seed of the adapter, of the order of prompts and of sampling.
        log_every, save_every: number of steps between log lines and between checkpoints; 0 for no checkpoints.
    """

    optimizer: OptimizerConfig
    method: Method = "lora"
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup=0, kind="constant"))
    steps: int = 100
    prompts: int = 8
    group: int = 8
    updates: int = 1
    accumulate: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    kl: float = 0.0
    clip_ratio: float = 0.2
    lora: LoraSettings = field(default_factory=LoraSettings)
    anneal: Anneal = field(default_factory=Anneal)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    log_every: int = 1
    save_every: int = 50

    def __post_init__(self) -> None:
        least = {"steps": 1, "prompts": 1, "group": 2, "updates": 1, "accumulate": 1, "max_new_tokens": 1}
        least |= {"log_every": 1, "save_every": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise EffpassError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        if self.lora.dropout:
            raise EffpassError(
                f"dropout: got {self.lora.dropout}: what is sampled and what learns would be two policies",
                hint="leave it at 0",
            )
        for name, lowest in (("temperature", 1e-6), ("kl", 0.0), ("clip_ratio", 0.0)):
            if not lowest <= getattr(self, name) < float("inf"):
                raise EffpassError(f"{name}: got {getattr(self, name)}, expected a number from {lowest:g}")
        if self.prompts * self.group % (self.updates * self.accumulate):
            raise EffpassError(
                f"{self.prompts * self.group} completions can't be shared by {self.updates} updates of"
                f" {self.accumulate} micro-batches"
            )
        for name in ("steps", "save_every"):
            if getattr(self, name) % self.updates:
                raise EffpassError(
                    f"{name}: got {getattr(self, name)}, expected whole cycles of {self.updates} updates"
                )
        if self.save_every % self.log_every:
            raise EffpassError(
                f"save_every: got {self.save_every}, expected a multiple of log_every ({self.log_every})"
            )

    @property
    def micro_batch(self) -> int:
        """Number of completions per micro-batch."""
        return self.prompts * self.group // (self.updates * self.accumulate)


def reinforce(
    source: str,
    data: Path,
    reward: str,
    folder: Path,
    settings: GrpoSettings,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Fine-tune a model with rewards for the completions that it samples.

    Args:
        source: model, as `effpass.load_model` accepts it.
        data: JSON lines file with a field `prompt`, a text or a list of messages, and further fields for the reward.
        reward: name of the reward function, ``module:function``: see
            :func:`~effpass.trainers.finetune.reward.load_reward`.
        folder: output folder; must not exist.
        settings: settings of the run.
        resume: whether to resume from the last checkpoint in ``FOLDER.training``.
        say: function that receives messages for the user.

    Returns:
        `folder` with the files that :func:`effpass.trainers.finetune.run.tune` writes; the metrics contain rewards.

    Raises:
        EffpassError: if trl is not installed, the settings or the data are invalid, the reward fails, the device has
            too little memory, or the output exists already.
        ModelError: if the model can't be read or trained.
    """
    if importlib.util.find_spec("trl") is None:
        raise EffpassError("GRPO runs on trl, which is not installed", hint="pip install 'effpass[grpo]'")
    work = folder.with_name(f"{folder.name}.training")
    check_places(folder, work, resume)
    check_plots()
    function = load_reward(reward)
    config, tokenizer = read_model(source)
    rows = _read_prompts(data, tokenizer, settings.prompts)
    free = ("log_every", "save_every")
    kept = {key: value for key, value in asdict(settings).items() if key not in free}
    run = {"command": "grpo", "model": source, "data": file_hash(data), "reward": reward, "settings": kept}
    if resume:
        check_same(run, work)
    args = _arguments(settings, work / "checkpoints")
    if args.world_size > 1:
        raise EffpassError(f"GRPO runs in one process here, and torchrun started {args.world_size}")
    found = _estimate(config, tokenizer, rows, settings, args.device)
    say(
        f"{len(rows)} prompts; {settings.steps} steps, {settings.prompts} x {settings.group} completions of up to"
        f" {settings.max_new_tokens} tokens a cycle of {settings.updates}"
    )
    say(f"{found}; {host_line(found, args.device)}")
    check_memory(found, "raise --accumulate, lower --prompts or --max-new-tokens, or tune an adapter: --method lora")
    anneal = settings.anneal.schedule(settings.steps, settings.updates) if settings.method == "afa-lora" else None
    trained, original = load(source, settings, anneal, args.device, work)
    set_experts(trained.model)
    say(learned_line(trained))
    checkpoint, first_step = last_checkpoint(work) if resume else (None, 0)
    begin(work, run, first_step, original, resume=resume)
    if resume:
        say(f"going on from step {first_step}")
    recorder = Recorder(work / METRICS, settings.steps, say, ("loss", "reward", "reward_std", "anneal", "kl"))
    if (reason := use_engine(trained.model)) is not None:
        say(f"completions are sampled by transformers' generate: {reason}")
    trainer = _trainer(trained, settings, args, rows, function, tokenizer, recorder)
    with explained(found, work, say, "start anew with a larger --accumulate, or fewer --prompts or --max-new-tokens"):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trained.peft is not None and "ref" in trained.peft.peft_config:
        trained.peft.delete_adapter("ref")  # TRL's copy of the initial adapter, for the KL divergence
    publish(folder, work, trained, tokenizer, settings.dtype, {**run, "prompts": len(rows), "device": str(args.device)})
    say(f"saved {folder}")
    return folder


def _trainer(
    trained: Trained, settings: GrpoSettings, args: Any, rows: list[dict[str, Any]], reward: Any, tokenizer: Any,
    recorder: Recorder,
) -> Any:  # fmt: skip
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    class Reinforcer(AdapterTrainer, GRPOTrainer):  # defined here because TRL is an optional dependency
        """GRPOTrainer whose checkpoints hold the trained parameters."""

    optimizer = make_optimizer(settings.optimizer, trained.model)
    rates = LambdaLR(optimizer, rate(settings.schedule, settings.steps))
    trainer = Reinforcer(  # type: ignore[call-arg]
        model=trained.model if trained.peft is None else trained.peft,
        reward_funcs=[reward],
        args=args,
        train_dataset=Dataset.from_list([rows[n] for n in _order(len(rows), settings)]),
        processing_class=tokenizer,
        optimizers=(optimizer, rates),
        callbacks=[*trained.callbacks(), MetricsCallback(recorder)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.trained = trained
    return trainer


def _order(count: int, settings: GrpoSettings) -> list[int]:
    """Return the indices of the prompts of the whole run, shuffled anew in each pass.

    The order is made here because TRL's sampler would start again when a run is resumed.
    """
    wanted = settings.steps // settings.updates * settings.prompts
    passes = (np.random.default_rng((settings.seed, epoch)).permutation(count) for epoch in range(-(-wanted // count)))
    return np.concatenate([*passes])[:wanted].tolist()


def _arguments(settings: GrpoSettings, folder: Path) -> Any:
    from trl import GRPOConfig

    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulate,
        steps_per_generation=settings.updates * settings.accumulate,
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.kl,
        epsilon=settings.clip_ratio,
        max_grad_norm=settings.optimizer.clip,
        bf16=settings.dtype == "bfloat16",
        gradient_checkpointing=False,
        disable_dropout=True,
        shuffle_dataset=False,  # see _order
        seed=settings.seed,
        logging_steps=settings.log_every,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    args._n_gpu = min(1, args.n_gpu)  # otherwise the Trainer copies the model to all visible GPUs (DataParallel)
    return args


def _read_prompts(path: Path, tokenizer: Any, at_least: int) -> list[dict[str, Any]]:
    """Return the lines of a file, which must all have the same fields."""
    rows: list[dict[str, Any]] = []
    for line, row in read_lines(path):
        where = f"{path}:{line}"
        for name in rows[0] if rows else ("prompt",):
            if name not in row:
                raise EffpassError(f"{where}: field {name!r} is missing; it has {', '.join(map(repr, row)) or 'none'}")
        if rows and (new := [name for name in row if name not in rows[0]]):
            raise EffpassError(f"{where}: field {new[0]!r} is not in the lines before")
        if isinstance(row["prompt"], str):
            if not row["prompt"]:
                raise EffpassError(f"{where}: field 'prompt' is empty")
        else:
            check_messages(row["prompt"], f"{where}: prompt")
            if not tokenizer.chat_template:
                raise ModelError(
                    f"{where} has messages, and the model's tokenizer no chat template", hint="give prompts as texts"
                )
        if rows and type(row["prompt"]) is not type(rows[0]["prompt"]):
            raise EffpassError(f"{where}: prompts are texts or messages, the same in all lines")
        rows.append(row)
    if len(rows) < at_least:
        raise EffpassError(f"{path}: {len(rows)} prompts, and a cycle takes {at_least}", hint="lower --prompts")
    return rows


def _estimate(
    config: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: GrpoSettings, device: torch.device
) -> Estimate:
    """Estimate the memory of a run: what a step saves for its backward pass, and the KV cache of the completions.

    The two are added, because the engine still holds the cache during training.
    """
    texts = [
        r["prompt"]
        if isinstance(r["prompt"], str)
        else tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True)
        for r in rows
    ]
    length = max(len(tokenizer(text, verbose=False)["input_ids"]) for text in texts) + settings.max_new_tokens
    text_config = config.get_text_config(decoder=True)
    most = getattr(text_config, "max_position_embeddings", length)
    if length > most:
        raise EffpassError(
            f"the longest prompt and {settings.max_new_tokens} new tokens are {length}, and the model has"
            f" {most} positions",
            hint="lower --max-new-tokens, or shorten the prompts",
        )
    bfloat16 = settings.dtype == "bfloat16"
    found = estimate(
        config, settings.method, settings.lora, settings.optimizer.name, rows=settings.micro_batch, length=length,
        bfloat16=bfloat16, device=device,
    )  # fmt: skip
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    cache = 2 * text_config.num_hidden_layers * heads * size * (2 if bfloat16 else 4)
    cache *= settings.prompts * settings.group * length
    if settings.kl and settings.method == "full":  # TRL copies the initial model; with an adapter, only the adapter
        found = replace(found, state=found.state + 4 * found.parameters)
    if found.activations is None:
        return found
    return replace(found, activations=found.activations + cache, where="a step and keys and values of the completions")
