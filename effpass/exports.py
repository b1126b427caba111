"""Exported files: writing, checking, loading and validating them. The functions are public in :mod:`effpass.api`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from effpass.core.plan import plan, read_recipe
from effpass.core.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from effpass.lowering.targets.decode_graph import Step
    from effpass.lowering.targets.export import ExportedDecoder
    from effpass.lowering.targets.validate import Validation

__all__ = ["check_export", "export", "load_exported", "validate"]


def export(
    model: torch.nn.Module,
    recipe: Recipe | str | Path | Mapping[str, Any] | None,
    out: str | Path,
    *,
    target: str = "onnx",
    max_batch: int | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportedDecoder:
    """Rewrite `model` with `recipe`, export it to a file, and validate the file.

    Weights passes act on the model itself, which is changed in place; graph passes act on the exported program. A file
    that fails validation is removed.

    Args:
        model: a transformers causal LM or PeftModel in `eval()` mode, on the CPU. For ``inductor`` and ``aoti`` it may
            be on one GPU, and the file then runs on a GPU.
        recipe: as in :func:`effpass.prepare`.
        out: path of the file to write.
        target: ``"inductor"`` (.safetensors), ``"aoti"`` (.pt2), ``"onnx"`` (.onnx) or ``"tensorrt"`` (.engine).
        max_batch: largest batch size that the file must support. None: any; 1 for a TensorRT engine.
        max_length: largest number of positions, past and new together. None: as many as the model supports; at most
            2048 for a TensorRT engine; any for ONNX.
        overwrite: replace an existing file.
        progress: called with one line per step.

    Returns:
        The file and its validation: export error and method loss of each case.

    Raises:
        EffpassError: a pass can't act, the export fails, or the file is out of tolerance.
    """
    from effpass.lowering.targets.export import export_decoder
    from effpass.lowering.targets.target import find_target

    parsed = read_recipe(recipe)
    return export_decoder(
        model,
        parsed,
        plan(parsed),
        Path(out),
        target=find_target(target),
        max_batch=max_batch,
        max_length=max_length,
        overwrite=overwrite,
        progress=progress,
    )


def check_export(
    model: str,
    out: str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    target: str = "onnx",
    overwrite: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Check that :func:`export` can write `out`, as far as that is known before the model is loaded.

    Args:
        model: source of the model, as in :func:`effpass.load_model`. Its config determines how much memory the export
            needs.
        out: as in :func:`export`.
        recipe: as in :func:`export`.
        target: as in :func:`export`.
        overwrite: as in :func:`export`.
        device: device that the model would be loaded to.
        dtype: as in :func:`effpass.load_model`.
        trust_remote_code: as in :func:`effpass.load_model`.

    Raises:
        EffpassError: the export would fail.
    """
    from effpass.core.model import weights_size
    from effpass.lowering.targets.export import check_passes
    from effpass.lowering.targets.gpu import require_current
    from effpass.lowering.targets.host_memory import check_memory
    from effpass.lowering.targets.publish import check_output, check_room
    from effpass.lowering.targets.target import find_target

    found, kind = find_target(target), device.partition(":")[0]
    found.require(kind)
    check_output(Path(out), found, overwrite=overwrite)
    if recipe is not None:
        check_passes(plan(recipe))
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        return  # loading the model reports what is wrong with the device
    require_current(place)
    on_device = None if kind == "cpu" else {"": device}
    weights = weights_size(model, dtype=dtype, device_map=on_device, trust_remote_code=trust_remote_code)
    if weights is not None:
        check_room(Path(out), weights[0])
        check_memory(found, *weights, place, loaded=False)


def load_exported(path: str | Path, *, allow_native: bool = False) -> Step:
    """Load an exported file as a function ``(input_ids, attention_mask, position_ids, *past) -> outputs``.

    The names and shapes of the tensors are those of :mod:`effpass.lowering.targets.decode_graph`. The tensors must be
    on the CPU, or on PyTorch's current GPU for a file that was exported on a GPU. Calls with sizes outside the range of
    the file, or with tensors on another device, are refused. The function of a GPU file may be used by one thread at a
    time; its calls can be captured in a CUDA graph.

    Args:
        path: file written by :func:`export`. An ``inductor`` file is compiled now, which takes seconds to minutes.
        allow_native: allow machine code from the file to run, which ``aoti`` needs. Only for files that you trust.

    Raises:
        ExportError: the file is not an exported file, was altered, was made for another machine or an absent GPU, or
            contains machine code and `allow_native` is False.
    """
    from effpass.lowering.targets.validate import open_exported

    return open_exported(Path(path), allow_native=allow_native)[0]


def validate(
    path: str | Path, *, allow_native: bool = False, progress: Callable[[str], None] | None = None
) -> Validation:
    """Check an exported file without its model: that it is unaltered, and that its outputs are right on this machine.

    Args:
        path: file written by :func:`export`.
        allow_native: as in :func:`load_exported`.
        progress: called with one line per step.

    Returns:
        The differences of each case. Its `ok` is True when all are within the tolerance of the file.

    Raises:
        ExportError: the file is not an exported file, is truncated or was altered, or contains machine code and
            `allow_native` is False.
    """
    from effpass.lowering.targets.validate import validate_file

    return validate_file(Path(path), allow_native=allow_native, progress=progress)
