"""Expert parallelism: `effpass::moe_ffn` with each expert's weights on one rank only.

    out[t] = Σ_r Σ_j weights[t, j] · expert experts[t, j] (x[t])          over the ranks r that hold one of its experts

Each rank computes its experts in N stages (EPS-MoE, https://arxiv.org/abs/2410.12247, section 3.2). While one stage is
computed, tokens travel for the next one, and the partial sum of a token travels back as soon as the last of its experts
on this rank is done:

    link      D₀  D₁      R₀  D₂      R₁  …           D: dispatch of tokens, R: return of sums; issued in this order
    compute           C₀          C₁      C₂  …       C: the experts of a stage

In this order, no dispatch queues behind a return that still waits for experts. Ranks exchange all counts once, which is
the only time the host waits. A token is sent to a rank once and its sum returns once, for any N
(:mod:`effpass.lowering.ops.expert_parallel_routes`).

There are two modes. *DP + EP*: every rank has its own tokens. *TP + EP* (`replicated`): all ranks have the same tokens,
as after tensor-parallel attention. Rank r then owns a slice of the tokens: it routes them and adds up their sums. Their
hidden states are on every rank already and are not sent. At the end the outputs of all slices are gathered.

The sum over the experts of a rank is rounded to x's dtype before it travels; the sum over ranks is computed in float32
in the order of ranks. Results are therefore bitwise reproducible and the same for every N.

Shapes: T tokens of this rank, k experts per token, W ranks, L local experts of E = W·L, D hidden size, F intermediate
size of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops import expert_parallel_routes, expert_parallel_stage
from effpass.lowering.ops.expert_parallel_choice import kernel_of, stages_of
from effpass.lowering.ops.expert_parallel_cost import STAGE_KERNELS
from effpass.lowering.ops.expert_parallel_exchange import Exchange, Ranks, ranks_of
from effpass.lowering.ops.expert_parallel_routes import Departures, Plan, plan
from effpass.lowering.ops.expert_parallel_stage import Experts
from effpass.lowering.ops.kernel_choice import triton_kernels
from effpass.lowering.ops.moe_ffn import TOLERANCE, check
from effpass.lowering.ops.moe_ffn_choice import available
from effpass.lowering.ops.moe_ffn_cost import Shape

__all__ = ["TOLERANCE", "expert_parallel"]

_named = torch._C._profiler._RecordFunctionFast  # negligible cost without a profiler


@torch.library.custom_op(
    "effpass::expert_parallel",
    mutates_args=(),
    schema="(Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor? gate_up_bias, Tensor down, "
    "Tensor? down_bias, str activation, float alpha, float limit, float offset, bool interleaved, bool replicated, "
    "int stages, str group) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def expert_parallel(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
    replicated: bool,
    stages: int,
    group: str,
) -> Tensor:
    """A layer of experts distributed over ranks. All ranks of `group` must call it equally often.

    Args:
        x: [T, D]; T may differ between ranks unless `replicated`, and may be 0.
        experts: int [T, k], ids 0 … E - 1, where rank r holds r·L … r·L + L - 1; an id of E or more adds nothing.
        weights: [T, k], router weights.
        gate_up: [L, 2 F, D], weights of this rank's experts.
        gate_up_bias: [L, 2 F] or None.
        down: [L, D, F].
        down_bias: [L, D] or None.
        activation: as in `effpass::moe_ffn`, as are the arguments up to `interleaved`.
        replicated: whether all ranks have the same tokens. Their ids and weights may differ; the rank that owns a token
            determines its routing.
        stages: number of stages N, a divisor of L; 0 to choose it by
            :mod:`effpass.lowering.ops.expert_parallel_choice`.
        group: name of the process group.

    Returns:
        [T, D], of x's dtype.

    Raises:
        EffpassError: if shapes, dtypes, `stages` or the group don't fit, ranks disagree, or an exchange fails.
    """
    ranks = ranks_of(group)
    check(x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha)
    _check_stages(stages, down.shape[0])
    here = Experts(gate_up, gate_up_bias, down, down_bias, (activation, alpha, limit, offset, interleaved))
    if ranks.size == 1:
        return _local(x, experts, weights, here)
    return _spread(x, experts, weights, here, ranks, replicated, stages)


def _check_stages(stages: int, local: int) -> None:
    if stages < 0 or (stages and local % stages):
        divisors = ", ".join(str(n) for n in range(1, local + 1) if local % n == 0)
        raise EffpassError(
            f"effpass::expert_parallel: {stages} stages of {local} local experts", hint=f"give one of 0, {divisors}"
        )


def _local(x: Tensor, experts: Tensor, weights: Tensor, here: Experts) -> Tensor:
    tensors = (here.gate_up, here.gate_up_bias, here.down, here.down_bias)
    return torch.ops.effpass.moe_ffn(x, experts, weights, *tensors, *here.gate, False)[0]


def _spread(
    x: Tensor, experts: Tensor, weights: Tensor, here: Experts, ranks: Ranks, replicated: bool, stages: int
) -> Tensor:
    tokens, local, share, first = x.shape[0], here.down.shape[0], x.shape[0], 0
    shape = Shape(experts.shape[1], local * ranks.size, x.shape[1], here.down.shape[2], x.element_size())
    recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if replicated and not stages:
        stages = 0 if recorded else stages_of(tokens, shape, ranks, True, x.device, x.dtype)
        if not stages:
            return _everywhere(x, experts, weights, here, ranks)
    if recorded:
        raise EffpassError(
            "effpass::expert_parallel waits for the counts of other ranks, which no CUDA graph can record",
            hint="run the model without CUDA graphs, or give all ranks the same tokens (expert_parallel: tp)",
        )
    if replicated:
        share = -(-tokens // ranks.size)
        first = min(ranks.me * share, tokens)
        experts, weights = experts[first : first + share], weights[first : first + share]
    weights = weights.to(torch.float64 if weights.dtype == torch.float64 else torch.float32)
    how = _how(x, weights, here)
    summary = how.routes.summarize(experts, ranks.size, local)
    counts, headers = ranks.counts(summary.counts, (tokens, shape.each, int(replicated), stages))
    _agree(headers, replicated)
    counts = counts.reshape(ranks.size, 3, ranks.size, local)
    if not stages:
        most = counts[:, 2].sum((0, 2)).max() / max(shape.each, 1)
        stages = stages_of(most, shape, ranks, False, x.device, x.dtype)
    sizes = plan(counts, ranks.me, stages)
    leaving = how.routes.departures(summary, experts, weights, sizes, first)
    regained = _pipeline(how, x, leaving, sizes, here, ranks, replicated, shape)
    out = how.stage.total(regained, summary, leaving.back, local)
    if not replicated:
        return out
    padding = out.new_zeros(share - out.shape[0], out.shape[1])
    return ranks.gather(torch.cat((out, padding)) if padding.shape[0] else out)[:tokens]


@dataclass(frozen=True)
class _How:
    """Implementation of a rank's work: the PyTorch modules, or the kernel modules with the same functions.

    Attributes:
        routes: `expert_parallel_routes`, or the module of kernels that replaces it.
        stage: `expert_parallel_stage`, or the module of kernels that replaces it.
        kernels: names of the kernels that a stage may use; empty for the PyTorch modules.
    """

    routes: Any
    stage: Any
    kernels: tuple[str, ...]

    def kernel(self, sizes: Plan, stage: int, shape: Shape, x: Tensor) -> str:
        """Choose the kernel of a stage by its load."""
        loads = sizes.loads[stage * sizes.size : (stage + 1) * sizes.size]
        if not self.kernels or not any(loads):
            return ""
        return kernel_of(sum(loads), sum(map(bool, loads)), shape, x.device, x.dtype, self.kernels)


def _how(x: Tensor, weights: Tensor, here: Experts) -> _How:
    names = available(x, here.gate_up, here.down) if x.is_cuda and weights.dtype == torch.float32 else ()
    kernels = tuple(name for name in names if name in STAGE_KERNELS)
    if not kernels:
        return _How(expert_parallel_routes, expert_parallel_stage, ())
    return _How(triton_kernels("expert_routes"), triton_kernels("expert_stage"), kernels)


def _everywhere(x: Tensor, experts: Tensor, weights: Tensor, here: Experts, ranks: Ranks) -> Tensor:
    """Compute replicated tokens without an exchange: each rank runs its own experts on all tokens, then all-reduces."""
    local = here.down.shape[0]
    begin = ranks.me * local
    mine = (experts >= begin) & (experts < begin + local)
    return ranks.sum(_local(x, torch.where(mine, experts - begin, local), weights, here))


def _pipeline(
    how: _How,
    x: Tensor,
    leaving: Departures,
    sizes: Plan,
    here: Experts,
    ranks: Ranks,
    replicated: bool,
    shape: Shape,
) -> Tensor:
    """Run all stages; returns the sums that come back, [R, D], in the order of `Plan.regained`."""
    words = leaving.words.new_empty(sum(sizes.pairs_got), leaving.words.shape[1])
    of_pairs = ranks.send(leaving.words, sizes.pairs_sent, words, sizes.pairs_got)
    sent, got, returned, back = map(_spans, (sizes.sent, sizes.got, sizes.returned, sizes.regained))
    rows = x if replicated else x.new_empty(sizes.rows_got, x.shape[1])
    regained = x.new_empty(sizes.rows_sent, x.shape[1])

    def arrive(stage: int) -> Exchange | None:
        if replicated or stage == sizes.stages:
            return None
        with _named(f"effpass::dispatch {stage}"):
            sending = x[leaving.tokens[sent[stage]]]
            return ranks.send(sending, sizes.sent[stage], rows[got[stage]], sizes.got[stage])

    of_rows = arrive(0)
    of_pairs.wait()
    pairs = how.routes.arrivals(words, sizes)
    column = 2 if replicated else 0
    outputs = x.new_empty(words.shape[0], x.shape[1])
    of_sums = []
    for stage in range(sizes.stages):
        following = arrive(stage + 1)
        if of_rows is not None:
            with _named(f"effpass::wait for dispatch {stage}"):
                of_rows.wait()
        of_rows = following
        with _named(f"effpass::experts {stage}"):
            how.stage.compute(rows, column, pairs, sizes, stage, here, outputs, how.kernel(sizes, stage, shape, x))
        with _named(f"effpass::combine {stage}"):
            done = how.stage.sums(outputs, pairs, returned[stage], shape.each)
            of_sums.append(ranks.send(done, sizes.returned[stage], regained[back[stage]], sizes.regained[stage]))
    with _named("effpass::wait for combine"):
        for exchange in of_sums:
            exchange.wait()
    return regained


def _spans(counts: list[list[int]]) -> list[slice]:
    """Slices of the rows of each stage."""
    ends = np.cumsum([0, *map(sum, counts)]).tolist()
    return [slice(*both) for both in pairwise(ends)]


def _agree(headers: np.ndarray, replicated: bool) -> None:
    """Raise an :class:`EffpassError` if the ranks are not in the same call of the same layer."""
    names = ("tokens", "experts a token", "replicated", "stages")
    for name, values in zip(names, headers.T.tolist(), strict=True):
        if len(set(values)) > 1 and (name != "tokens" or replicated):
            raise EffpassError(
                f"effpass::expert_parallel: {name} by rank: {values}",
                hint="all ranks call the same layers in the same order, with replicated tokens on the same tokens",
            )


@expert_parallel.register_fake
def _(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor,
      down_bias: Tensor | None, activation: str, alpha: float, *rest: Any) -> Tensor:  # fmt: skip
    check(x, experts, weights, gate_up, gate_up_bias, down, down_bias, activation, alpha)
    _check_stages(rest[-2], down.shape[0])
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.effpass.expert_parallel)
def _(x: Any, experts: Any, weights: Any, gate_up: Any, gate_up_bias: Any, down: Any, *args: Any,
      out_val: Any = None, **kwargs: Any) -> Any:  # fmt: skip
    """FLOPs of one rank with an equal share of the work."""
    *_, replicated, _, group = args
    ranks = ranks_of(group).size if replicated else 1
    return 2 * experts[0] * experts[1] * down[1] * (gate_up[1] + down[2]) // ranks


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _backward(ctx: Any, gradient: Tensor) -> Any:
    raise EffpassError(
        "effpass::expert_parallel has no backward pass: experts on several ranks are for inference",
        hint="prepare the model without expert_parallel for training, and shard it with FSDP2",
    )


expert_parallel.register_autograd(_backward, setup_context=_save)
