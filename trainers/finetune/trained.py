"""What a fine-tuning run trains, a model with or without an adapter, and checkpoints of the trained parameters."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from effpass.core.errors import ArtifactError, ModelError
from effpass.trainers.afa_lora import AfaLora, LoraSettings, add_lora
from effpass.trainers.afa_lora.schedule import AnnealSchedule
from effpass.trainers.finetune.settings import Anneal, Method

__all__ = ["AdapterTrainer", "Trained", "check_trainable", "make_trained"]

_WEIGHTS, _ANNEAL = "trained.safetensors", "anneal.json"


@dataclass(frozen=True)
class Trained:
    """A model that is trained, with its adapter.

    Attributes:
        model: model that is called: the transformers model, with adapters in place.
        peft: `PeftModel` around it; None for full fine-tuning.
        afa: annealed activation; None if there is none.
    """

    model: Any
    peft: Any = None
    afa: AfaLora | None = None

    def under_autocast(self) -> AbstractContextManager[None]:
        """Context manager for everything that runs under autocast: it disables PEFT's casts of adapter inputs.

        PEFT would cast the inputs to float32, and autocast would cast them back.
        """
        from peft.helpers import disable_input_dtype_casting

        return disable_input_dtype_casting(self.model)

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks that the Trainer needs, such as the one that updates β."""
        return [] if self.afa is None else [self.afa.callback()]

    def finish(self) -> Any:
        """Return what is saved: the model, or a standard `PeftModel` without the activation of an AFA adapter."""
        if self.afa is not None:
            self.afa.finish()
        return self.model if self.peft is None else self.peft


def make_trained(
    model: Any, method: Method, lora: LoraSettings, anneal: Anneal, schedule: AnnealSchedule | None
) -> Trained:
    """Prepare `model` for training, in place: for an adapter, freeze it and add the adapter to its layers.

    Args:
        model: transformers model.
        method: what is trained: all weights or an adapter.
        lora: settings of the adapter.
        anneal: activation of an AFA adapter.
        schedule: schedule of β for `afa-lora`; None for other methods.
    """
    if method == "full":
        model.requires_grad_(True)
        return Trained(model)
    peft = add_lora(model, lora)
    if method == "lora":
        return Trained(model, peft)
    assert schedule is not None
    return Trained(model, peft, AfaLora(peft, schedule, activation=anneal.activation))


def check_trainable(config: Any, name: str) -> None:
    """Raise ModelError for a checkpoint with quantized weights, before the weights are read."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise ModelError(
            f"the weights of {name} are quantized ({method}): they can't be trained, and an adapter learned beside them"
            " can't be merged exactly",
            hint="use the checkpoint that it was quantized from",
        )


class AdapterTrainer(Trainer):
    """Trainer that logs β of an AFA adapter and saves only the trained parameters in checkpoints.

    The parameters have the same names there as in memory.

    Attributes:
        trained: model and adapter; subclasses set it before training.
    """

    trained: Trained

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.trained.afa is not None:
            logs["anneal"] = self.trained.afa.beta
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        weights = {n: p.detach().contiguous() for n, p in _learned(self.trained.model)}
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
        if self.trained.afa is not None:
            (folder / _ANNEAL).write_text(json.dumps(self.trained.afa.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved, mine = load_file(folder / _WEIGHTS), dict(_learned(self.trained.model))
        for names, what in ((mine.keys() - saved.keys(), "lacks"), (saved.keys() - mine.keys(), "has beside ours")):
            if names:
                raise ArtifactError(f"{folder} {what} {', '.join(sorted(names)[:4])}", hint="start anew")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(saved[name])
        if self.trained.afa is not None:
            self.trained.afa.load_state_dict(json.loads((folder / _ANNEAL).read_text()))


def _learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
