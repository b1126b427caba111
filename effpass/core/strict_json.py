"""Strict JSON parsing for files that may be damaged or hostile: no duplicate keys, no NaN, and one type of error."""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["parse_json"]


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: `data` is not UTF-8, is not JSON, has a duplicate key, contains NaN or Infinity, or is nested too
            deeply.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is {data[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} is given twice")
        content[key] = value
    return content


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
