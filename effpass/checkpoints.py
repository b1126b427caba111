"""Prepared models as ordinary checkpoints. The functions are public in :mod:`effpass.api`."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effpass.core import registry
from effpass.core.errors import EffpassError, PassRefusedError
from effpass.core.recipe import Recipe
from effpass.core.whole import put_folder

if TYPE_CHECKING:
    from effpass.core.report import Report

__all__ = ["check_savable", "save"]


def check_savable(recipe: Recipe | None, folder: str | Path, *, overwrite: bool = False) -> None:
    """Check that :func:`save` can write a model prepared with `recipe` as a checkpoint.

    Args:
        recipe: recipe whose passes must all work on weights; None if it is not saved.
        folder: folder of the checkpoint. It must not exist, or with `overwrite` be a checkpoint.
        overwrite: replace an existing checkpoint.

    Raises:
        EffpassError: a pass does not work on weights, or `folder` can't be written.
    """
    for step in recipe.steps if recipe is not None else ():
        if registry.load(step.name).kind != "weights":
            raise PassRefusedError(
                f"{step.name} rewrites the graph or the runtime, which a checkpoint can't hold",
                hint="leave it out of this recipe; apply it with torch.compile(backend='effpass') or `effpass export`",
            )
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise EffpassError(f"{folder} exists", hint="choose another folder, or pass overwrite (--overwrite)")
    if folder.exists() and not (folder / "config.json").is_file():
        raise EffpassError(
            f"{folder} is no checkpoint, and only a checkpoint is replaced", hint="choose another folder"
        )


def save(
    model: Any, folder: str | Path, *, recipe: Recipe | None = None, tokenizer: Any = None, overwrite: bool = False
) -> None:
    """Save a prepared model as an ordinary checkpoint, atomically.

    Args:
        model: model returned by :func:`effpass.prepare`. Its `effpass_report`, if it has one, must count at least one
            rewrite.
        folder: folder of the checkpoint; parent folders are created.
        recipe: recipe to save in the folder as ``effpass.yaml``; None saves none.
        tokenizer: tokenizer to save in the folder; None saves none.
        overwrite: replace an existing checkpoint.

    Raises:
        EffpassError: nothing was rewritten, `recipe` is not one that a checkpoint can hold, or `folder` exists and is
            not to be replaced.
    """
    folder = Path(folder).resolve()  # a link to a folder stays a link
    check_savable(recipe, folder, overwrite=overwrite)
    report: Report | None = getattr(model, "effpass_report", None)
    if report is not None and not report.hits:
        raise EffpassError("no pass changed a weight; nothing to save: " + "; ".join(report.lines()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if recipe is not None:
            recipe.save(temporary / "effpass.yaml")
        put_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
