"""Passes by name: those of effpass, and those that other distributions add through entry points.

A distribution adds a pass with one line in its `pyproject.toml`::

    [project.entry-points."effpass.passes"]
    my_pass = "my_package.my_pass:MyPass"

A pass is imported only when it is requested by name or listed by :func:`describe`; folders are never scanned. A plugin
that is broken or duplicated raises an error where its own name is used, and is shown with that error in the listing;
all other passes keep working.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections import defaultdict
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from effpass.core.errors import PluginError, did_you_mean
from effpass.core.pass_ import Pass

__all__ = ["BUILTIN", "GROUP", "STEP_KEYS", "PassInfo", "describe", "load", "names"]

GROUP = "effpass.passes"

# Keys that a recipe accepts for every pass in addition to its options; no pass may have an option of that name.
STEP_KEYS = ("require", "verify")

# The passes of effpass. They are listed here, instead of being read from installed metadata, so that they are complete
# in a checkout that was never installed or was installed before a pass was added. pyproject.toml repeats this table for
# other tools.
BUILTIN = {
    "fg2_gdn": "effpass.passes.weights.fg2_gdn:FG2GDN",
    "fuse_linears": "effpass.passes.graph.fuse_linears:FuseLinears",
    "fuse_rope_attention": "effpass.passes.graph.fuse_rope_attention:FuseRopeAttention",
    "fuse_rotary_table": "effpass.passes.graph.fuse_rotary_table:FuseRotaryTable",
    "fuse_routing": "effpass.passes.graph.fuse_routing:FuseRouting",
    "kv_offload": "effpass.passes.runtime.kv_offload:KVOffload",
    "merge_lora": "effpass.passes.weights.merge_lora:MergeLora",
    "mla_absorption": "effpass.passes.runtime.mla_absorption:MLAAbsorption",
    "moe_gemm": "effpass.passes.graph.moe_gemm:MoeGemm",
    "prefix_kv": "effpass.passes.runtime.prefix_kv:PrefixKV",
    "sparse_attention": "effpass.passes.runtime.sparse_attention:SparseAttention",
    "sparse_verification": "effpass.passes.runtime.sparse_verification:SparseVerificationPass",
    "structured_pruning": "effpass.passes.weights.structured_pruning:StructuredPruning",
}


@dataclasses.dataclass(frozen=True)
class PassInfo:
    """One pass in the listing of :func:`describe`.

    Attributes:
        name: registry key, by which a recipe names the pass.
        distribution: distribution that provides the pass; several names joined by ``" and "`` for a duplicate.
        version: version of that distribution.
        kind: ``"weights"``, ``"graph"`` or ``"runtime"``; None when the pass can't be loaded.
        exact: whether the rewritten model computes the same function up to rounding; None when the pass can't be
            loaded.
        needs_artifact: whether the pass needs data that was learned or downloaded for it.
        entrances: entrances at which the pass can act, of ``"model"``, ``"program"`` and ``"backend"``.
        summary: first line of the docstring of the class.
        error: why the pass can't be loaded; None for a working pass.
    """

    name: str
    distribution: str
    version: str
    kind: str | None = None
    exact: bool | None = None
    needs_artifact: bool = False
    entrances: tuple[str, ...] = ()
    summary: str = ""
    error: str | None = None


def names() -> list[str]:
    """Names of all passes, sorted. No pass is imported."""
    return sorted(_providers())


def load(name: str) -> type[Pass]:
    """The class of the pass `name`.

    Raises:
        PluginError: there is no such pass, two distributions provide it, or its class can't be imported or is not a
            valid pass.
    """
    providers = _providers()
    if name not in providers:
        raise PluginError(
            f"unknown pass {name!r}{did_you_mean(str(name), providers)}",
            hint="`effpass passes` lists all passes, also those that can't be loaded and why",
        )
    claims = providers[name]
    if len(claims) > 1:
        raise PluginError(
            f"two distributions provide a pass {name!r}: " + " and ".join(_from(claim) for claim in claims),
            hint="uninstall one of them",
        )
    return _load(claims[0])


def describe() -> list[PassInfo]:
    """Describe every pass, sorted by name. All passes are imported; a failure is recorded in `error`."""
    rows = []
    for name, claims in sorted(_providers().items()):
        distribution = " and ".join(_distribution(claim) for claim in claims)
        version = " and ".join(_version(claim) for claim in claims)
        try:
            cls = load(name)
        except PluginError as error:
            rows.append(PassInfo(name, distribution, version, error=error.message))
            continue
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        rows.append(
            PassInfo(name, distribution, version, cls.kind, cls.exact, cls.needs_artifact, cls.entrances, summary)
        )
    return rows


def _providers() -> dict[str, list[EntryPoint]]:
    providers: dict[str, list[EntryPoint]] = defaultdict(list)
    for name, value in BUILTIN.items():
        providers[name].append(EntryPoint(name, value, GROUP))
    for entry_point in _installed(tuple((place, _changed(place)) for place in sys.path)):
        providers[entry_point.name].append(entry_point)
    return dict(providers)


@functools.lru_cache(maxsize=1)
def _installed(places: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    """The entry points of other distributions, which are looked up again only when something was installed.

    Args:
        places: folders of `sys.path`, on which the result depends, and when each last changed.
    """
    return [found for found in entry_points(group=GROUP) if _distribution(found) != "effpass"]


def _changed(place: str) -> int:
    """When a folder last changed, which the installation of a distribution in it does; 0 if there is none."""
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


def _load(entry_point: EntryPoint) -> type[Pass]:
    try:
        cls = entry_point.load()
    except (Exception, SystemExit) as error:  # the module of a plugin may run any code on import
        raise PluginError(
            f"pass {entry_point.name!r} from {_from(entry_point)} can't be imported: {type(error).__name__}: {error}",
            hint=f"update or uninstall {_distribution(entry_point)}",
        ) from error
    fault = _fault(entry_point.name, cls)
    if fault is not None:
        raise PluginError(
            f"pass {entry_point.name!r} from {_from(entry_point)} is not valid: {entry_point.value} {fault}",
            hint=f"this is a fault of {_distribution(entry_point)}: update or uninstall it",
        )
    return cls


def _fault(name: str, cls: Any) -> str | None:
    """Why `cls` is not a valid pass with this name; None when it is valid."""
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        return f"is {cls!r}, not a subclass of effpass.Pass"
    for attribute in ("kind", "entrances"):
        if not hasattr(cls, attribute):
            return f"has no {attribute!r}: subclass GraphPass, WeightsPass or RuntimePass instead of Pass"
    if getattr(cls, "name", None) != name:
        return f"has the name {getattr(cls, 'name', None)!r}, which must be the entry point's, {name!r}"
    if not isinstance(getattr(cls, "exact", None), bool):
        return f"has exact = {getattr(cls, 'exact', None)!r}; it must say True (up to rounding) or False (approximate)"
    options = cls.Options
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        return f"has Options = {options!r}, which must be a frozen dataclass"
    if not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"has Options = {options.__qualname__}, a dataclass that is not frozen"
    reserved = [field.name for field in dataclasses.fields(options) if field.name in STEP_KEYS]
    if reserved:
        return f"has an option {reserved[0]!r}, a word that every recipe step understands already"
    try:
        get_type_hints(options)
    except Exception as error:
        return f"has Options with an annotation that can't be resolved: {error}"
    return None


def _distribution(entry_point: EntryPoint) -> str:
    return entry_point.dist.name or "?" if entry_point.dist is not None else "effpass"


def _version(entry_point: EntryPoint) -> str:
    if entry_point.dist is not None:
        return entry_point.dist.version or "?"
    from effpass import __version__

    return __version__


def _from(entry_point: EntryPoint) -> str:
    return f"{_distribution(entry_point)} {_version(entry_point)}"
