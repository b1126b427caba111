"""An AFA-LoRA adapter during training: it controls β, and merges or saves the finished adapter.

:func:`attach` and :class:`AfaLora` are the interface for training loops. `effpass train afa-lora` uses them through
:mod:`effpass.trainers.finetune.trained`. The finished adapter is a standard PEFT LoRA adapter.
"""

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

# Key in adapter_config.json while β > 0. PEFT warns about unknown keys, and the pass merge_lora refuses this one.
CONFIG_KEY = "effpass_afa"

_ANNEAL = "afa_anneal"  # name of the submodule with β, which is registered in one of the adapted layers


def attach(
    model: nn.Module, schedule: AnnealSchedule, settings: LoraSettings | None = None, *, activation: str = "relu"
) -> AfaLora:
    """Add an AFA adapter to the linear layers of `model`, in place, and freeze all other parameters.

    ::

        adapter = attach(model, AnnealSchedule(steps=300), LoraSettings(rank=8))
        optimizer = MONA(adapter.model, lr=2e-4)
        for batch in batches:                       # 300 optimizer steps
            loss(model, batch).backward()
            optimizer.step(); optimizer.zero_grad()
            adapter.step()
        plain = adapter.merge()                     # or adapter.save(folder), which does not change the weights

    Args:
        model: transformers model, or any module with linear layers, such as a draft head. The new adapter does not
            change its outputs.
        schedule: schedule of β.
        settings: rank, scale, dropout and target layers; None for the defaults.
        activation: `relu`, `silu` or `gelu`.

    Returns:
        The adapter, whose :attr:`AfaLora.model` is the `PeftModel` around `model`.

    Raises:
        ModelError: see :func:`~effpass.trainers.afa_lora.lora.add_lora`.
        EffpassError: if the activation is unknown.
    """
    _check_activation(activation)
    return AfaLora(add_lora(model, settings or LoraSettings()), schedule, activation=activation)


class AfaLora:
    """A PEFT LoRA adapter with the annealed activation.

    Attributes:
        model: `PeftModel`; it wraps the original module, which is changed in place.
        schedule: schedule of β.
        activation: name of the activation.
        steps_done: number of optimizer steps that are done.
        anneal: module that holds the current β for all adapted layers.

    Args:
        model: `PeftModel` with a single adapter, which is plain LoRA on linear layers.
        schedule: schedule of β.
        activation: `relu`, `silu` or `gelu`.

    Raises:
        ModelError: if the adapter is of another kind, or is distributed over several devices.
        EffpassError: if the activation is unknown.
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
        next(iter(self._layers.values())).add_module(_ANNEAL, self.anneal)  # moves with the model; never called
        for layer in self._layers.values():
            layer.lora_variant[self._name] = AfaVariant(self.anneal, activation)
        model.save_pretrained = self._save_pretrained  # PEFT's own would save an unfinished adapter without a mark

    @property
    def beta(self) -> float:
        """Current value of β in the model."""
        return self.anneal.value

    def step(self) -> float:
        """Update β after an optimizer step, and return the β of the next step."""
        return self.seek(self.steps_done + 1)

    def seek(self, steps_done: int) -> float:
        """Set β to its value after `steps_done` optimizer steps, and return it."""
        self.steps_done = steps_done
        self.anneal.set(self.schedule.beta(steps_done))
        return self.beta

    def callback(self) -> Any:
        """Return a callback that updates β with the steps of a Trainer of transformers or TRL.

        Add it with `trainer.add_callback(adapter.callback())`. In a resumed run, β continues at the checkpoint's step.
        """
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_train_begin(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.seek(state.global_step)

            def on_step_end(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.seek(state.global_step)

        return Callback()

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def finish(self) -> Any:
        """Remove the activation, which has no effect at β = 0, so that a standard PEFT adapter remains.

        Returns:
            The `PeftModel`.

        Raises:
            EffpassError: if β is not 0 yet; nothing is changed.
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
        """Merge the adapter into the weights, as the pass `merge_lora` does.

        Returns:
            The original module, with its original layer types.

        Raises:
            EffpassError: if β is not 0 yet; nothing is changed.
            ModelError: if a layer can't be merged.
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
        """Write the finished adapter as a standard PEFT folder, atomically.

        Raises:
            EffpassError: if β is not 0 yet, or if `folder` exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise EffpassError(f"{folder} exists", hint="give another folder, or remove it")
        finished = self.finish()
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns if it finds no config to compare the embeddings' size with
                finished.save_pretrained(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resuming a run needs besides the adapter's weights, as plain values."""
        return {"steps_done": self.steps_done, "activation": self.activation, "schedule": asdict(self.schedule)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            ArtifactError: if the state belongs to another schedule or activation; nothing is changed.
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
        """Save as PEFT does, and add :data:`CONFIG_KEY` to the config while β > 0."""
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
                hint="AFA is for plain LoRA: no DoRA, no embeddings, no quantized layers",
            )
        found[path] = layer
    return found
