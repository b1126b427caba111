"""Passes of a recipe that have no place on the way to a file are refused before work begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effpass.core.errors import PassRefusedError
from effpass.core.manager import Planned
from effpass.core.pass_ import RuntimePass
from effpass.lowering.targets import export
from effpass.passes.graph.fuse_rotary_table import FuseRotaryTable


def test_runtime_passes_have_no_place_in_a_file() -> None:
    class NeedsALoop(RuntimePass):
        name = "needs_a_loop"
        exact = True

        def prepare(self, model: torch.nn.Module) -> tuple[int, list[Any]]:
            raise AssertionError("work was started")

    with pytest.raises(PassRefusedError, match=r"needs_a_loop can't act .* it is a runtime pass.*\n.*effpass\.prepare"):
        export.check_passes([Planned(NeedsALoop())])


def test_verifying_has_no_inputs_in_an_export() -> None:
    with pytest.raises(PassRefusedError, match=r"fuse_rotary_table has verify: true.*\n.*leave verify out"):
        export.check_passes([Planned(FuseRotaryTable(), verify=True)])
