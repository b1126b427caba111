"""What a table of times says of other programs."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import psutil
import pytest

from effpass.cli import machine
from effpass.cli.machine import OtherPrograms

Times = namedtuple("Times", "user system idle iowait guest")


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        (40.0, 0.0, None),
        (20.0, 3.9, None),
        (20.0, 4.1, "kept 0.4 of 4 cores busy"),
        (20.0, 20.0, "kept 2.0 of 4 cores busy"),
        (0.0, 41.0, "kept 4.0 of 4 cores busy"),  # clocks that do not agree
    ],
)
def test_ten_seconds(own, others, said, monkeypatch):
    clock = {"now": 0.0, "user": 700.0, "own": 10.0}
    # A virtual machine's time stands in `guest` and in `user`.
    monkeypatch.setattr(psutil, "cpu_times", lambda: Times(clock["user"] + 50.0, 5.0, 100.0, 3.0, 50.0))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(
        psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=clock["own"], system=1.0))
    )
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock["now"])
    watched = OtherPrograms()
    clock["now"] += 10.0
    clock["own"] += own
    clock["user"] += own + others
    remark = watched.remark()
    assert remark == said if said is None else said in remark
