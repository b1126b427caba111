"""The folder of a run that was killed at any moment says what it is, and loses no line that a checkpoint knows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from killed import killed_at_each_step, killed_in_each_write

from effpass.core.errors import EffpassError
from effpass.core.fingerprint import Fingerprint
from effpass.trainers.finetune.run import begin, check_same
from effpass.trainers.run_folder import (
    METRICS,
    RUN,
    Recorder,
    check_places,
    cut_metrics,
    keep_model,
    read_metrics,
    same_model,
)

RUN_SETTINGS = {"command": "toy", "settings": {"lr": 0.1}}


def test_a_run_that_is_killed_as_it_begins(tmp_path):
    """What stands there can be gone on with, or the message says that it can't and what to do."""
    work, seen = tmp_path / "out.training", set()
    model = Fingerprint.of(torch.nn.Linear(2, 2))
    for _ in killed_at_each_step(lambda: begin(work, RUN_SETTINGS, 0, model, resume=False), tmp_path):
        if (work / RUN).exists():
            check_places(tmp_path / "out", work, resume=True)
            check_same(RUN_SETTINGS, work)
            seen.add("goes on")
        elif work.exists():
            for resume in (False, True):
                with pytest.raises(EffpassError, match="holds what a run wrote before it began") as caught:
                    check_places(tmp_path / "out", work, resume=resume)
                assert caught.value.hint == "remove it, and leave out --resume"
            seen.add("begins again")
        shutil.rmtree(work, ignore_errors=True)
    assert {path.name for path in work.iterdir()} == {"checkpoints", "model.json", RUN}
    assert seen == {"goes on", "begins again"}


def test_metrics_are_cut_whole_or_not_at_all(tmp_path):
    path = tmp_path / METRICS
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 9)]

    def restore() -> None:
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def cut() -> None:
        cut_metrics(path, 5)

    restore()
    deaths = 0
    for _ in (*killed_at_each_step(cut, tmp_path), *killed_in_each_write(cut, (0, 10, 50))):
        assert read_metrics(path) in (lines, lines[:5])
        restore()
        deaths += 1
    assert deaths > 4
    cut()
    assert read_metrics(path) == lines[:5]


def test_a_line_of_metrics_that_was_cut_short_is_measured_again(tmp_path):
    def record() -> None:
        recorder = Recorder(tmp_path / METRICS, 3, lambda line: None, ("loss",))
        for step in range(1, 4):
            recorder.write(step, {"loss": float(step)})

    for _ in killed_in_each_write(record, tuple(range(0, 130, 9))):
        whole = read_metrics(tmp_path / METRICS)
        assert [line["step"] for line in whole] == list(range(1, len(whole) + 1))
        (tmp_path / METRICS).unlink()


def test_a_run_is_not_resumed_with_another_model(tmp_path):
    model = torch.nn.Linear(8, 8)
    keep_model(tmp_path, same_model(tmp_path, model))
    assert same_model(tmp_path, model) == Fingerprint.of(model)
    rounded = torch.nn.Linear(8, 8)
    rounded.load_state_dict({name: x.bfloat16().float() for name, x in model.state_dict().items()})
    same_model(tmp_path, rounded)
    for other in (torch.nn.Linear(8, 8), torch.nn.Linear(8, 9)):
        with pytest.raises(EffpassError, match="the model is not the one that the run began with"):
            same_model(tmp_path, other)
