"""Distributions made up for one test: a dist-info folder with entry points, and the modules that they name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest


def provide(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    distribution: str,
    passes: Mapping[str, str],
    source: str = "",
    version: str = "1.2.3",
) -> None:
    """Put a distribution on `sys.path` whose module, `distribution` with underscores, holds `source`.

    Args:
        folder: where to write; one for each distribution.
        passes: entry points, name → name of the class in the module.
    """
    module = distribution.replace("-", "_")
    site = folder / distribution
    info = site / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [f"{name} = {module}:{target}" for name, target in passes.items()]
    (info / "entry_points.txt").write_text("\n".join(["[effpass.passes]", *lines, ""]))
    (site / f"{module}.py").write_text(dedent(source))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
