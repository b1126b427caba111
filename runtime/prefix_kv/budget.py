"""The size of a cache: a share of the tokens, a number of tokens, or a number of bytes.

A :class:`Budget` is parsed from the option `budget`; :mod:`effpass.runtime.prefix_kv.plan` applies it to a prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from effpass.core.errors import EffpassError

__all__ = ["Budget", "parse_bytes"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)")


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def parse_bytes(name: str, given: str) -> int:
    """Parse a number of bytes with a unit, such as ``"512 MiB"`` or ``"8 GB"``.

    Raises:
        EffpassError: if the number is zero or malformed, or the unit is unknown; the message begins with `name`.
    """
    match = _BYTES.fullmatch(given.strip())
    if match is None or float(match[1]) == 0:
        hint = (
            f"a share or a number of tokens is written without quotes: {given.strip()}" if _is_number(given) else None
        )
        raise EffpassError(f"{name}: got {given!r}, expected bytes such as '512 MiB' or '8 GB'", hint=hint)
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Budget:
    """Size of a cache, of which exactly one attribute is given and the others are None.

    Attributes:
        ratio: share of each sequence's tokens to keep, the mean over layers.
        tokens: number of tokens of each sequence to keep, the mean over layers.
        nbytes: bytes of the keys and values of all sequences in all layers with full attention.
    """

    ratio: float | None = None
    tokens: int | None = None
    nbytes: int | None = None

    @classmethod
    def parse(cls, given: float | int | str) -> Budget:
        """Create a budget from a share (``0.2``, ``1.0``), a number of tokens (``4096``) or bytes (``"8 GiB"``).

        Raises:
            EffpassError: if a share is outside (0, 1], a number of tokens is below 1, or bytes are zero or malformed.
        """
        if isinstance(given, str):
            return cls(nbytes=parse_bytes("budget", given))
        if isinstance(given, int):
            if given < 1:
                raise EffpassError(
                    f"budget: got {given}, expected tokens a layer, 1 or more; a share is written with a point: 1.0"
                )
            return cls(tokens=given)
        if not 0 < given <= 1:
            raise EffpassError(f"budget: got {given}, expected a share above 0 and up to 1.0")
        return cls(ratio=given)

    @property
    def is_everything(self) -> bool:
        """Whether all tokens are kept, so that nothing is ever evicted."""
        return self.ratio == 1

    def mean(self, length: int, rows: int, token_bytes: float) -> float:
        """Return the number of tokens that a layer may keep of each sequence, the mean over layers.

        Args:
            length: number of tokens of the longest sequence, which bounds the result.
            rows: number of sequences.
            token_bytes: bytes of one token in all layers with full attention.
        """
        if self.ratio is not None:
            return self.ratio * length
        if self.tokens is not None:
            return min(length, self.tokens)
        assert self.nbytes is not None
        return min(length, self.nbytes / (rows * token_bytes))

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"{self.ratio:g} of the tokens"
        return f"{self.tokens} tokens" if self.tokens is not None else f"{self.nbytes} bytes"
