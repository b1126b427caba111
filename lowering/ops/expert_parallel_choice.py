"""How many stages a layer of experts on several ranks has: by its load, from what was measured of device and link.

The ranks have to come to the same number. All of them use what rank 0 knows of its device and of the link, agreed on at
the first call, and the load of the rank that has most to compute, which the exchange of counts told everybody. The link
is measured at the first use, unless `effpass calibrate moe` or an earlier process did so; what was measured is kept on
disk for each device and number of ranks. On a CPU there is one stage: its cores would compute and carry rows in turn.
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
    """What all ranks of a group reckon with.

    Attributes:
        link: between them.
        kernels: constants by kernel, of the device of rank 0.
        multiprocessors: of that device.
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
    """The number of stages; a collective call where a group meets a device and type for the first time.

    Args:
        tokens: of a rank with the load of the one that has most to compute; of all ranks where they are `replicated`.
        shape: all E experts.
        ranks: that share them.
        replicated: whether all ranks have the same tokens.
        device: of this rank.
        dtype: of x.
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
    """The kernel of `among` for one stage's load, by what is known of this rank's own device."""
    return _kernel(_rounded(pairs), met, shape, device, dtype, among)


@functools.lru_cache(maxsize=4096)
def _kernel(
    pairs: float, met: int, shape: Shape, device: torch.device, dtype: torch.dtype, among: tuple[str, ...]
) -> str:
    return best_kernel(pairs, met, shape, fitted(device, dtype), among)[0]


def _rounded(load: float) -> float:
    """To a sixteenth of an octave, so that a choice is worked out once for many loads."""
    return 2 ** (round(16 * math.log2(max(load, 1))) / 16)


# -- what the ranks agree on ------------------------------------------------------------------------------------------

_known: dict[tuple[str, torch.device, torch.dtype], Agreed] = {}


def agreed(ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Agreed:
    """What rank 0 knows; measured by all, and kept by rank 0, where it knows nothing of the link."""
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
    """Keep `link` for later processes, whole or not at all; None without a writable cache."""
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
    """None for a file that is not there, or that another version of effpass wrote."""
    try:
        link = Link(**json.loads(file.read_text(encoding="utf-8")))
        numbers = astuple(link)
    except (OSError, ValueError, TypeError):
        return None
    return link if all(isinstance(n, (int, float)) and n > 0 for n in numbers) else None
