"""A tiny checkpoint, an adapter for it, and a way to run commands."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import make_adapter, make_checkpoint

from effpass.cli.console import NOISY_LOGGERS


@pytest.fixture(autouse=True)
def _quiet_only_here(monkeypatch: pytest.MonkeyPatch):
    """A command may set logging and the environment as it likes, for its own process; tests share one."""
    from transformers.utils import logging as transformers_logging

    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        if not os.environ[name]:
            monkeypatch.delenv(name)
    monkeypatch.delenv("COLUMNS", raising=False)  # set to 80 in the workers of pytest-xdist, where it would wrap paths
    levels = {name: logging.getLogger(name).level for name in (*NOISY_LOGGERS, "effpass")}
    verbosity = transformers_logging.get_verbosity()
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def _ceilings_of_a_busy_machine_stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """What inspect measures in a test is kept for the other tests, and not for the user."""
    from effpass.core import roofline

    folder = tmp_path_factory.getbasetemp() / "ceilings"
    monkeypatch.setattr(roofline, "cache_dir", lambda: folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe: ``recipe_file("- merge_lora: {adapter: /path}")``."""

    def write(*items: str, name: str = "r.yaml", more: str = "") -> Path:
        passes = "\n".join(f"  {item}" for item in items)
        (tmp_path / name).write_text(f"version: 1\npasses:\n{passes}\n{more}")
        return tmp_path / name

    return write


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run the command line in this process: ``run("passes", "--json")``."""
    from typer.testing import CliRunner

    from effpass.cli.app import app

    def invoke(*arguments: object, stdin: str | None = None, debug: bool = False) -> Any:
        words = [*(["--debug"] if debug else []), *map(str, arguments)]
        return CliRunner().invoke(app, words, input=stdin, prog_name="effpass")

    return invoke


@pytest.fixture
def refused(run: Callable[..., Any]) -> Callable[..., str]:
    """Run a command that must fail with one message on stderr; returns the message."""

    def invoke(*arguments: object, stdin: str | None = None) -> str:
        result = run(*arguments, stdin=stdin)
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
        lines = [line for line in result.stderr.splitlines() if " …" not in line and not line.endswith(" s")]
        assert lines[0].startswith("error: "), result.stderr
        assert sum(line.startswith("error: ") for line in lines) == 1, result.stderr
        assert result.stdout == ""
        return "\n".join(lines)

    return invoke
