"""Choice of the number of stages of an expert-parallel layer, from its load and measurements of device and link.

All ranks must choose the same number. They therefore use the constants of rank 0's device and link, which rank 0
broadcasts at the first call, and the largest load of any rank, which is known to all from the exchange of counts. The
link is measured at first use unless `effpass calibrate moe` or an earlier process has done so; measurements are kept on
disk per device and number of ranks. On a CPU there is a single stage, because the same cores would compute and
communicate.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from dataclasses import asdict, astuple, dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist

from effpass.core.gguf import cache_dir
from effpass.core.roofline import device_name
from effpass.core.whole import write_text
from effpass.lowering.ops.expert_parallel_cost import STAGE_KERNELS, Link, best_kernel, best_stages
from effpass.lowering.ops.expert_parallel_exchange import Ranks
from effpass.lowering.ops.moe_ffn_choice import fitted
from effpass.lowering.ops.moe_ffn_cost import Constants, Fit, Shape

__all__ = ["Agreed", "agreed", "keep_link", "kernel_of", "stages_of"]

log = logging.getLogger("effpass")


@dataclass(frozen=True)
class Agreed:
    """Constants that all ranks of a group use for their predictions.

    Attributes:
        link: measurements of the link between the ranks.
        kernels: fitted constants by kernel, of rank 0's device.
        multiprocessors: number of multiprocessors of that device.
    """

    link: Link
    kernels: tuple[tuple[str, Constants], ...]
    multiprocessors: int

    @property
    def fit(self) -> Fit:
        return Fit("", "", "", self.multiprocessors, dict(self.kernels))


def stages_of(
    tokens: float, shape: Shape, ranks: Ranks, replicated: bool, device: torch.device, dtype: torch.dtype
) -> int:
    """Choose the number of stages. Collective at a group's first call with a device and dtype.

    Args:
        tokens: load of the most loaded rank in tokens (pairs / k); if `replicated`, the number of tokens.
        shape: the layer, with all E experts.
        ranks: ranks that share the experts.
        replicated: whether all ranks have the same tokens.
        device: device of this rank.
        dtype: dtype of x.

    Returns:
        The number of stages; 0 if replicated tokens are best computed without an exchange.
    """
    if device.type != "cuda":
        return 1
    return _stages(_rounded(tokens), shape, ranks.size, replicated, agreed(ranks, device, dtype))


@functools.lru_cache(maxsize=4096)
def _stages(tokens: float, shape: Shape, ranks: int, replicated: bool, known: Agreed) -> int:
    return best_stages(tokens, shape, ranks, known.link, known.fit, replicated=replicated)


def kernel_of(
    pairs: int, met: int, shape: Shape, device: torch.device, dtype: torch.dtype, among: tuple[str, ...]
) -> str:
    """Choose the kernel among `among` for one stage's load, by the constants of this rank's own device."""
    return _kernel(_rounded(pairs), met, shape, device, dtype, among)


@functools.lru_cache(maxsize=4096)
def _kernel(
    pairs: float, met: int, shape: Shape, device: torch.device, dtype: torch.dtype, among: tuple[str, ...]
) -> str:
    return best_kernel(pairs, met, shape, fitted(device, dtype), among)[0]


def _rounded(load: float) -> float:
    """Round to a sixteenth of an octave, so that similar loads share one cached choice."""
    return 2 ** (round(16 * math.log2(max(load, 1))) / 16)


# -- agreement between ranks ------------------------------------------------------------------------------------------

_known: dict[tuple[str, torch.device, torch.dtype], Agreed] = {}


def agreed(ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Agreed:
    """Return the constants of rank 0. If it has none for the link, all ranks measure it and rank 0 stores it."""
    key = (ranks.name, device, dtype)
    if key not in _known:
        link = _read(_file(device, ranks.size)) if ranks.me == 0 else None
        found = _from_first(link, ranks, device, dtype)
        if found is None:
            from effpass.lowering.ops.expert_parallel_fit import measure_link

            link = measure_link(ranks, device, dtype)
            if ranks.me == 0:
                keep_link(link, device, ranks.size)
                log.info("effpass: the link between %d x %s: %s", ranks.size, device_name(device), link)
            found = _from_first(link, ranks, device, dtype)
            assert found is not None
        _known[key] = found
    return _known[key]


def _from_first(link: Link | None, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Agreed | None:
    fit = fitted(device, dtype)
    flat = [0.0] * 5 if link is None else list(astuple(link))
    flat += [float(fit.multiprocessors), *(v for name in STAGE_KERNELS for v in astuple(fit.kernels[name]))]
    numbers = torch.tensor(flat, dtype=torch.float64, device=device)
    dist.broadcast(numbers, group=ranks.group, group_src=0)
    values = numbers.tolist()
    if not values[0]:
        return None
    constants = [Constants(*values[at : at + 4]) for at in range(6, len(values), 4)]
    return Agreed(Link(*values[:5]), tuple(zip(STAGE_KERNELS, constants, strict=True)), int(values[5]))


def keep_link(link: Link, device: torch.device, ranks: int) -> Path | None:
    """Store `link` atomically for later processes; returns the file, or None if the cache directory is not writable."""
    file = _file(device, ranks)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(link), indent=2))
    except OSError as error:
        log.warning("what was measured between ranks can't be kept in %s: %s", file.parent, error.strerror)
        return None
    return file


def _file(device: torch.device, ranks: int) -> Path:
    key = sha256("\n".join((device_name(device), str(ranks), torch.__version__)).encode()).hexdigest()[:16]
    return cache_dir() / "experts" / f"link-{key}.json"


def _read(file: Path) -> Link | None:
    """Read a link; None if the file is missing or was written by an incompatible version of effpass."""
    try:
        link = Link(**json.loads(file.read_text(encoding="utf-8")))
        numbers = astuple(link)
    except (OSError, ValueError, TypeError):
        return None
    return link if all(isinstance(n, (int, float)) and n > 0 for n in numbers) else None
