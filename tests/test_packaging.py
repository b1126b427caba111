"""effpass and a third party's plugin, built as wheels, installed in a clean virtual environment and used there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import effpass
from effpass.core import registry

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "effpass-rms-norm"
FOLDERS = ["effpass", "passes", "lowering", "runtime", "trainers"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command outside the checkout, with no way back to it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV_"))}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Wheels of effpass (from its sdist) and of the plugin, built from copies: building writes beside the source."""
    folder = tmp_path_factory.mktemp("build")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    source = folder / "effpass"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*FOLDERS, "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    shutil.copytree(PLUGIN, folder / "plugin", ignore=unwanted)
    run(sys.executable, "-m", "build", "--no-isolation", "-o", folder / "dist", source, cwd=folder)
    run(sys.executable, "-m", "build", "--no-isolation", "-w", "-o", folder / "dist", folder / "plugin", cwd=folder)
    return {path.name.partition("-")[0]: path for path in (folder / "dist").glob("*.whl")}


@pytest.fixture(scope="module")
def python(wheels, tmp_path_factory) -> Path:
    """Python of a new environment with the two wheels.

    What they depend on is that of the running environment, which stands behind the new one as a plain path: so its
    `.pth` files, with them an editable install of effpass, count for nothing.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    behind = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "behind.pth").write_text("\n".join(behind) + "\n")
    install = ("install", "--no-index", "--no-deps", "--ignore-installed", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, *install, *wheels.values(), cwd=folder)
    return python


def inside(python: Path, code: str) -> str:
    return run(python, "-I", "-c", code, cwd=python.parent).strip()


def test_the_wheel_holds_every_module_once_and_nothing_else(wheels):
    with zipfile.ZipFile(wheels["effpass"]) as wheel:
        names = wheel.namelist()
    assert len(names) == len(set(names))
    assert {name.partition("/")[0] for name in names} == {"effpass", f"effpass-{effpass.__version__}.dist-info"}
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]  # rglob follows no links
    modules = {
        str(path.relative_to(ROOT)).removeprefix("effpass/") for path in files if "__pycache__" not in path.parts
    }
    assert {name.removeprefix("effpass/") for name in names if name.endswith(".py")} == modules
    assert "effpass/py.typed" in names
    recipes = {f"effpass/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert {name for name in names if name.endswith(".yaml")} == recipes
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_is_imported_from_there_and_fast(python):
    code = "import time; t = time.perf_counter(); import effpass; print(time.perf_counter() - t, effpass.__file__)"
    seconds, file = inside(python, code).split()
    assert float(seconds) < 2
    assert Path(file).is_relative_to(python.parents[1])
    found = inside(python, "import effpass.passes, effpass.trainers as t; print(effpass.passes.__file__, t.__file__)")
    assert all(Path(file).is_relative_to(python.parents[1]) for file in found.split())


def test_recipes_have_names_there(python):
    assert "moe-serving: valid, 1 pass" in run(
        python.parent / "effpass", "recipe", "check", "moe-serving", cwd=python.parent
    )


def test_no_module_leaks_to_the_top_level(python):
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    installed = {path.name for path in site.iterdir()} - {"behind.pth", "__pycache__"}
    assert installed == {
        "effpass",
        f"effpass-{effpass.__version__}.dist-info",
        "effpass_rms_norm",
        "effpass_rms_norm-0.1.0.dist-info",
    }


def test_metadata_and_console_script(python):
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps([[e.group, e.name, e.value] for e in m.distribution('effpass').entry_points]))"
    )
    groups = {"console_scripts": PYPROJECT["project"]["scripts"], **PYPROJECT["project"]["entry-points"]}
    declared = [[group, name, value] for group, table in groups.items() for name, value in table.items()]
    assert sorted(json.loads(inside(python, code))) == sorted(declared)
    assert "Usage: effpass" in run(python.parent / "effpass", "--help", cwd=python.parent)


def test_torch_knows_the_backend_by_name(python):
    code = (
        "import torch._dynamo as d; print(d.list_backends().count('effpass'), d.lookup_backend('effpass').__module__)"
    )
    assert inside(python, code).splitlines()[-1] == "1 effpass.backend"


def test_the_plugin_is_listed_with_its_distribution(python):
    code = (
        "import json; from effpass.core.registry import describe; "
        "print(json.dumps([[r.name, r.distribution, r.version, r.error] for r in describe()]))"
    )
    rows = {name: rest for name, *rest in json.loads(inside(python, code).splitlines()[-1])}
    assert rows["rms_norm"] == ["effpass-rms-norm", "0.1.0", None]
    for name in registry.BUILTIN:
        assert rows[name] == ["effpass", effpass.__version__, None]


def test_the_plugin_passes_its_own_tests_there(python, tmp_path):
    shutil.copytree(PLUGIN / "tests", tmp_path / "tests")
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    output = run(python, "-P", "-m", "pytest", *options, tmp_path / "tests", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert " passed" in output
    assert "skipped" not in output
