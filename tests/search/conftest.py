"""A tiny checkpoint to search recipes for, and a device whose ceilings need not be measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import make_checkpoint

from effpass.core import roofline
from effpass.core.model import load_model
from effpass.search.log import Log
from effpass.search.run import Search
from effpass.search.texts import Texts, builtin_text
from effpass.search.workload import Workload

WORKLOAD = Workload(prompt=128, new_tokens=8, sequences=4)


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("effpass.search.predict.ceilings", lambda device, dtype: roofline.known("h100"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("searched"))


@pytest.fixture(scope="session")
def load(checkpoint: Path) -> Callable[[], Any]:
    return lambda: load_model(checkpoint).model


@pytest.fixture(scope="session")
def texts(checkpoint: Path) -> Texts:
    return Texts.of(builtin_text()[:20000], None, load_model(checkpoint).tokenizer, WORKLOAD)


@pytest.fixture(scope="session")
def begun(load, texts, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a search for a goal that has calibrated and predicted, and measured nothing; made once."""

    @cache
    def make(calibrated: str) -> Path:
        folder = tmp_path_factory.mktemp("begun") / calibrated
        search = Search(Log.open(folder, {}, resume=False), load, texts, calibrated, 0.01, WORKLOAD, say=str)  # type: ignore[arg-type]
        search.begin()
        return folder

    return lambda goal: make("memory" if goal == "memory" else "latency")


@pytest.fixture
def new_search(load, texts, tmp_path, begun) -> Callable[..., Search]:
    """A search in a folder of its own, which has begun: ``new_search("memory", 0.01)``."""

    def make(goal: str, limit: float, *, name: str = "search", resume: bool = False) -> Search:
        settings = {"goal": goal, "limit": limit}
        log = Log.open(tmp_path / name, settings, resume=resume)
        if not resume:
            shutil.copytree(begun(goal), log.folder)
            log = replace(Log.open(log.folder, {}, resume=True), settings=settings)
            log.save()
        search = Search(log, load, texts, goal, limit, WORKLOAD, say=str)  # type: ignore[arg-type]
        search.begin()
        return search

    return make
