"""The name of the argument by which transformers' models take their cache; it changed in version 5.24."""

from __future__ import annotations

import functools

__all__ = ["CACHE_NAMES", "cache_name"]

#: The current name and the older one, which later versions still accept with a warning.
CACHE_NAMES = ("cache", "past_key_values")


@functools.cache
def cache_name() -> str:
    """The name that the installed transformers uses, for arguments and for fields of outputs."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)
