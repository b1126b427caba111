"""`prefix_kv`: a KV cache with a budget, in which every layer keeps its own share of the tokens.

The method is PrefixKV (https://arxiv.org/abs/2412.03409): a search over all layers determines how many tokens each of
them keeps, such that the largest loss of attention in any layer is as small as possible. The model stage installs
sessions with a budget in the decode engine; the cache and the search are in :mod:`effpass.runtime.prefix_kv`.
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
        budget: size of the cache: the mean share of tokens that a layer with full attention keeps (`0.2`; `1.0` for
            all), the mean number of tokens (`4096`), or the total size of all layers and sequences (`"8 GiB"`).
        artifact: folder of a profile written by `effpass calibrate prefix-kv`, which holds the share of each layer;
            None to run the search for each prompt.
        importance: score by which tokens are ranked: the attention that they receive from all tokens (`full`), from the
            last 64 (`window`), or from both.
        pool: width of the window over which scores of neighboring tokens are averaged, an odd number; 1 to disable
            averaging.
        sink: number of tokens at the start of a sequence that are always kept.
        recent: number of tokens at the end of a sequence that are always kept.
        page: granularity in tokens; the number of tokens that a layer keeps is a multiple of it if the budget allows.
        kv_cache_dtype: dtype in which keys and values are stored; `auto` is the model's dtype.
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
        """Make the model's decode engine create sessions with a budget; hits are layers."""
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
    """Factory of sessions with a budget; deep-copied along with the model."""

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
