"""`effpass calibrate moe`: fit the choice between kernels of experts to this machine's GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from effpass.cli.console import stderr, stdout

__all__ = ["moe"]

# k, E, D and F of layers that people run; thresholds are printed for them.
_LAYERS = {
    "Mixtral 8x7B": (2, 8, 4096, 14336),
    "Qwen3-30B-A3B": (8, 128, 2048, 768),
    "DeepSeek-V2-Lite": (6, 64, 2048, 1408),
    "DeepSeek-V2": (6, 160, 5120, 1536),
}


def moe(
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Time the kernels of experts on this machine's GPU, about a minute, and keep what was fitted for `moe_gemm`."""
    import torch

    from effpass.core.errors import EffpassError, did_you_mean
    from effpass.lowering.ops.moe_ffn_choice import keep
    from effpass.lowering.ops.moe_ffn_cost import KERNELS, Shape, thresholds
    from effpass.lowering.ops.moe_ffn_fit import measure

    known = ("bfloat16", "float16", "float32")
    if dtype not in known:
        raise EffpassError(f"--dtype {dtype!r}{did_you_mean(dtype, known)}")
    if not torch.cuda.is_available():
        raise EffpassError(
            "this machine has no CUDA device, and kernels of experts run on one",
            hint="run it on the machine that will run the model; elsewhere constants estimated for an H100 are used",
        )
    progress, console = stderr(), stdout()
    device = torch.device("cuda", torch.cuda.current_device())
    fit, _ = measure(device, getattr(torch, dtype), lambda line: progress.print(line, markup=False, soft_wrap=True))
    file = keep(fit)
    console.print(f"{fit.device}, {fit.dtype}: kept in {file}" if file else f"{fit.device}: not kept", markup=False)
    for name, (each, experts, width, inner) in _LAYERS.items():
        shape = Shape(each, experts, width, inner, torch.empty(0, dtype=getattr(torch, dtype)).element_size())
        steps = ", ".join(f"from {tokens} tokens {kernel}" for tokens, kernel in thresholds(shape, fit, list(KERNELS)))
        console.print(f"{name}: {steps}", markup=False, soft_wrap=True)
