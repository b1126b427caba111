"""`effpass cache clear`: remove what effpass keeps between runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from effpass.cli.console import megabytes, stdout

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What effpass keeps between runs.")

# Sub-folders of the cache folder that effpass makes. Only these are removed: EFFPASS_CACHE may name a folder that
# holds other things.
KEPT = ("gguf", "ceilings", "experts")


@app.callback()
def _group() -> None:
    pass


@app.command()
def clear() -> None:
    """Remove unpacked GGUF checkpoints, measured ceilings and fits; the first two are made again when needed."""
    from effpass.core.gguf import cache_dir

    folder = cache_dir()
    freed = 0
    for name in KEPT:
        if (folder / name).is_dir():
            freed += _size(folder / name)
            shutil.rmtree(folder / name)
    stdout().print(f"{folder}: " + (f"{megabytes(freed)} removed" if freed else "nothing to remove"), markup=False)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
