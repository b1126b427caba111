"""The tutorials: every command is one that the command line takes, and all of them run, in the order of the pages."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# In the order in which a reader meets them: each goes on in the folder of the one before.
TUTORIALS = [
    ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("train-a-transform", "export-and-deploy", "many-gpus")
]

_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(tutorial: Path) -> list[tuple[str, str]]:
    return [(match["language"], match["text"]) for match in _BLOCK.finditer(tutorial.read_text())]


def commands() -> list[list[str]]:
    """The words of every call of effpass, by itself or under torchrun, without its name."""
    found = []
    for tutorial in TUTORIALS:
        for language, text in blocks(tutorial):
            for line in text.replace("\\\n", " ").splitlines() if language == "bash" else []:
                words = shlex.split(line, comments=True)
                if "effpass" in words:
                    found.append(words[words.index("effpass") + 1 :])
    return found


def test_there_is_a_page_for_each_and_no_other():
    assert sorted((ROOT / "docs" / "tutorials").glob("*.md")) == sorted(TUTORIALS)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_takes_these_words(words):
    from typer.main import get_command

    from effpass.cli.app import app

    command, context = get_command(app), None
    while hasattr(command, "get_command"):
        context = command.make_context(words[0], [], parent=context, resilient_parsing=True)
        command = command.get_command(context, words[0])
        assert command is not None, words
        words = words[1:]
    command.make_context("command", list(words), parent=context)


@pytest.mark.slow
def test_they_run(tmp_path):
    """Blocks that name a file become it; commands run in between, with effpass and Python of this environment."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": places, "OMP_NUM_THREADS": "1", "EFFPASS_CACHE": str(tmp_path / "cache")}
    for tutorial in TUTORIALS:
        for language, text in blocks(tutorial):
            first, _, rest = text.partition("\n")
            if first.startswith("# file: "):
                (tmp_path / first.removeprefix("# file: ")).write_text(rest)
            elif language == "bash" and not text.startswith("pip install"):
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", text],
                    cwd=tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                print(f"$ {text}{done.stdout}")
                assert done.returncode == 0, f"{tutorial.name}: {text}{done.stdout}{done.stderr}"
    assert {"tiny", "keep", "small", "adapter", "small.onnx", "small.pt2", "copies", "shards", "tuned"} <= {
        path.name for path in tmp_path.iterdir()
    }
