"""How much a cache may hold: a share of the tokens, a number of tokens, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from effpass.core.errors import EffpassError

__all__ = ["Budget", "parse_bytes"]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)")


def parse_bytes(name: str, given: str) -> int:
    """Bytes as a person writes them: ``"512 MiB"``, ``"8 GB"``.

    Raises:
        EffpassError: none, or an unknown unit; it begins with `name`.
    """
    match = _BYTES.fullmatch(given.strip())
    if match is None or float(match[1]) == 0:
        raise EffpassError(f"{name}: got {given!r}, expected bytes such as '512 MiB' or '8 GB'")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Budget:
    """A budget; exactly one of the three is given.

    Attributes:
        ratio: share of a sequence's tokens, the mean over layers.
        tokens: tokens of each sequence, the mean over layers.
        nbytes: bytes of keys and values of all sequences and all layers with full attention.
    """

    ratio: float | None = None
    tokens: int | None = None
    nbytes: int | None = None

    @classmethod
    def parse(cls, given: float | int | str) -> Budget:
        """``0.2`` and ``1.0`` are shares, ``4096`` is tokens, ``"8 GiB"`` is bytes.

        Raises:
            EffpassError: a share outside (0, 1], no tokens, no bytes, or an unknown unit.
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
        """Nothing ever has to go."""
        return self.ratio == 1

    def mean(self, length: int, rows: int, token_bytes: float) -> float:
        """Tokens that a layer may keep of each sequence, the mean over layers; at most `length`.

        Args:
            length: tokens of the longest sequence.
            rows: sequences.
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
