"""A tolerance that costs nothing, for the exports inside a test: to measure one takes a compilation.

Exports of fixtures of a wider scope are made before, and measure.
"""

from __future__ import annotations

import pytest
from fixed_tolerance import fixed_tolerance

from effpass.lowering.targets import export


@pytest.fixture(autouse=True)
def _fixed_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "measure_tolerance", fixed_tolerance)
