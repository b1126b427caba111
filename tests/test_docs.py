"""The documents do what they say: their code runs, their tables are up to date, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

RECIPES = [file for place in ("recipes", "examples/recipes") for file in sorted((ROOT / place).glob("*.yaml"))]

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


@pytest.fixture
def tiny(tmp_path_factory, workplace, monkeypatch):
    """What the README's code finds: a tiny model for any name, two adapters in the folder, and no real compiler."""
    from tiny_checkpoint import make_adapter, make_checkpoint

    import effpass.api
    import effpass.backend

    folder = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    make_adapter(folder, workplace / "adapter")
    make_adapter(folder, workplace / "other_adapter")
    loader = effpass.api.load_model
    monkeypatch.setattr(effpass, "load_model", lambda name: loader(folder), raising=False)
    monkeypatch.setattr(effpass.backend, "inner_backend", lambda options, mode: lambda gm, inputs: gm)
    return workplace


def test_readme(tiny):
    import effpass.backend

    effpass.backend.reports.clear()
    printed = execute(ROOT / "README.md", tiny)
    assert [p.hits for report in effpass.backend.reports for p in report.passes] == [14]
    assert (tiny / "model.onnx").is_file()
    assert float(printed.rpartition("export error ")[2]) < 1e-5


def test_fine_tuning_document(workplace):
    pytest.importorskip("peft")
    execute(ROOT / "docs" / "fine-tuning.md", workplace)


def test_balance_document(workplace, monkeypatch):
    pytest.importorskip("transformers")
    import torch.distributed

    monkeypatch.setenv("EFFPASS_CACHE", str(workplace / "cache"))
    monkeypatch.setattr("effpass.trainers.balance.measure._PACKED", 256)  # measuring takes seconds
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)  # as torchrun does
    try:
        assert execute(ROOT / "docs" / "balance.md", workplace) == "1.000\n" * 4
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_recipes_document(workplace):
    from effpass import Recipe

    document = ROOT / "docs" / "recipes.md"
    assert execute(document, workplace) == "version: 1\npasses:\n- merge_lora:\n    quantized: keep\n\n"
    for text in blocks(document, "yaml") + blocks(ROOT / "README.md", "yaml"):
        assert [step.name for step in Recipe.parse(text).steps] == ["merge_lora", "structured_pruning"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_shipped_recipes_are_valid_and_documented(file):
    from effpass import Recipe

    assert Recipe.load(file).build()
    assert f"`{file.relative_to(ROOT)}`" in (ROOT / "docs" / "recipes.md").read_text()


def test_generated_parts_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for document in generate.DOCUMENTS:
        text = document.read_text()
        assert "<!-- generated: " in text
        assert generate.generated(document) == text, "run: python docs/generate.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for match in _LINK.finditer(document.read_text()):
        target = match["target"]
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    """`strict: true` in mkdocs.yml: a dead link or a page in no menu is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {page.relative_to(tmp_path / "site").parts[0] for page in (tmp_path / "site").rglob("*.html")}
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= built


def test_documented_commands_exist():
    from typer.main import get_command

    from effpass.cli.app import app
    from effpass.cli.groups import BUILTIN

    root = get_command(app)
    context = root.make_context("effpass", [], resilient_parsing=True)
    known = set(root.list_commands(context))
    named = {m for d in DOCUMENTS for m in re.findall(r"`effpass (?:--debug )?([a-z]+)", d.read_text())}
    assert named <= known
    page = (ROOT / "README.md").read_text()
    assert known <= set(re.findall(r"`effpass ([a-z]+)", page))
    named = set(re.findall(r"(?:train|calibrate) [a-z0-9-]+", page))
    own = {f"{group.removeprefix('effpass.')} {name}" for group, commands in BUILTIN.items() for name in commands}
    assert own <= named
