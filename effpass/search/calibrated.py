"""Calibration for a search: learns the artifacts that choices need from the calibration text, and keeps them on disk.

Nothing is trained. :class:`Calibrator` makes three kinds of artifact: a profile of the layers (prefix_kv), channels of
the keys (sparse_attention), and kept units by Taylor scores (structured_pruning).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.core.recipe import Recipe
from effpass.passes.runtime.mla_absorption import absorb, latent_layers
from effpass.runtime.prefix_kv.calibrate import SHORTEST
from effpass.search.choices import Choice
from effpass.search.workload import Workload

__all__ = ["Calibrator"]

_SAMPLES = 8
_CHANNELS, _LATENT_CHANNELS = 32, 128  # channels of a key to keep; as in `effpass calibrate sparse-attention`


@dataclass
class Calibrator:
    """Makes the artifacts that choices need.

    Attributes:
        folder: folder of the artifacts; artifacts that exist there are used as they are.
        load: returns the model without any pass.
        ids: token ids of the calibration text, int64 `[1, T]`.
        workload: sizes of the requests; their prompts determine the length of the calibration samples.
        name: name of the text, for the provenance of the artifacts.
        say: called with one line of progress at a time.
    """

    folder: Path
    load: Callable[[], Any]
    ids: Tensor
    workload: Workload
    name: str
    say: Callable[[str], None]
    _failed: dict[str, str] = field(default_factory=dict)

    def usable(self, choices: Iterable[Choice]) -> tuple[list[Choice], dict[str, str]]:
        """Calibrate choices where they need it, and check that each can act on the model.

        Returns:
            The usable choices with their artifacts set, and for each of the others its label and the reason.
        """
        found, refused = [], {}
        for choice in choices:
            try:
                ready = choice if choice.needs is None else self._calibrated(choice)
                (pass_,) = Recipe.parse({"passes": [{ready.name: dict(ready.options)}]}).build()
                pass_.check_model(self.model)
            except EffpassError as error:
                refused[choice.label] = error.message
            else:
                found.append(ready)
        return found, refused

    @cached_property
    def model(self) -> Any:
        return self.load()

    def _calibrated(self, choice: Choice) -> Choice:
        need = choice.needs
        assert need is not None
        if need == "channels" and self._channels is None:
            return replace(choice, needs=None)  # all channels are kept, so there is nothing to choose
        if need in self._failed:
            raise EffpassError(self._failed[need])
        place = self.folder / need
        if not place.exists():
            self.say(f"calibrating {choice.label}")
            try:
                artifact = self._learn(need)
            except EffpassError as error:
                self._failed[need] = error.message
                raise
            artifact.save(place)
        return replace(choice, options={**choice.options, "artifact": str(place.absolute())}, needs=None)

    def _learn(self, need: str) -> Any:
        if need == "profile":
            from effpass.runtime.prefix_kv.calibrate import calibrate as learn_profile

            prompts = ({"input_ids": piece} for piece in self._pieces(max(SHORTEST, self.workload.prompt)))
            return learn_profile(self.model, prompts, provenance=self._provenance).artifact
        if need == "channels":
            from effpass.runtime.sparse_channels import calibrate as learn_channels

            absorb(self.model)
            assert self._channels is not None
            pieces = self._pieces(self.workload.prompt)
            return learn_channels(self.model, pieces, channels=self._channels, provenance=self._provenance)
        return self._kept(float(need.removeprefix("keep-")) / 100)

    @property
    def _provenance(self) -> dict[str, Any]:
        return {"model": self.model.config._name_or_path, "data": self.name}

    @cached_property
    def _channels(self) -> int | None:
        """Number of key channels that the index of sparse attention keeps; None keeps all."""
        text = self.model.config.get_text_config(decoder=True)
        if latent_layers(self.model):
            size, most = text.kv_lora_rank + text.qk_rope_head_dim, _LATENT_CHANNELS
        else:
            size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            most = _CHANNELS
        return most if size > most else None

    # -- pruning ------------------------------------------------------------------------------------------------------

    def _kept(self, share: float) -> Any:
        """An artifact that keeps `share` of the units, chosen by their Taylor scores, without training."""
        from effpass.trainers.pruning.choice import best_units, keep_indices

        problem, settings = self._problem(share)
        kept = best_units(self._scores, problem.units, problem.shapes, problem.even(settings))
        return keep_indices(self.model, problem.units, kept, provenance=self._provenance | {"keep": share}).artifact

    def _problem(self, share: float) -> tuple[Any, Any]:
        from effpass.trainers.lm.config import OptimizerConfig
        from effpass.trainers.pruning.settings import Settings
        from effpass.trainers.pruning.stages import state_problem

        settings = Settings(OptimizerConfig(1e-4), share, choose="taylor")
        return state_problem(self.model, settings), settings

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        from effpass.trainers.pruning.choice import score_units
        from effpass.trainers.pruning.scores import Calibration
        from effpass.trainers.pruning.units import find_units

        batches = list(self._pieces(min(512, self.workload.prompt)))
        return score_units("taylor", self.model, find_units(self.model, ()), Calibration(batches))

    def _pieces(self, length: int) -> Iterable[Tensor]:
        """Samples of the text `[1, length]`, evenly spaced."""
        count = min(_SAMPLES, self.ids.shape[1] // length)
        if not count:
            raise EffpassError(
                f"the calibration text has {self.ids.shape[1]} tokens, and a sample takes {length}",
                hint="give a longer text (--data), or shorter prompts (--prompt)",
            )
        starts = [i * (self.ids.shape[1] - length) // max(1, count - 1) for i in range(count)]
        return [self.ids[:, first : first + length].to(self.model.device) for first in starts]

    def release(self) -> None:
        """Release the model."""
        self.__dict__.pop("model", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
