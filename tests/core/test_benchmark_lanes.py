"""Benchmarks side by side: the others stand still while one times something, whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from benchmarks import lanes, rows

ROOT = Path(__file__).resolve().parents[2]
# Writes when it ran, every 10 ms, for as long as it is given.
_TICKING = """
import sys, time
until = time.time() + float(sys.argv[1])
while time.time() < until:
    print(time.time(), flush=True)
    time.sleep(0.01)
"""
# Is alone for a second, and writes from when to when.
_TIMING = """
import json, os, time
from benchmarks.alone import alone
time.sleep(1)
with alone():
    begin = time.time()
    time.sleep(1)
    end = time.time()
with open(os.environ["ROWS"], "w") as file:
    json.dump([begin, end], file)
"""
# Is stopped by its limit while it is alone.
_STUCK = """
import time
from benchmarks.alone import alone
with alone():
    time.sleep(60)
"""


def _queue(folder: Path, name: str, *jobs: tuple[str, float, str]) -> Path:
    path = folder / name
    lines = []
    for job, limit, source in jobs:
        if not source.startswith("need "):
            script, _, arguments = source.partition("§")
            file = folder / f"{job}.py"
            file.write_text(script)
            source = f"PYTHONPATH={ROOT} {sys.executable} {file} {arguments}"
        lines.append(f"{job}|{limit}|{source}")
    path.write_text("# a remark\n\n" + "\n".join(lines) + "\n")
    return path


def _ticks(folder: Path, job: str) -> list[float]:
    return [float(line) for line in (folder / "log" / f"{job}.log").read_text().splitlines()]


def test_others_stand_still_while_one_times(tmp_path: Path):
    out = tmp_path / "out"
    queues = [
        _queue(tmp_path, "times@0", ("timing", 60, _TIMING)),
        _queue(tmp_path, "ticks@0", ("beside", 60, _TICKING + "§5")),
        _queue(tmp_path, "other@1", ("elsewhere", 60, _TICKING + "§5")),
    ]
    assert lanes.run(out, queues) == 0
    begin, end = json.loads((out / "rows" / "timing.jsonl").read_text())
    beside, elsewhere = _ticks(out, "beside"), _ticks(out, "elsewhere")
    assert beside[0] < begin < end < beside[-1], "they did not run at the same time"
    assert not [tick for tick in beside if begin < tick < end]
    assert len([tick for tick in elsewhere if begin < tick < end]) > 10


def test_a_job_that_ends_while_it_times_leaves_nothing_stopped_and_needs_are_waited_for(tmp_path: Path):
    out = tmp_path / "out"
    queues = [
        _queue(tmp_path, "stuck@0", ("stuck", 3, _STUCK)),
        _queue(tmp_path, "two.2@0", ("first", 60, _TICKING + "§4"), ("-", 60, "need stuck"), ("last", 60, "print(1)")),
    ]
    assert lanes.run(out, queues) == 1
    status = [line.partition(" s  ")[2] for line in (out / "status").read_text().splitlines()]
    assert any(line.startswith("FAILED stuck: limit") for line in status)
    assert any(line.startswith("end first: 0") for line in status)
    assert status.index("begin last") > next(i for i, line in enumerate(status) if line.startswith("FAILED stuck"))
    assert (out / "log" / "last.log").read_text() == "1\n"


def test_what_is_measured_is_measured_alone(monkeypatch):
    entered, seen = [], []

    @contextlib.contextmanager
    def alone():
        entered.append(True)
        yield
        entered.pop()

    monkeypatch.setattr(rows, "alone", alone)
    rows.measure(lambda: seen.append(len(entered)), "cpu", warmup=1, runs=2)
    rows.measure_pair(lambda: seen.append(len(entered)), lambda: seen.append(len(entered)), "cpu", warmup=1, runs=2)
    assert seen == [1] * 9
    assert not entered
