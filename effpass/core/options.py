"""Conversion of a pass's options between a recipe and the pass's frozen dataclass.

Types are checked strictly, according to JSON: an int is accepted for a float, but ``"0.2"`` is not a number and ``1``
is not a bool. Paths are resolved against the recipe's folder. All faults are collected, each with the path of the value
in the recipe.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import reprlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from effpass.core.errors import EffpassError, did_you_mean
from effpass.core.user_path import expand_user

__all__ = ["dump_options", "has_defaults", "read_options", "shown"]

_UNIONS = (Union, types.UnionType)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 3


def has_defaults(options_class: type) -> bool:
    """Whether every option of the dataclass has a default value."""
    return not any(_required(field) for field in dataclasses.fields(options_class) if field.init)


def read_options(options_class: type, given: object, *, base: Path, where: str) -> tuple[Any, list[str]]:
    """Create an instance of a pass's `Options` from a mapping.

    Args:
        options_class: frozen dataclass to create.
        given: option name → value, in types of YAML; None stands for no options.
        base: folder that relative paths are resolved against.
        where: path of the mapping for messages, such as ``"r.yaml: passes[2].prefix_kv"``.

    Returns:
        The options and an empty list, or None and one message per fault.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        return None, [f"{where}: got {shown(given)}, expected options (name: value)"]
    fields = {field.name: field for field in dataclasses.fields(options_class) if field.init}
    faults = _unknown_keys(given, fields, where)
    faults += [
        f"{where}: option {name!r} is missing" for name in fields if _required(fields[name]) and name not in given
    ]
    hints = get_type_hints(options_class, include_extras=True)
    values = {}
    for name in fields:
        if name in given:
            faults_here, values[name] = _read_value(hints[name], given[name], base, f"{where}.{name}")
            faults += faults_here
    if faults:
        return None, faults
    try:
        return options_class(**values), []
    except EffpassError as error:
        return None, [f"{where}: {error.message}"]
    except Exception as error:  # __post_init__ of the pass may raise anything
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return None, [f"{where}: {reason}"]


def dump_options(options: Any, folder: Path | None = None) -> dict[str, Any]:
    """The options that differ from their defaults, in types of YAML and JSON, as :func:`read_options` accepts them.

    Args:
        options: instance of a pass's `Options`.
        folder: folder in which the result will be saved. Paths inside it are made relative to it, all others absolute;
            None makes all paths absolute.
    """
    return {
        field.name: _plain(getattr(options, field.name), folder)
        for field in dataclasses.fields(options)
        if field.init and (_required(field) or getattr(options, field.name) != _default(field))
    }


def shown(value: object) -> str:
    """Description of `value` and its type for a message, at most about 80 characters long."""
    return f"{_short.repr(value)} ({type(value).__name__})"


def _read_value(hint: Any, value: object, base: Path, where: str) -> tuple[list[str], Any]:
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    faults: list[str] = []
    resolved = _prepare(hint, value, base, where, faults)
    try:
        text = json.dumps(resolved, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return [f"{where}: got {shown(value)}, expected {_expected(hint)}"], None
    try:
        # JSON is validated instead of Python values: this is strict about numbers, but accepts a list for a tuple and a
        # string for a path.
        return faults, TypeAdapter(hint).validate_json(text, strict=True)
    except ValidationError as error:
        return faults or _type_faults(hint, value, error, where), None
    except PydanticSchemaGenerationError:
        return [f"{where}: this option's type, {_expected(hint)}, can't be given in a recipe"], None


def _prepare(hint: Any, value: object, base: Path, where: str, faults: list[str]) -> Any:
    """Resolve the paths in `value`. Unknown keys of nested dataclasses are appended to `faults` and left out."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Path and isinstance(value, (str, Path)):
        return os.fspath(base / expand_user(value))
    if origin is Annotated:
        return _prepare(args[0], value, base, where, faults)
    if origin in _UNIONS and str not in args:  # in `str | Path`, a string may be a name and is not resolved
        for arm in args:
            if arm is not type(None):
                value = _prepare(arm, value, base, where, faults)
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        arms = args if origin is tuple and Ellipsis not in args else args[:1] * len(value)
        if len(arms) == len(value):
            return [
                _prepare(arm, v, base, f"{where}[{i}]", faults)
                for i, (arm, v) in enumerate(zip(arms, value, strict=True))
            ]
    elif origin is dict and isinstance(value, Mapping):
        return {key: _prepare(args[1], v, base, f"{where}.{key}", faults) for key, v in value.items()}
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        hints = get_type_hints(hint, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(hint) if field.init}
        faults += _unknown_keys(value, fields, where)
        return {k: _prepare(hints[k], v, base, f"{where}.{k}", faults) for k, v in value.items() if k in fields}
    return value


def _unknown_keys(given: Mapping[Any, Any], known: Mapping[str, Any], where: str) -> list[str]:
    if not known:
        return [f"{where}: got {key!r}, but this pass has no options" for key in given]
    return [
        f"{where}.{key}: unknown option{did_you_mean(str(key), known)}"
        for key in given
        if not isinstance(key, str) or key not in known
    ]


def _type_faults(hint: Any, value: object, error: Any, where: str) -> list[str]:
    """Convert pydantic's errors to messages in the style of recipes."""
    if get_origin(hint) in _UNIONS:  # one message, not one per arm
        return [f"{where}: got {shown(value)}, expected {_expected(hint)}"]
    faults = []
    for fault in error.errors(include_url=False):
        place = where + "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in fault["loc"])
        if fault["loc"] and fault["type"] != "value_error":
            reason = fault["msg"].removeprefix("Input ")
            faults.append(f"{place}: got {shown(fault['input'])}: {reason}")
        elif fault["type"] == "value_error":  # raised by the dataclass itself
            faults.append(f"{place}: {fault['msg'].removeprefix('Value error, ')}")
        elif fault["type"].endswith(("_type", "_error", "_from_float")):
            suggestion = did_you_mean(value, get_args(hint)) if _is_choice(hint) and isinstance(value, str) else ""
            suggestion = suggestion if "did you mean" in suggestion else ""
            faults.append(f"{place}: got {shown(value)}, expected {_expected(hint)}{suggestion}")
        else:
            faults.append(
                f"{place}: got {shown(value)}, expected {_expected(hint)}: {fault['msg'].removeprefix('Input ')}"
            )
    return faults


def _is_choice(hint: Any) -> bool:
    return get_origin(hint) is Literal and all(isinstance(arg, str) for arg in get_args(hint))


def _expected(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Annotated:
        return _expected(args[0])
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin in _UNIONS:
        return " or ".join(_expected(arg) for arg in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if arg is Ellipsis else _expected(arg) for arg in args)}]"
    return getattr(hint, "__name__", str(hint))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any, folder: Path | None = None) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        absolute = value.absolute()
        return str(absolute.relative_to(folder)) if folder and absolute.is_relative_to(folder) else str(absolute)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dump_options(value, folder)
    if isinstance(value, Mapping):
        return {key: _plain(item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, folder) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise TypeError(f"{shown(value)} can't be written in a recipe")
