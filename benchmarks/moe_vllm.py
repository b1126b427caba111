"""vLLM's Triton kernel of experts as a peer of area `moe`: that of an installed vLLM, or of its unpacked wheel.

The environment variable EFFPASS_VLLM names the folder of an unpacked wheel. vLLM's dependencies are not needed then:
its kernel, its configurations for the device, and its compiled sort by expert and sum over experts are loaded. All else
that these files import is left to placeholders, which experts that are not quantized never use. Where the wheel's
library `_C` is not in the folder, a Triton kernel takes the place of its `silu_and_mul`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["vllm_experts"]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, experts, weights
_EXPERTS = "vllm.model_executor.layers.fused_moe"
_FILES = tuple(f"{_EXPERTS}.{name}" for name in ("activation", "moe_align_block_size", "fused_moe"))


def vllm_experts(gate_up: Tensor, down: Tensor) -> tuple[str, Call] | None:
    """Name with version and call of vLLM's experts on these weights; None where it is not found or does not load."""
    folder = os.environ.get("EFFPASS_VLLM")
    if not folder and importlib.util.find_spec("vllm") is None:
        return None
    try:
        version, run = _load(folder)
    except Exception as error:  # it looks at devices and versions while it is imported
        print(f"vLLM does not load: {type(error).__name__}: {error}")
        return None
    ids: dict[int, tuple[Tensor, Tensor]] = {}  # int32, as of vLLM's own router, and not converted in what is timed

    def call(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        at = experts.data_ptr()
        if at not in ids or ids[at][0].shape != experts.shape:
            ids[at] = experts, experts.int()  # the first keeps the address from being given away
        return run(x, gate_up, down, weights, ids[at][1], False)

    return f"vLLM {version} fused_moe", call


@functools.cache
def _load(folder: str | None) -> tuple[str, Callable[..., Tensor]]:
    """Version and `fused_experts_impl` of the wheel in `folder`, or of the installed vLLM."""
    if not folder:
        return importlib.metadata.version("vllm"), importlib.import_module(_FILES[-1]).fused_experts_impl
    (about,) = Path(folder).glob("vllm-*.dist-info")
    for library in ("_moe_C", "_C"):
        file = Path(folder, "vllm", f"{library}.abi3.so")
        if file.exists():
            torch.ops.load_library(file)
    if not hasattr(torch.ops._C, "silu_and_mul"):
        _LIBRARY.define("silu_and_mul(Tensor! out, Tensor input) -> ()")
        _LIBRARY.impl("silu_and_mul", _silu_and_mul, "CompositeExplicitAutograd")
    sys.meta_path.insert(0, _Wheel(Path(folder)))
    experts = importlib.import_module(_FILES[-1])
    experts._get_config_quant_dtype = lambda **_: None  # type: ignore[attr-defined]  # what it asks is a placeholder
    version = about.stem.removeprefix("vllm-").partition("+")[0]
    return version, experts.fused_experts_impl


class _Wheel(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `_FILES` from the folder of a wheel, and placeholders as every other module of vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in _FILES:
            file = self.folder.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "vllm" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholders(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_GIVEN.get(module.__name__, {}))


class _Placeholders(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        whole = f"{self.__name__}.{name}"
        return importlib.import_module(whole) if whole in _GIVEN else type(name, (), {})


class _Log:
    """Prints warnings: that there is no configuration for the device, for one."""

    def __getattr__(self, name: str) -> Any:
        return lambda text, *values, **_: print("vLLM:", text % values) if "warning" in name else None


#: What the kernel's way through unquantized experts uses of other modules.
_GIVEN: dict[str, dict[str, Any]] = {
    "vllm.envs": {"VLLM_BATCH_INVARIANT": False, "VLLM_TUNED_CONFIG_FOLDER": None},
    "vllm._custom_ops": {
        "moe_sum": lambda *tensors: torch.ops._moe_C.moe_sum(*tensors),
        "moe_align_block_size": lambda *of: torch.ops._moe_C.moe_align_block_size(*of),
    },
    "vllm.logger": {"init_logger": lambda name: _Log()},
    "vllm.platforms": {
        "current_platform": SimpleNamespace(get_device_name=torch.cuda.get_device_name, is_rocm=lambda: False)
    },
    "vllm.triton_utils": {"tl": tl, "triton": triton},
    "vllm.utils.math_utils": {"round_up": lambda x, y: (x + y - 1) // y * y},
    "vllm.utils.torch_utils": {"direct_register_custom_op": lambda **_: None},
    _EXPERTS: {"get_config": lambda: None},
    f"{_EXPERTS}.modular_kernel": {
        "FusedMoEExpertsModular": type("Modular", (), {"adjust_N_for_activation": staticmethod(lambda n, _: n // 2)})
    },
    f"{_EXPERTS}.config": {"_get_config_dtype_str": lambda **_: None},
    f"{_EXPERTS}.utils": {
        "disable_inplace": lambda: False,
        "moe_kernel_quantize_input": lambda A, A_scale, **_: (A, A_scale),
    },
}

_LIBRARY = torch.library.Library("_C", "FRAGMENT")


@triton.jit
def _silu_and_mul_kernel(out, x, N, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * N + n, mask=n < N, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + n, mask=n < N, other=0)
    # vLLM too rounds silu to the dtype before the product.
    tl.store(out + row * N + n, (gate / (1 + tl.exp(-gate))).to(up.dtype) * up, mask=n < N)


def _silu_and_mul(out: Tensor, x: Tensor) -> None:
    """out [M, N] = silu(x[:, :N]) · x[:, N:]"""
    rows, columns = out.shape
    block = min(triton.next_power_of_2(columns), 1024)
    _silu_and_mul_kernel[(rows, triton.cdiv(columns, block))](out, x, columns, block, num_warps=max(1, block // 256))
