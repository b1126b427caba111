"""Choice of the kernel of a mixture-of-experts layer from its number of tokens, by a cost model fitted to the device.

The choice is made inside the operator, on the host and from sizes alone, so that it neither breaks a graph nor waits
for the device. Constants fitted by `effpass calibrate moe` are kept on disk per device and dtype. Other devices use
constants fitted to an H100 and log a warning once.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.core.gguf import cache_dir
from effpass.core.roofline import device_name
from effpass.core.whole import write_text
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.moe_ffn_cost import KERNELS, Constants, Fit, Shape, best

__all__ = ["DEFAULT", "available", "fitted", "keep", "run", "run_kernel", "serving"]

log = logging.getLogger("effpass")

_MODEL = "4"  # version of the cost model: constants fitted to another one are not read

#: Fitted to an H100 with layers of Qwen3-30B-A3B and DeepSeek-V2-Lite, 1 to 8192 tokens and equally likely experts.
#: Kernels that have not been timed there are not chosen.
DEFAULT = Fit(
    device="NVIDIA H100 80GB HBM3",
    dtype="bfloat16",
    torch="2.11.0+cu130",
    multiprocessors=132,
    kernels={
        "rows": Constants(start=6.3e-6, call=1e-8, bandwidth=3.23e12, rate=2e13),
        "grouped16": Constants(start=18.9e-6, call=1e-8, bandwidth=3.17e12, rate=1.45e14),
        "grouped32": Constants(start=18.5e-6, call=1e-8, bandwidth=3.09e12, rate=1.89e14),
        "grouped64": Constants(start=30.6e-6, call=1e-8, bandwidth=3.01e12, rate=3.39e14),
        "grouped128": Constants(start=42.3e-6, call=1e-8, bandwidth=2.92e12, rate=5.49e14),
        # The rate is carried over from an earlier cost model: both predict the same times for these layers.
        "library": Constants(start=27e-6, call=1e-7, bandwidth=2.9e12, rate=6.5e14),
        # Bound by the host: 53 us per expert.
        "by_expert": Constants(start=60e-6, call=53e-6, bandwidth=2.4e12, rate=6.8e14),
    },
)


def run(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *gate: Any,
) -> Tensor | None:
    """Run `effpass::moe_ffn` with the kernel predicted to be fastest; None if no kernel supports these tensors."""
    names = available(x, gate_up, down)
    if not names or x.shape[0] == 0 or experts.shape[1] == 0:
        return None
    shape = Shape(experts.shape[1], down.shape[0], down.shape[1], down.shape[2], x.element_size())
    name = _chosen(x.shape[0], shape, x.device, x.dtype, names)
    return run_kernel(name, x, experts, weights, gate_up, gate_up_bias, down, down_bias, *gate)


def available(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[str, ...]:
    """Return the kernels that support these tensors; during graph capture without those that wait for the device."""
    kernels = triton_kernels("moe_grouped")
    plain = (torch.bfloat16, torch.float16, torch.float32)
    if kernels is None or x.dtype not in plain or not all(1 in t.stride()[1:] for t in (gate_up, down)):
        return ()
    names = [
        name
        for name in KERNELS
        if name == "rows" or (name in kernels.TILES and kernels.fits(kernels.TILES[name], x.device))
    ]
    library = triton_kernels("moe_library")
    if library is not None and library.supported(x, gate_up, down):
        names.append("library")
    if not torch.cuda.is_current_stream_capturing():
        names.append("by_expert")
    return tuple(names)


def run_kernel(
    name: str,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *gate: Any,
) -> Tensor:
    """Run `effpass::moe_ffn`, without returning the projection, with the kernel `name`.

    `name` is a key of :data:`~effpass.lowering.ops.moe_ffn_cost.KERNELS`.
    """
    biases = [None if b is None else b.contiguous() for b in (gate_up_bias, down_bias)]
    arguments = (x.contiguous(), experts.contiguous(), weights.contiguous(), gate_up, biases[0], down, biases[1], *gate)
    if name == "rows":
        return triton_kernels("moe_rows").moe_ffn(*arguments)  # type: ignore[union-attr]
    if name in ("library", "by_expert"):
        return triton_kernels("moe_library").moe_ffn(*arguments, by_expert=name == "by_expert")  # type: ignore[union-attr]
    kernels = triton_kernels("moe_grouped")
    return kernels.moe_ffn(*arguments, kernels.TILES[name])  # type: ignore[union-attr]


@functools.lru_cache(maxsize=4096)
def _chosen(tokens: int, shape: Shape, device: torch.device, dtype: torch.dtype, names: tuple[str, ...]) -> str:
    return best(tokens, shape, fitted(device, dtype), names)


# -- fitted constants -------------------------------------------------------------------------------------------------


@functools.cache
def fitted(device: torch.device, dtype: torch.dtype) -> Fit:
    """Return the constants fitted to `device`, from the cache on disk, or :data:`DEFAULT` if there are none."""
    name, kind = _named(device, dtype)
    found = _found(name, kind)
    if found is not None:
        return found
    if (name, kind) != (DEFAULT.device, DEFAULT.dtype):
        log.warning(
            "effpass: kernels of experts on %s in %s are chosen by what was fitted to %s in %s;"
            " `effpass calibrate moe` fits this device",
            name, kind, DEFAULT.device, DEFAULT.dtype,
        )  # fmt: skip
    return DEFAULT


def serving(device: torch.device, dtype: torch.dtype) -> str:
    """Say which constants choose the kernels on `device`: those fitted to it, with their file, or the shipped ones."""
    name, kind = _named(device, dtype)
    if _found(name, kind) is not None:
        return f"kernels are chosen by constants fitted to {name} in {kind} ({_file(name, kind)})"
    shipped = f"kernels are chosen by the shipped constants of {DEFAULT.device} in {DEFAULT.dtype}"
    return f"{shipped}; `effpass calibrate moe` fits {name} in {kind}"


def keep(fit: Fit) -> Path | None:
    """Store `fit` atomically for later processes; returns the file, or None if the cache directory is not writable."""
    file = _file(fit.device, fit.dtype)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(fit), indent=2))
    except OSError as error:
        log.warning("what was fitted can't be kept in %s: %s", file.parent, error.strerror)
        return None
    fitted.cache_clear()
    _chosen.cache_clear()
    return file


def _named(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    return device_name(device), str(dtype).removeprefix("torch.")


def _found(device: str, dtype: str) -> Fit | None:
    """Read the constants that were fitted to a device and dtype; None if there are none."""
    found = _read(_file(device, dtype))
    return found if found is not None and (found.device, found.dtype) == (device, dtype) else None


def _file(device: str, dtype: str) -> Path:
    key = sha256("\n".join((_MODEL, device, dtype)).encode()).hexdigest()[:16]
    return cache_dir() / "experts" / f"{key}.json"


def _read(file: Path) -> Fit | None:
    """Read a fit; None if the file is missing or was written by an incompatible version of effpass."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found.pop("timings", None)
        kernels = {name: Constants(**constants) for name, constants in found.pop("kernels").items()}
        fit = Fit(**found, kernels=kernels)
        numbers = [fit.multiprocessors, *(value for c in kernels.values() for value in asdict(c).values())]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if set(kernels) != set(KERNELS) or not all(isinstance(n, (int, float)) and n > 0 for n in numbers):
        return None
    return fit
