"""What area `linear_attention` times: one set of raw inputs, our operator in its modes, and the peers.

What a peer's kernel does not take in, PyTorch computes for it, compiled.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effpass.lowering.ops.gated_delta_rule import gated_delta_rule

__all__ = ["LOWER_BOUND", "MODES", "Call", "Gates", "Raw", "ours", "peers"]

LOWER_BOUND = -5.0
_FAST = -1.8  # bias of fast gates
MODES = ("kda", "fg2", "fg2+")

Shape = tuple[int, int, int, int]
Gates = Literal["usual", "fast", "weak"]


class Raw(NamedTuple):
    """What a layer projects: q and k not normalized, raw gates, logits of β; B, T, H, D.

    `beta` [B, T, H] is KDA's, `erase` and `write` [B, T, H, D] are those of FG²-GDN.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    erase: Tensor
    write: Tensor
    A_log: Tensor
    dt_bias: Tensor

    @classmethod
    def random(cls, shape: Shape, device: str, gates: Gates = "usual") -> Raw:
        """Normal values, with gates of one of three kinds.

        With the usual ones, most channels decay within some tokens, and the slowest of a head hold for hundreds. Fast:
        logarithms of decays are -0.8 on average, and those of a head's channels alike, as in flash-linear-attention's
        own benchmark, which draws them as logsigmoid of normal values. Weak: as a layer begins, most hold for
        thousands. cuDNN's kernel for Hopper starts each piece of a sequence where the slowest channel has forgotten
        what came before, and is parallel over tokens at fast gates only.
        """
        torch.manual_seed(0)
        batch, tokens, heads, size = shape
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def some(*of: int) -> Tensor:
            return torch.randn(batch, tokens, heads, *of, device=device, dtype=dtype)

        A_log = torch.empty(heads, device=device).uniform_(1, 16).log_()
        dt_bias = torch.randn(heads, size, device=device)
        q, k, v, gate = (some(size) for _ in range(4))
        found = cls(q, k, v, gate, some(), some(size), some(size), A_log, dt_bias)
        if gates == "fast":
            found = found._replace(A_log=torch.zeros_like(A_log), dt_bias=torch.full_like(dt_bias, _FAST))
        if gates == "weak":
            step = torch.empty(heads, size, device=device).uniform_(-6.9, -2.3).exp_()
            found = found._replace(gate=found.gate * 0.1, dt_bias=step + torch.log(-torch.expm1(-step)))
        return found

    def betas(self, mode: str) -> tuple[Tensor, Tensor | None]:
        return {"kda": (self.beta, None), "fg2": (self.erase, None), "fg2+": (self.erase, self.write)}[mode]

    def used(self, mode: str) -> list[Tensor]:
        """The tensors with tokens that a mode reads."""
        return [self.q, self.k, self.v, self.gate, *(x for x in self.betas(mode) if x is not None)]

    def requiring_grad(self) -> Raw:
        return Raw(*(x.clone().requires_grad_() for x in self))


Call = Callable[[Raw], Tensor]


def ours(mode: str) -> Call:
    """Our operator in a mode."""

    def call(raw: Raw) -> Tensor:
        return gated_delta_rule(
            raw.q, raw.k, raw.v, raw.gate, *raw.betas(mode), A_log=raw.A_log, dt_bias=raw.dt_bias,
            lower_bound=LOWER_BOUND,
        )[0]  # fmt: skip

    return call


def _fla_kda(raw: Raw) -> Tensor:
    chunk_kda = importlib.import_module("fla.ops.kda").chunk_kda
    return chunk_kda(
        raw.q, raw.k, raw.v, raw.gate, raw.beta, A_log=raw.A_log, dt_bias=raw.dt_bias.flatten(),
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=True,
        lower_bound=LOWER_BOUND, output_final_state=True,
    )[0]  # fmt: skip


@torch.compile(fullgraph=True)
def _sigmoids(erase: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    return erase.sigmoid(), write.sigmoid()


def _fla_gdn2(raw: Raw) -> Tensor:
    chunk_gdn2 = importlib.import_module("fla.ops.gdn2").chunk_gdn2
    erase, write = _sigmoids(raw.erase, raw.write)
    return chunk_gdn2(
        raw.q, raw.k, raw.v, raw.gate, erase, write, A_log=raw.A_log, dt_bias=raw.dt_bias.flatten(),
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, safe_gate=True, lower_bound=LOWER_BOUND,
        output_final_state=True,
    )[0]  # fmt: skip


def _packed(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


@functools.cache  # a model makes them once for all layers
def _ends(batch: int, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, device=device, dtype=torch.int32) * tokens


def _cudnn(raw: Raw) -> Tensor:
    """The forward kernel takes raw inputs."""
    attention = importlib.import_module("cudnn.linear_attention.ops").kimi_delta_attention
    packed = [_packed(x) for x in (raw.q, raw.k, raw.v, raw.gate, raw.beta)]
    found = attention(
        *packed, _ends(*raw.q.shape[:2], raw.q.device), output_final_state=True, use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, safe_gate=True, gate_lower_bound=LOWER_BOUND, a_log=raw.A_log,
        dt_bias=raw.dt_bias,
    )  # fmt: skip
    return (found[0] if isinstance(found, tuple) else found).view_as(raw.v)


@torch.compile(fullgraph=True)
def _prepared(raw: Raw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype) for x in (raw.q, raw.k))
    g = LOWER_BOUND * torch.sigmoid(raw.A_log.exp()[:, None] * (raw.gate.float() + raw.dt_bias))
    return q, k, g, raw.beta.float().sigmoid()


def _cudnn_prepared(raw: Raw, plan: str | None = None) -> Tensor:
    """The backward kernel and that of `kda_hopper` take unit q and k, the float32 log of the decay and β itself.

    On Hopper the default plan is `kda_hopper_cuda`; `kda_hopper` composes segments, however slow the decay.
    """
    attention = importlib.import_module("cudnn.linear_attention.ops").kimi_delta_attention
    q, k, g, beta = _prepared(raw)
    packed = [_packed(x) for x in (q, k, raw.v, g, beta)]
    found = attention(*packed, _ends(*raw.q.shape[:2], raw.q.device), output_final_state=True, plan_name=plan)
    return (found[0] if isinstance(found, tuple) else found).view_as(raw.v)


# Distribution, module, what it is called, the mode of ours that computes the same where one does, what it serves.
_PEERS: tuple[tuple[str, str, str, Call, str | None, tuple[str, ...]], ...] = (
    ("fla-core", "fla", "chunk_kda", _fla_kda, "kda", ("forward", "training")),
    ("fla-core", "fla", "chunk_gdn2", _fla_gdn2, None, ("forward", "training")),
    ("nvidia-cudnn-frontend", "cudnn", "KDA", _cudnn, "kda", ("forward",)),
    ("nvidia-cudnn-frontend", "cudnn", "KDA, inputs prepared", _cudnn_prepared, "kda", ("forward", "training")),
    ("nvidia-cudnn-frontend", "cudnn", "KDA, inputs prepared, kda_hopper",
     functools.partial(_cudnn_prepared, plan="kda_hopper"), "kda", ("forward",)),
)  # fmt: skip


def peers(what: str) -> Iterator[tuple[str, Call, str | None]]:
    """Name, call and mode of those installed that serve "forward" or "training".

    EFFPASS_PEERS, a comma-separated list of modules (fla) and functions (chunk_kda), chooses among them.
    """
    wanted = os.environ.get("EFFPASS_PEERS", "fla,cudnn").split(",")
    for distribution, module, name, call, mode, serves in _PEERS:
        if what in serves and {module, name} & set(wanted) and importlib.util.find_spec(module) is not None:
            yield f"{distribution} {importlib.metadata.version(distribution)} {name}", call, mode
