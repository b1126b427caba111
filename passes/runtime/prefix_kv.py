"""`prefix_kv`: a key-value cache with a budget, in which every layer keeps its own share of the tokens.

PrefixKV (https://arxiv.org/abs/2412.03409): one search over all layers finds how much each keeps, so that the layer
that loses most of its attention loses as little as possible. The cache and the search are in
:mod:`effpass.runtime.prefix_kv`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, ModelError
from effpass.core.model import inner_model
from effpass.core.pass_ import RuntimePass
from effpass.core.report import Refusal
from effpass.runtime.attach import engine_of
from effpass.runtime.cache import full_layers
from effpass.runtime.engine import check_decodable
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.plan import Limits, Settings, token_bytes
from effpass.runtime.prefix_kv.prefix import PrefixKV as Policy
from effpass.runtime.prefix_kv.profile import Profile
from effpass.runtime.prefix_kv.quantized import layer_class
from effpass.runtime.prefix_kv.session import BudgetSession
from effpass.runtime.session import Backend

__all__ = ["PrefixKV", "PrefixKVOptions"]


@dataclass(frozen=True)
class PrefixKVOptions:
    """Options of `prefix_kv`.

    Attributes:
        budget: what layers with full attention keep in the mean: a share of the tokens (`0.2`; `1.0` is all), a number
            of tokens (`4096`), or bytes for all layers and sequences together (`"8 GiB"`).
        artifact: folder of a profile, as `effpass calibrate prefix-kv` writes it. Without one every prompt is searched.
        importance: what tokens are ranked by: the attention they receive from all tokens, from the last 64, or both.
        pool: neighbours over which that is averaged, an odd number; 1 leaves it as it is.
        sink: first tokens of a sequence that stay.
        recent: last tokens of a sequence that stay.
        page: layers keep multiples of it, where the budget allows.
        kv_cache_dtype: how keys and values are stored; `auto` is the model's dtype.
    """

    budget: float | int | str
    artifact: Path | None = None
    importance: Literal["both", "window", "full"] = "both"
    pool: int = 7
    sink: int = 4
    recent: int = 32
    page: int = 16
    kv_cache_dtype: Literal["auto", "int8", "fp8", "int4"] = "auto"

    def __post_init__(self) -> None:
        budget = Budget.parse(self.budget)
        for name, least in (("sink", 0), ("recent", 1), ("page", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {least} or more")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool: got {self.pool}, expected an odd number")
        if budget.tokens is not None and budget.tokens < self.sink + self.recent:
            raise ValueError(
                f"budget: {budget.tokens} tokens are fewer than the protected ones, {self.sink} first (sink) and"
                f" {self.recent} last (recent); raise it, or lower these"
            )


class PrefixKV(RuntimePass):
    """Gives each layer its share of a key-value cache with a budget."""

    name = "prefix_kv"
    exact = False
    Options = PrefixKVOptions
    options: PrefixKVOptions

    @cached_property
    def profile(self) -> Profile | None:
        return None if self.options.artifact is None else Profile.load(self.options.artifact)

    @property
    def artifact(self) -> Artifact | None:
        return None if self.profile is None else self.profile.artifact

    def check_model(self, model: torch.nn.Module) -> None:
        runs = inner_model(model)
        if not hasattr(runs, "config") or not hasattr(runs, "generate"):
            raise ModelError(f"{type(runs).__name__} is no transformers model that generates")
        check_decodable(runs)
        full = len(full_layers(runs.config)[0])
        if self.profile is not None:
            self.profile.check(runs, full)
            for name in ("importance", "pool"):
                learned, asked = self.profile.artifact.options.get(name), getattr(self.options, name)
                if learned != asked:
                    raise ArtifactError(
                        f"{self.options.artifact}: learned with {name} {learned!r}, and the recipe says {asked!r}",
                        hint="use one for both",
                    )
        if full:
            settings = self._settings()
            stored = layer_class(settings.kv_cache_dtype)
            of_token = token_bytes(runs.config, runs.dtype.itemsize, stored.bytes_of) * full
            Limits.of(settings, 1 << 40, 1, [1 << 40] * full, 0, of_token)
            if settings.kv_cache_dtype == "int4":
                _check_even(runs.config)

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        """Give the model's engine sessions with a budget; hits are layers."""
        runs = inner_model(model)
        full, others = full_layers(runs.config)
        if full:
            engine_of(runs).new_session = _NewSession(self._settings())
        return len(full), [Refusal(f"layer {i}", f"{what}, and stays outside the budget") for i, what in others.items()]

    def _settings(self) -> Settings:
        options = self.options
        return Settings(
            Policy(self.profile, options.importance, options.pool),
            Budget.parse(options.budget),
            sink=options.sink,
            recent=options.recent,
            page=options.page,
            kv_cache_dtype=options.kv_cache_dtype,
        )


@dataclass(frozen=True)
class _NewSession:
    """Makes sessions; copied along with a model."""

    settings: Settings

    def __call__(self, model: Any, batch: int, capacity: int, backend: Backend | None) -> BudgetSession:
        return BudgetSession(model, batch, capacity, backend, self.settings)

    def __deepcopy__(self, memo: Any) -> _NewSession:
        return dataclasses.replace(self)


def _check_even(config: Any) -> None:
    text = config.get_text_config(decoder=True)
    sizes = [getattr(text, name, None) for name in ("head_dim", "kv_lora_rank", "qk_rope_head_dim")]
    odd = [size for size in sizes if size and size % 2]
    if odd:
        raise ModelError(
            f"kv_cache_dtype: int4 stores two numbers a byte, and a head has {odd[0]}", hint="use int8 or fp8"
        )
