from __future__ import annotations

import gc

import pytest


@pytest.fixture
def no_derived_weights(toy_passes):
    """Derived weights of earlier tests are gone, and so are the reports; the toy passes are there."""
    from effpass.backend import reports
    from effpass.core.live_weights import Entry

    reports.clear()
    if Entry.live:
        gc.collect()
    assert not Entry.live, "an earlier test left derived weights behind"
