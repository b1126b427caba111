"""The gated delta rule's kernels against the recurrence in float64: on a GPU, or, run as a program, without one.

`python gated_delta_cases.py interpret` computes cases through Triton's interpreter, `outside` two that must fail, `far`
one with large strides; with `compile KIND` it compiles kernels for a GPU that is not there. All print JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.ops.gated_delta_rule import reference
from effpass.lowering.ops.gated_delta_rule_inputs import Inputs, Settings

NAMES = (*Inputs._fields, "initial_state")


@dataclass(frozen=True)
class Case:
    """One call.

    `gate`: softplus, bounded, log for a log decay between 0 and -60 a token, or reset, where a few tokens forget all.
    """

    mode: str  # gdn, kda, fg2 or fg2+
    gate: str = "softplus"
    tokens: int = 70
    batch: int = 1
    heads: int = 1
    value_heads: int = 1
    key_size: int = 16
    value_size: int = 16
    ends: tuple[int, ...] | None = None
    normalize: bool = True
    beta_logits: bool = True
    has_state: bool = True
    has_bias: bool = True

    @property
    def sequences(self) -> int:
        return self.batch if self.ends is None else len(self.ends) - 1

    @property
    def settings(self) -> Settings:
        return Settings(-5.0 if self.gate == "bounded" else None, 0.3, self.normalize, self.beta_logits)

    def tensors(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The inputs and the initial state in float64, representable in `dtype`."""
        torch.manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)

        def some(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape).to(of).double()

        def rounded(x: Tensor) -> Tensor:
            return x.to(dtype).double()

        lead, heads = (self.batch, self.tokens), self.value_heads
        q, k = (some(*lead, self.heads, self.key_size) for _ in range(2))
        if not self.normalize:
            q, k = (rounded(torch.nn.functional.normalize(x, dim=-1)) for x in (q, k))
        gate = some(*lead, heads) if self.mode == "gdn" else some(*lead, heads, self.key_size)
        beta = some(*lead, heads) if self.mode in ("gdn", "kda") else some(*lead, heads, self.key_size)
        write = some(*lead, heads, self.value_size) if self.mode == "fg2+" else None
        if not self.beta_logits:
            beta, write = rounded(beta.sigmoid()), None if write is None else rounded(write.sigmoid())
        A_log, dt_bias = some(heads, of=wide) * 0.5, some(*gate.shape[2:], of=wide)
        if self.gate == "log":  # strong and weak in turn
            strength = torch.tensor([30.0, 0.1]).double()[torch.arange(self.tokens) % 2]
            gate = rounded((-gate.abs() * strength.view(1, -1, *[1] * (gate.dim() - 2))).clamp(min=-60))
        if self.gate == "reset":
            gate = rounded(-gate.abs() * 0.05)
            gate[:, 5::31] = rounded(torch.tensor(-3e4).double())
        is_raw = self.gate in ("softplus", "bounded")
        state = some(self.sequences, heads, self.key_size, self.value_size, of=wide) if self.has_state else None
        v = some(*lead, heads, self.value_size)
        return [
            q,
            k,
            v,
            gate,
            beta,
            write,
            A_log if is_raw else None,
            dt_bias if is_raw and self.has_bias else None,
            state,
        ]

    def starts(self) -> list[int]:
        """Where sequences begin among all tokens, and their number."""
        return list(self.ends) if self.ends else [n * self.tokens for n in range(self.batch + 1)]


SMALL = {
    "fg2+, bounded, K < V": Case("fg2+", "bounded", value_size=32),
    "kda, two rows, two value heads": Case("kda", tokens=64, batch=2, value_heads=2),
    "fg2, decay to -60, three chunks, two blocks of channels": Case("fg2", "log", 130, key_size=64, value_size=64),
    "gdn, packed, an empty sequence, K < V": Case(
        "gdn", tokens=144, value_heads=2, value_size=24, ends=(0, 15, 80, 80, 144)
    ),
    "fg2+, packed, decay to -60, K is no power of two, as given": Case(
        "fg2+", "log", 70, key_size=20, value_size=32, ends=(0, 3, 70), normalize=False, has_state=False
    ),
    "gdn, log decay, probabilities": Case("gdn", "log", 65, beta_logits=False),
    "kda, bounded, probabilities, K > V, no bias": Case(
        "kda", "bounded", 40, key_size=64, beta_logits=False, has_bias=False
    ),
    "gdn, weak decay between -60 and -60": Case("gdn", "log", 100, 1, 1, 2, 5, 7, has_bias=False),
    "fg2, one token": Case("fg2", tokens=1),
    "fg2, packed, an empty sequence, padded": Case(
        "fg2", "bounded", 70, key_size=20, value_size=20, ends=(0, 3, 3, 70)
    ),
    "fg2+, bounded, states that fill the registers": Case("fg2+", "bounded", 70, key_size=130, value_size=20),
    "gdn, resets": Case("gdn", "reset"),
    "kda, resets": Case("kda", "reset"),
}

#: Sequences of four chunks, or seven, which are interpreted in four segments.
SEGMENTED = {
    "fg2+, in segments, K < V": Case("fg2+", "bounded", 200, value_size=32),
    "kda, packed, in segments, K > V": Case("kda", tokens=220, key_size=20, ends=(0, 15, 15, 220)),
    "kda, resets, in segments": Case("kda", "reset", tokens=400, key_size=20),
    "gdn, in segments from a state of zeros": Case("gdn", tokens=200, batch=2, has_state=False),
}

#: Of these, interpreted in bfloat16 too.
IN_BFLOAT16 = (
    "fg2+, bounded, K < V",
    "kda, two rows, two value heads",
    "fg2, decay to -60, three chunks, two blocks of channels",
    "gdn, packed, an empty sequence, K < V",
    "fg2+, in segments, K < V",
)


def expected(case: Case, dtype: torch.dtype) -> tuple[list[Tensor | None], list[Tensor], dict[str, Tensor]]:
    """The tensors in float64, gradients of both outputs, and by name the outputs and the gradients of the tensors."""
    tensors = [None if x is None else x.requires_grad_() for x in case.tensors(dtype)]
    output, state = reference(Inputs(*tensors[:8]), case.settings, tensors[8], case.starts())
    gradients = [torch.randn(output.shape).to(dtype).double(), torch.randn(state.shape).double()]
    given = [x for x in tensors if x is not None]
    found = torch.autograd.grad([output, state], given, gradients)
    names = [name for name, x in zip(NAMES, tensors, strict=True) if x is not None]
    return tensors, gradients, {
        "output": output.detach(), "state": state.detach(), **{f"d {n}": g for n, g in zip(names, found, strict=True)}
    }  # fmt: skip


def ratio(found: Tensor, wanted: Tensor, least: float = 0) -> float:
    """Root mean square of the difference, as far as it exceeds `least`, relative to that of `wanted`."""
    difference = (found.detach().double().cpu() - wanted.cpu()).abs()
    if least:
        difference = (difference - least).clamp(min=0)
    return float(difference.norm() / wanted.norm().clamp(min=1e-30).cpu())


def placed(tensors: list[Tensor | None], dtype: torch.dtype, device: str) -> list[Tensor | None]:
    """Inputs of `dtype`; A_log, dt_bias and the state of float32 at the least."""
    wide = torch.promote_types(dtype, torch.float32)
    types = [dtype] * 6 + [wide] * 3
    return [None if x is None else x.detach().to(device, t) for x, t in zip(tensors, types, strict=True)]


def spread(x: Tensor | None) -> Tensor | None:
    """The same values, each head (of A_log and dt_bias too) beside one of NaN."""
    if x is None:
        return None
    heads = 2 if x.dim() > 2 else 0
    return torch.stack((x, torch.full_like(x, torch.nan)), heads + 1).select(heads + 1, 0)


def interpret() -> dict[str, dict[str, float]]:
    from effpass.lowering.kernels import gated_delta_rule, gated_delta_rule_step

    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialized memory holds NaN
    _both_ways_in_float32(gated_delta_rule._Call)
    found: dict[str, dict[str, float]] = {}
    faded, shares = _faded(gated_delta_rule), {}
    for name, case in (SMALL | SEGMENTED).items():
        for dtype in (torch.float32, torch.bfloat16) if name in IN_BFLOAT16 else (torch.float32,):
            tensors, gradients, wanted = expected(case, dtype)
            *given, state = placed(tensors, dtype, "cpu")
            inputs = Inputs(*map(spread, given))
            ends = None if case.ends is None else torch.tensor(case.ends, dtype=torch.int32)
            call = (inputs, case.settings, state, ends, case.sequences)
            gated_delta_rule._Call.segments = property(lambda self, name=name: 4 if name in SEGMENTED else 1)
            gated_delta_rule._PROBED, gated_delta_rule._PROBE_FROM = 1, 1
            faded.clear()
            output, final, pairs = forward(*call)
            made = (output, pairs, gradients[0].to(dtype), gradients[1].float())
            of_inputs, initial = gated_delta_rule.backward(*call, *made)
            results = {"output": output, "state": final, "d initial_state": initial}
            results |= {f"d {n}": g for n, g in zip(Inputs._fields, of_inputs, strict=True) if g is not None}
            ratios = {n: ratio(results[n], x) for n, x in wanted.items()}
            if not found:  # a graph that is retained is run backward again
                ratios["d q, again"] = ratio(gated_delta_rule.backward(*call, *made)[0][0], wanted["d q"])
            if case.ends is None and state is not None:
                of_step = gated_delta_rule_step.step(inputs, case.settings, state)
                ratios |= {"step": ratio(of_step, wanted["output"]), "step's state": ratio(state, wanted["state"])}
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = ratios
            if name in SEGMENTED:
                shares[f"{name}, {str(dtype).removeprefix('torch.')}"] = sum(faded) / len(faded)
    return found | {"faded": shares}


def forward(inputs: Inputs, *call: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Output, final state, and what the backward pass is given besides the output; arguments of the kernels."""
    from effpass.lowering.kernels import gated_delta_rule

    shape = gated_delta_rule.shape_of_pairs(inputs, call[2])
    pairs = inputs.q.new_empty(shape), inputs.q.new_empty(shape)
    return *gated_delta_rule.forward(inputs, *call, pairs), pairs


def _faded(kernels: Any) -> list[float]:
    """A list that grows: the share of segments whose state had faded when states were joined."""
    shares, join = [], kernels._join

    def joined(call: Any, maps: Any, given: Any, backward: bool) -> Tensor:
        shares.append(float(maps.at_end.float().mean()) if call.probed else 0)
        return join(call, maps, given, backward)

    kernels._join = joined
    return shares


def _both_ways_in_float32(call: Any) -> None:
    """Let mild and steep chunks go their own ways in float32 too, whose tolerance says more than bfloat16's."""
    usual = call.ranges.fget

    def ranges(self: Any) -> tuple[str, ...]:
        is_vector = self.inputs.gate.dim() == 4
        return ("mild only", "steep only") if is_vector and self.inputs.q.dtype == torch.float32 else usual(self)

    call.ranges = property(ranges)


def outside() -> dict[str, str]:
    """What is said of a state with too few rows, which nothing checks, and of sequences beyond the tokens."""
    from effpass.lowering.kernels import gated_delta_rule_step

    case = Case("kda", tokens=20)
    *given, state = placed(case.tensors(torch.float32), torch.float32, "cpu")
    calls = {
        "short state": lambda: gated_delta_rule_step.step(Inputs(*given), case.settings, state[:, :, :-1].clone()),
        "long sequence": lambda: forward(Inputs(*given), case.settings, None, torch.tensor((0, 30, 20)), 2),
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = str(call())
        except Exception as error:
            found[name] = str(error)
    return found


def far_apart(x: Tensor) -> Tensor:
    """[1, T, H, K] of 16 bits whose heads lie 2^30 elements apart: the third begins where int32 ends."""
    _, tokens, heads, size = x.shape
    room = torch.empty((heads - 1 << 30) + tokens * size, dtype=x.dtype, device=x.device)
    return room.as_strided(x.shape, (tokens * size, size, 1 << 30, 1)).copy_(x)


def far() -> dict[str, bool]:
    """Whether heads far apart give what heads side by side do."""
    from effpass.lowering.kernels import gated_delta_rule, gated_delta_rule_step

    case = Case("kda", tokens=5, heads=3, value_heads=3)
    *given, state = placed(case.tensors(torch.bfloat16), torch.bfloat16, "cpu")
    near = Inputs(*given)
    both, gradient = (near, near._replace(q=far_apart(near.q), v=far_apart(near.v))), torch.ones_like(near.v)
    calls = [(x, case.settings, state, None, 1) for x in both]
    outputs, _, pairs = zip(*(forward(*call) for call in calls), strict=True)
    gradients = [
        gated_delta_rule.backward(*call, *found, gradient, None)[0]
        for call, *found in zip(calls, outputs, pairs, strict=True)
    ]
    steps = [gated_delta_rule_step.step(x, case.settings, state.clone()) for x in both]
    return {
        "forward": torch.equal(*outputs),
        "backward": all(torch.equal(*x) for x in zip(*gradients, strict=True) if x[0] is not None),
        "step": torch.equal(*steps),
    }


COMPILED = {
    "bfloat16": (Case("fg2+", "bounded", 16384, 1, 16, 16, 128, 128), torch.bfloat16),
    "many heads": (Case("fg2+", "bounded", 4096, 8, 16, 16, 128, 128), torch.bfloat16),
    "wide": (Case("kda", "softplus", 2048, 1, 4, 8, 256, 256), torch.bfloat16),
    "scalar": (Case("gdn", "softplus", 2048, 1, 4, 8, 64, 64), torch.float16),
    "float32": (Case("kda", "softplus", 2048, 1, 4, 4, 256, 256), torch.float32),
    "one token": (Case("fg2", "softplus", 1, 4, 1, 1, 128, 128), torch.bfloat16),
    "packed": (Case("fg2+", "bounded", 2048, 1, 4, 4, 128, 128, ends=(0, 15, 2048)), torch.bfloat16),
}


def compile_one(kind: str) -> dict[str, int]:
    """Bytes of shared memory of each kernel of one kind of call."""
    from offline_kernels import compile_instead

    from effpass.lowering.kernels import gated_delta_rule, gated_delta_rule_step

    kernels = ("inside", "state_forward", "join", "state_backward", "value_gradient", "key_gradient", "_step")
    launches = compile_instead((gated_delta_rule, gated_delta_rule_step), kernels)
    case, dtype = COMPILED[kind]
    given = _shapes(case, dtype)
    inputs, state = Inputs(*given[:8]), given[8]
    ends = None if case.ends is None else torch.empty(len(case.ends), dtype=torch.int32, device="meta")
    call = (inputs, case.settings, state, ends, case.sequences)
    output, _, pairs = forward(*call)
    gated_delta_rule.backward(*call, output, pairs, inputs.v, state)
    gated_delta_rule_step.step(inputs, case.settings, state)
    return dict(launches)


def _shapes(case: Case, dtype: torch.dtype) -> list[Any]:
    lead, heads = (case.batch, case.tokens), case.value_heads
    with torch.device("meta"):
        q, v = (
            torch.empty(*lead, h, n, dtype=dtype) for h, n in ((case.heads, case.key_size), (heads, case.value_size))
        )
        gate = torch.empty(*lead, heads, *[case.key_size] * (case.mode != "gdn"), dtype=dtype)
        beta = torch.empty(*lead, heads, *[case.key_size] * case.mode.startswith("fg2"), dtype=dtype)
        write = torch.empty_like(v) if case.mode == "fg2+" else None
        state = torch.empty(case.sequences, heads, case.key_size, case.value_size)
        return [q, q, v, gate, beta, write, torch.empty(heads), torch.empty(gate.shape[2:]), state]


if __name__ == "__main__":
    if sys.argv[1] != "compile":
        from triton_interpreter import check_accesses, correct_bfloat16, set_up

        set_up()
        correct_bfloat16()
        check_accesses()
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps({"interpret": interpret, "outside": outside, "far": far}[sys.argv[1]]()))
    else:
        print(json.dumps(compile_one(sys.argv[2])))
