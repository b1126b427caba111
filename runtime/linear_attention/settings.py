"""Settings of a linear-attention layer, which are stored in a hybrid's config and in artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from effpass.core.errors import EffpassError, did_you_mean

__all__ = ["GatedDeltaSettings", "Mode"]

Mode = Literal["gdn", "kda", "fg2", "fg2+"]

_LARGEST = 256  # maximum number of channels of a head, for keys and for values


@dataclass(frozen=True)
class GatedDeltaSettings:
    """Sizes and form of a :class:`~effpass.runtime.linear_attention.layer.GatedDeltaAttention`.

    Attributes:
        mode: granularity of decay and step size. `gdn`: both are per head (gated DeltaNet); `kda`: the decay is per
            channel (Kimi Delta Attention); `fg2`: the step size is per channel too (FG²-GDN); `fg2+`: there are
            separate step sizes per channel for erasing and for writing.
        num_key_heads: number of heads of queries and keys.
        num_value_heads: number of heads of values, gates and states; a multiple of `num_key_heads`.
        key_head_dim: number of channels of a query or key head.
        value_head_dim: number of channels of a value head; equal to `key_head_dim` in mode `fg2`.
        conv_kernel_size: kernel size, in tokens, of the short convolution before the recurrence.
        gate_rank: rank of the projections to the decay (except in mode `gdn`) and to the output gate.
        beta_rank: rank of the projections to step sizes per channel; 0 for full rank.
        lower_bound: lower bound of the log of the decay, whose upper bound is 0; None for no lower bound, with which
            kernels are slower.

    Raises:
        EffpassError: if the settings are invalid.
    """

    mode: Mode
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int = 4
    gate_rank: int = 64
    beta_rank: int = 0
    lower_bound: float | None = -5.0

    def __post_init__(self) -> None:
        def refuse(what: str, hint: str) -> EffpassError:
            return EffpassError(f"linear attention: {what}", hint=hint)

        if self.mode not in get_args(Mode):
            raise refuse(f"mode: got {self.mode!r}{did_you_mean(str(self.mode), get_args(Mode))}", "see its settings")
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "beta_rank" else 1
            if field.type == "int" and (type(value) is not int or value < least):
                raise refuse(f"{field.name}: got {value!r}", f"give a whole number of at least {least}")
        if self.num_value_heads % self.num_key_heads:
            raise refuse(
                f"{self.num_value_heads} heads of values and {self.num_key_heads} of keys",
                "num_value_heads is a multiple of num_key_heads",
            )
        if max(self.key_head_dim, self.value_head_dim) > _LARGEST:
            raise refuse(f"heads of {max(self.key_head_dim, self.value_head_dim)} channels", f"{_LARGEST} at most")
        if self.mode == "fg2" and self.key_head_dim != self.value_head_dim:
            raise refuse(
                f"mode fg2 with keys of {self.key_head_dim} and values of {self.value_head_dim} channels",
                "one step size for both needs equal sizes; fg2+ has one for each",
            )
        if self.conv_kernel_size < 2:
            raise refuse("a convolution over one token", "conv_kernel_size is 2 or more; 4 is usual")
        if self.lower_bound is not None and not -1e4 < self.lower_bound <= -1e-3:
            raise refuse(f"lower_bound: got {self.lower_bound!r}", "between -10000 and -0.001, or null")

    @property
    def state_bytes(self) -> int:
        """Size in bytes of the float32 state of one layer and sequence."""
        return 4 * self.num_value_heads * self.key_head_dim * self.value_head_dim

    @property
    def channels(self) -> int:
        """Number of channels of the convolution: those of queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GatedDeltaSettings:
        """Create settings from the result of :meth:`to_dict`.

        Raises:
            EffpassError: if a key is unknown or missing, or the settings are invalid.
        """
        known = [field.name for field in fields(cls)]
        for key in content:
            if key not in known:
                raise EffpassError(f"linear attention: unknown setting {key!r}{did_you_mean(str(key), known)}")
        try:
            return cls(**content)
        except TypeError as error:
            raise EffpassError(f"linear attention: {error}") from error
