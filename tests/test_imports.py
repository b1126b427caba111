"""Who imports whom, what the tables in pyproject.toml promise, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import effpass
from effpass.core import registry

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("passes", "lowering", "runtime", "trainers")

# Floor of the house → its height, and what it may import beside itself. The faces may import everything.
FLOORS = {
    "effpass.core": (1, ()),
    "effpass.lowering": (2, ("effpass.core",)),
    "effpass.runtime": (3, ("effpass.core", "effpass.lowering.ops")),
    "effpass.passes": (4, ("effpass.core", "effpass.lowering.ops", "effpass.runtime")),
    "effpass.trainers": (5, ("effpass.core", "effpass.lowering", "effpass.runtime", "effpass.passes")),
    "effpass": (6, ("effpass",)),
}


def sources() -> dict[str, Path]:
    """Module name → file, of everything that is installed."""
    roots = [("effpass", ROOT / "effpass"), *((f"effpass.{folder}", ROOT / folder) for folder in FOLDERS)]
    found = {}
    for package, folder in roots:
        for path in sorted(folder.rglob("*.py")):  # follows no links
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


SOURCES = sources()


def belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor(module: str) -> str:
    return next(name for name in FLOORS if belongs(module, name))


def imports(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Modules that are imported: (name, line, only for type checkers)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((name, node.lineno, typing_only) for name in _imported_from(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.body, []), True)
            yield from imports(ast.Module(node.orelse, []), typing_only)
        else:
            yield from imports(node, typing_only)


def _imported_from(node: ast.ImportFrom) -> list[str]:
    module = node.module or ""
    if module == "effpass":  # names that are found on first use live elsewhere
        return [
            effpass._HOME.get(alias.name, f"effpass.{alias.name}")
            for alias in node.names
            if alias.name != "__version__"
        ]
    submodules = [f"{module}.{alias.name}" for alias in node.names]
    return [name if name in SOURCES else module for name in submodules]


def fault(importer: str, imported: str, typing_only: bool) -> str | None:
    """Why `importer` may not import `imported`; None when it may."""
    if not belongs(imported, "effpass"):
        return None
    (height, allowed), (other, _) = FLOORS[floor(importer)], FLOORS[floor(imported)]
    if belongs(imported, floor(importer)) or any(belongs(imported, package) for package in allowed):
        return None
    if typing_only and other <= height:
        return None
    return f"{importer} (floor {height}) imports {imported} (floor {other})"


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downwards(module):
    tree = ast.parse(SOURCES[module].read_text())
    faults = [
        f"line {line}: {problem}" for name, line, typing in imports(tree) if (problem := fault(module, name, typing))
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("importer", "line", "allowed"),
    [
        ("effpass.core.program", "import torch, sympy", True),
        ("effpass.core.program", "from effpass.core import errors", True),
        ("effpass.core.program", "from effpass import __version__", True),
        ("effpass.core.program", "from effpass import Recipe", True),
        ("effpass.core.program", "from effpass import prepare", False),
        ("effpass.core.program", "def f():\n    import effpass.lowering.ops", False),
        ("effpass.core.program", "if TYPE_CHECKING:\n    from effpass import passes", False),
        ("effpass.lowering.targets.onnx", "from effpass.core.program import Program", True),
        ("effpass.lowering.targets.onnx", "from effpass.runtime import caches", False),
        ("effpass.runtime.caches", "import effpass.lowering.ops.attention", True),
        ("effpass.runtime.caches", "import effpass.lowering.targets", False),
        ("effpass.runtime.caches", "if TYPE_CHECKING:\n    import effpass.lowering.targets", True),
        ("effpass.passes.graph.moe", "from effpass.runtime.caches import Cache", True),
        ("effpass.passes.graph.moe", "import effpass.trainers", False),
        ("effpass.passes.graph.moe", "if TYPE_CHECKING:\n    import effpass.trainers", False),
        ("effpass.trainers.mona", "import effpass.passes, effpass.runtime, effpass.lowering.targets", True),
        ("effpass.trainers.mona", "from effpass.api import prepare", False),
        ("effpass.cli.app", "import effpass.trainers, effpass.api", True),
    ],
)
def test_the_rule_itself(importer, line, allowed):
    faults = [fault(importer, name, typing) for name, _, typing in imports(ast.parse(line))]
    assert all(problem is None for problem in faults) == allowed


def test_the_four_folders_have_no_second_name():
    """`import passes` works in the repository's root, and gives a second copy of every class."""
    banned = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(FOLDERS)
    files = [*SOURCES.values()]
    files += [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    faults = [
        f"{path.relative_to(ROOT)}:{line}: import {name}"
        for path in files
        for name, line, _ in imports(ast.parse(path.read_text()))
        if name.partition(".")[0] in FOLDERS
    ]
    assert faults == []


# -- tables ---------------------------------------------------------------------------------------------------------


def test_the_package_list_is_that_of_the_folders():
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    holding = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in SOURCES.items()}
    assert sorted(packages) == sorted(holding)
    assert [name for name in packages if SOURCES[name].name != "__init__.py"] == []
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {
        "effpass": "effpass",
        **{f"effpass.{folder}": folder for folder in FOLDERS},
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_links_for_type_checkers_exist(folder):
    assert os.readlink(ROOT / "effpass" / folder) == f"../{folder}"
    module = importlib.import_module(f"effpass.{folder}")
    assert module.__name__ == f"effpass.{folder}"


def resolve(value: str) -> object:
    module, _, attribute = value.partition(":")
    return getattr(importlib.import_module(module), attribute)


def test_the_console_script_and_the_backend_exist():
    project = PYPROJECT["project"]
    assert project["scripts"] == {"effpass": "effpass.cli:main"}
    assert project["entry-points"]["torch_dynamo_backends"] == {"effpass": "effpass.backend:effpass"}
    assert callable(resolve(project["scripts"]["effpass"]))
    assert callable(resolve(project["entry-points"]["torch_dynamo_backends"]["effpass"]))


def test_passes_are_named_like_their_files_and_kinds():
    assert PYPROJECT["project"]["entry-points"]["effpass.passes"] == registry.BUILTIN
    for name, value in registry.BUILTIN.items():
        cls = registry.load(name)
        assert cls is resolve(value)
        assert value.partition(":")[0] == f"effpass.passes.{cls.kind}.{name}"


def test_every_public_name_exists_and_type_checkers_see_the_same():
    public = set(effpass.__all__) - {"__version__"}
    assert public == set(effpass._HOME)
    tree = ast.parse((ROOT / "effpass" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == effpass._HOME
    for name in public:
        assert getattr(effpass, name) is getattr(importlib.import_module(effpass._HOME[name]), name)
    assert set(dir(effpass)) == set(effpass.__all__)
    with pytest.raises(AttributeError, match="module 'effpass' has no attribute 'prepair'"):
        _ = effpass.prepair


def test_one_version():
    assert PYPROJECT["project"]["version"] == effpass.__version__


# -- what an import costs -------------------------------------------------------------------------------------------

HEAVY = ("transformers", "peft", "accelerate", "onnx", "onnxscript", "onnxruntime", "pydantic", "rich", "typer", "trl")


def loaded_by(code: str, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that are loaded after `code`, in a fresh interpreter."""
    code = f"{code}\nimport sys; print(*[name for name in {names} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_importing_effpass_loads_next_to_nothing():
    assert loaded_by("import effpass", (*HEAVY, "torch", "numpy", "sympy", "yaml", "safetensors")) == []


@pytest.mark.parametrize("module", ["effpass.api", "effpass.backend"])
def test_the_python_faces_load_torch_and_wait_with_the_rest(module):
    assert loaded_by(f"import {module}", (*HEAVY, "torch")) == ["torch"]


def test_the_command_line_starts_without_torch():
    """`effpass --help` has to answer at once."""
    assert loaded_by("import effpass.cli; import effpass.cli.app", ("torch", "transformers", "peft", "onnx")) == []


def test_the_optimizer_needs_torch_alone():
    """What else learns stands on transformers' Trainer and on PEFT."""
    modules = ["effpass.trainers", *(name for name in SOURCES if belongs(name, "effpass.trainers.mona"))]
    assert len(modules) > 10
    blocked = {*HEAVY, "safetensors", "yaml", "huggingface_hub", "tokenizers"}
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}, None))\n" + "\n".join(
        f"import {m}" for m in modules
    )
    assert loaded_by(code, ("effpass.trainers",)) == ["effpass.trainers"]
