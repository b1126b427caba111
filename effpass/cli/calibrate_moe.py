"""`effpass calibrate moe`: fit the choice between kernels of experts to this machine's GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from effpass.cli.console import stderr, stdout

if TYPE_CHECKING:
    import torch

    from effpass.lowering.ops.moe_ffn_cost import Shape

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
    """Time the kernels of experts on this machine's GPU, about a minute, and keep what was fitted for `moe_gemm`.

    Under torchrun it also measures what lies between the GPUs, for experts that are spread over them.
    """
    import torch

    from effpass.cli.ranks import process_group, processes
    from effpass.core.errors import EffpassError, did_you_mean

    known = ("bfloat16", "float16", "float32")
    if dtype not in known:
        raise EffpassError(f"--dtype {dtype!r}{did_you_mean(dtype, known)}")
    if not torch.cuda.is_available():
        raise EffpassError(
            "this machine has no CUDA device, and kernels of experts run on one",
            hint="run it on the machine that will run the model; elsewhere constants estimated for an H100 are used",
        )
    kind = getattr(torch, dtype)
    if processes() == 1:
        _kernels(torch.device("cuda", torch.cuda.current_device()), kind)
        return
    with process_group("cuda") as own:
        if torch.distributed.get_rank() == 0:
            _kernels(torch.device(own), kind)  # the others wait in the first exchange
        _link(torch.device(own), kind)


def _kernels(device: torch.device, dtype: torch.dtype) -> None:
    from effpass.lowering.ops.moe_ffn_choice import keep
    from effpass.lowering.ops.moe_ffn_cost import KERNELS, thresholds
    from effpass.lowering.ops.moe_ffn_fit import measure

    progress, console = stderr(), stdout()
    fit, _ = measure(device, dtype, lambda line: progress.print(line, markup=False, soft_wrap=True))
    file = keep(fit)
    console.print(f"{fit.device}, {fit.dtype}: kept in {file}" if file else f"{fit.device}: not kept", markup=False)
    for name, shape in _shapes(dtype).items():
        steps = ", ".join(f"from {tokens} tokens {kernel}" for tokens, kernel in thresholds(shape, fit, list(KERNELS)))
        console.print(f"{name}: {steps}", markup=False, soft_wrap=True)


def _link(device: torch.device, dtype: torch.dtype) -> None:
    import torch.distributed as dist

    from effpass.lowering.ops.expert_parallel_choice import keep_link
    from effpass.lowering.ops.expert_parallel_cost import best_stages
    from effpass.lowering.ops.expert_parallel_exchange import ranks_of
    from effpass.lowering.ops.expert_parallel_fit import measure_link
    from effpass.lowering.ops.moe_ffn_choice import fitted

    assert dist.group.WORLD is not None
    ranks = ranks_of(dist.group.WORLD.group_name)
    link = measure_link(ranks, device, dtype)
    if ranks.me:
        return
    console, file = stdout(), keep_link(link, device, ranks.size)
    console.print(f"{link}: kept in {file}" if file else f"{link}: not kept", markup=False, soft_wrap=True)
    for name, shape in _shapes(dtype).items():
        if shape.experts % ranks.size:
            continue
        steps, before = [], 0
        for tokens in (2**n for n in range(6, 17)):
            stages = best_stages(tokens, shape, ranks.size, link, fitted(device, dtype))
            if stages != before:
                steps.append(f"from {tokens} tokens a rank {stages}")
            before = stages
        console.print(f"{name}, stages on {ranks.size} ranks: {', '.join(steps)}", markup=False, soft_wrap=True)


def _shapes(dtype: torch.dtype) -> dict[str, Shape]:
    from effpass.lowering.ops.moe_ffn_cost import Shape

    return {name: Shape(*sizes, dtype.itemsize) for name, sizes in _LAYERS.items()}
