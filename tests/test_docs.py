"""The documents do what they say: their code runs, their tables are up to date, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)#\s]+)[^)]*\)")


def blocks(document: Path, language: str) -> list[str]:
    return [match["text"] for match in _BLOCK.finditer(document.read_text()) if match["language"] == language]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run a document in, whose files can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def install(folder: Path, pyproject: str) -> None:
    """Make the entry points of a pyproject.toml known, as an installation would."""
    import tomllib

    info = folder / "tutorial-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tutorial\nVersion: 1.0\n")
    groups = tomllib.loads(pyproject)["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    importlib.invalidate_caches()


def execute(document: Path, folder: Path) -> str:
    """Run the Python blocks of a document in order, in one namespace; blocks that name a file become that file."""
    printed = io.StringIO()
    namespace: dict[str, object] = {"__name__": "document"}
    for text in blocks(document, "python"):
        first, _, rest = text.partition("\n")
        if first.startswith("# file: "):
            (folder / first.removeprefix("# file: ")).write_text(rest)
            importlib.invalidate_caches()
            continue
        start = document.read_text().split(text)[0].count("\n")  # so that a traceback shows the document's line
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * start + text, str(document), "exec"), namespace)
    return printed.getvalue()


def test_writing_a_pass(workplace):
    document = ROOT / "docs" / "writing-a-pass.md"
    (pyproject,) = blocks(document, "toml")
    install(workplace, pyproject)
    printed = execute(document, workplace)
    assert printed.splitlines() == [
        "Counter({'aten.linear.default': 2, 'aten.gelu.default': 1})",
        "tanh_gelu: 1 rewritten",
    ]
