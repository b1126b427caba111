"""An AFA adapter from its first step to the stock LoRA file that it ends as."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from effpass.core.errors import ArtifactError, EffpassError, ModelError, did_you_mean
from effpass.core.whole import write_text
from effpass.passes.weights.attached_lora import tuner_layers
from effpass.trainers.afa_lora.lora import LoraSettings, add_lora
from effpass.trainers.afa_lora.schedule import AnnealSchedule
from effpass.trainers.afa_lora.variant import ACTIVATIONS, AfaVariant, Anneal, refuse_merge

__all__ = ["CONFIG_KEY", "AfaLora", "attach"]

# In adapter_config.json while β > 0. Stock PEFT warns of a key that it does not know, and merge_lora refuses it.
CONFIG_KEY = "effpass_afa"

_ANNEAL = "afa_anneal"  # the submodule of one adapted layer that holds β


def attach(
    model: nn.Module, schedule: AnnealSchedule, settings: LoraSettings | None = None, *, activation: str = "relu"
) -> AfaLora:
    """Put an AFA adapter beside the linear layers of `model`, in place, and freeze everything else.

    ::

        adapter = attach(model, AnnealSchedule(steps=300), LoraSettings(rank=8))
        optimizer = MONA(adapter.model, lr=2e-4)
        for batch in batches:                       # 300 of them
            loss(model, batch).backward()
            optimizer.step(); optimizer.zero_grad()
            adapter.step()
        plain = adapter.merge()                     # or adapter.save(folder), and the model keeps its adapter

    Args:
        model: a transformers model, or any module with linear layers (a draft head); it computes what it did before.
        schedule: of β.
        settings: rank, scale, dropout and targets; None for the defaults.
        activation: `relu`, `silu` or `gelu`.

    Raises:
        ModelError: see :func:`~effpass.trainers.afa_lora.lora.add_lora`.
        EffpassError: an unknown activation.
    """
    _check_activation(activation)
    return AfaLora(add_lora(model, settings or LoraSettings()), schedule, activation=activation)


class AfaLora:
    """The annealed activation on a stock LoRA adapter.

    Attributes:
        model: the stock `PeftModel`; what it wraps is the module that was given, changed in place.
        schedule: of β.
        anneal: β as the layers read it.

    Args:
        model: a `PeftModel` with one plain LoRA adapter on linear layers.
        schedule: of β.
        activation: `relu`, `silu` or `gelu`.

    Raises:
        ModelError: the adapter is of another kind, or spread over several devices.
        EffpassError: an unknown activation.
    """

    def __init__(self, model: Any, schedule: AnnealSchedule, *, activation: str = "relu") -> None:
        _check_activation(activation)
        self.model = model
        self.schedule = schedule
        self.activation = activation
        self.steps_done = 0
        self._name = _only_adapter(model)
        self._layers = _lora_layers(model, self._name)
        devices = {layer.lora_A[self._name].weight.device for layer in self._layers.values()}
        if len(devices) > 1:
            raise ModelError(
                f"the adapter is on {', '.join(sorted(map(str, devices)))}, and β on one device", hint="no device_map"
            )
        self.anneal = Anneal(schedule.beta(0), devices.pop())
        next(iter(self._layers.values())).add_module(_ANNEAL, self.anneal)  # moves with the model; runs on no path
        for layer in self._layers.values():
            layer.lora_variant[self._name] = AfaVariant(self.anneal, activation)
        model.save_pretrained = self._save_pretrained  # stock saves would write an adapter that looks finished

    @property
    def beta(self) -> float:
        """β that the model computes with now."""
        return self.anneal.value

    def step(self) -> float:
        """To be called after each optimiser step; returns β of the next."""
        return self.seek(self.steps_done + 1)

    def seek(self, steps_done: int) -> float:
        """Go to where so many optimiser steps are done; returns β of the next."""
        self.steps_done = steps_done
        self.anneal.set(self.schedule.beta(steps_done))
        return self.beta

    def callback(self) -> Any:
        """For a Trainer of transformers or TRL: `trainer.add_callback(adapter.callback())`, and β moves with its steps.

        A run that resumes from a checkpoint goes on at the checkpoint's step.
        """
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_train_begin(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.seek(state.global_step)

            def on_step_end(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.seek(state.global_step)

        return Callback()

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def finish(self) -> Any:
        """Take the activation away, which at β = 0 changes no output: what is left is stock PEFT.

        Returns:
            The `PeftModel`.

        Raises:
            EffpassError: β is not 0 yet; nothing is changed.
        """
        if self.beta:
            raise EffpassError(
                f"β is {self.beta:.3g} after {self.steps_done} of {self.schedule.steps} steps, and 0 only from step"
                f" {self.schedule.last} on",
                hint="train on; what is saved now is no LoRA adapter",
            )
        for layer in self._layers.values():
            layer.lora_variant.pop(self._name, None)
            layer._modules.pop(_ANNEAL, None)
        self.model.__dict__.pop("save_pretrained", None)
        return self.model

    def merge(self) -> nn.Module:
        """Fold the adapter into the weights, by `merge_lora`.

        Returns:
            The module that was given, with its own kinds of layers again.

        Raises:
            EffpassError: β is not 0; nothing is changed.
        """
        if self.beta:
            refuse_merge(self.beta)
        from effpass.passes.weights.attached_lora import merge_attached

        base = self.finish().get_base_model()
        base.eval()
        _, refusals = merge_attached(base, "refuse")
        if refusals:
            raise ModelError(f"{refusals[0].node}: {refusals[0].reason}", hint=refusals[0].hint)
        return base

    def save(self, folder: str | Path) -> Path:
        """Write the finished adapter as a stock PEFT folder, whole or not at all.

        Raises:
            EffpassError: β is not 0 yet, or something is in the way.
        """
        folder = Path(folder)
        if folder.exists():
            raise EffpassError(f"{folder} exists", hint="give another folder, or remove it")
        finished = self.finish()
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT looks for the base model's config, to tell resized embeddings
                finished.save_pretrained(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def state_dict(self) -> dict[str, Any]:
        """What a run needs besides the adapter's weights to go on: plain values."""
        return {"steps_done": self.steps_done, "activation": self.activation, "schedule": asdict(self.schedule)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ArtifactError: it is of another schedule or activation; nothing is changed.
        """
        ours = {"activation": self.activation, **asdict(self.schedule)}
        theirs = {"activation": state.get("activation"), **state.get("schedule", {})}
        changed = [f"{key} {theirs.get(key)} -> {ours.get(key)}" for key in ours if theirs.get(key) != ours[key]]
        if changed:
            raise ArtifactError(
                f"the anneal is not the one that the run began with: {', '.join(changed)}",
                hint="go on with the old schedule, or start anew",
            )
        self.seek(state["steps_done"])

    def _save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, and a mark in the config while β > 0."""
        type(self.model).save_pretrained(self.model, save_directory, *args, **kwargs)
        if not self.beta or not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory) if self._name == "default" else Path(save_directory) / self._name
        path = folder / "adapter_config.json"
        config = {**json.loads(path.read_text()), CONFIG_KEY: {"beta": self.beta, **self.state_dict()}}
        write_text(path, json.dumps(config, indent=2, sort_keys=True))


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise EffpassError(f"unknown activation {activation!r}{did_you_mean(activation, ACTIVATIONS)}")


def _only_adapter(model: Any) -> str:
    names = list(getattr(model, "peft_config", {}))
    if len(names) != 1 or not hasattr(model, "get_base_model"):
        raise ModelError(
            f"AfaLora takes a PeftModel with one adapter, got {type(model).__name__} with {names}",
            hint="effpass.trainers.afa_lora.attach(model, schedule) makes one",
        )
    return names[0]


def _lora_layers(model: Any, name: str) -> dict[str, Any]:
    from peft.tuners.lora.layer import Linear

    found = {}
    for path, layer in tuner_layers(model).items():
        variant = getattr(layer, "lora_variant", {}).get(name)
        if not isinstance(layer, Linear) or name not in layer.lora_A or variant is not None:
            kind = type(layer).__name__ if variant is None else f"{type(layer).__name__}, {type(variant).__name__}"
            raise ModelError(
                f"{path} is no plain LoRA on a linear layer ({kind})",
                hint="AFA is for plain LoRA: no DoRA, no embeddings, no quantised layers",
            )
        found[path] = layer
    return found
