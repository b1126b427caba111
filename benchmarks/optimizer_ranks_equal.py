"""Area `optimizer` on several GPUs: a small model that all ranks train, against the one that a single GPU trains.

Parameters, states and orthogonalization are float32, and then all of them float64. Rounding differs where sums have
another order, and training amplifies it; how far it comes by itself is what the peer says: one GPU whose batch is cut
into as many parts as there are ranks.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rows import Row, row
from benchmarks.torchrun import torchrun
from effpass.lowering.ops.expert_parallel_exchange import Ranks
from effpass.trainers.mona import MONA, NewtonSchulz

AREA = "optimizer"
STEPS, SMOKE_STEPS = 50, 6
BATCH, LENGTH, VOCABULARY = 16, 64, 97


class Net(nn.Module):
    """Two layers of a transformer; shards of 693 rows are uneven.

    Without biases: the gradient of a key's bias is nothing but rounding, which AdamW makes as large as any other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 256)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(256, 4, 693, dropout=0.0, batch_first=True, norm_first=True, bias=False)
            for _ in range(2)
        )
        self.lm_head = nn.Linear(256, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], x.device, x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.lm_head(x)


def network(device: str, dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(device, dtype)


def shard(model: Net, device: str) -> Any:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer(model: nn.Module, replicas: Any = None) -> MONA:
    dtype = next(model.parameters()).dtype
    return MONA(model, lr=3e-3, newton_schulz=NewtonSchulz(dtype=dtype), acceleration_dtype=dtype, replicas=replicas)


def train(model: nn.Module, own: MONA, steps: range, device: str, *, ranks: int = 1, parts: int = 1) -> list[float]:
    """Train on sequences that count up by 0 to 2; the losses on this rank's share of each batch, cut into parts."""
    me = dist.get_rank() if ranks > 1 else 0
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 3, (BATCH, LENGTH), generator=generator).cumsum(1) % VOCABULARY
        own.zero_grad()
        total = torch.zeros((), device=device, dtype=torch.float64)
        for part in ids.chunk(ranks)[me].to(device).chunk(parts):
            loss = cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) / parts
            loss.backward()
            total += loss.detach()
        own.step()
        losses.append(total)
    found = torch.stack(losses)
    if ranks > 1:
        dist.all_reduce(found)
    return (found / ranks).tolist()


def weights(model: nn.Module) -> dict[str, Tensor]:
    values: dict[str, Any] = {name: p.detach() for name, p in model.named_parameters()}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().clone() for n, t in values.items()}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of any weight: the norm of its difference over its own norm."""
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


def equality(ranks: Ranks, waiting: Any, device: str, smoke: bool) -> Iterator[Row]:
    """One GPU's weights against those of DDP, of FSDP2, and of a run that was saved and went on with half the ranks."""
    torch.set_float32_matmul_precision("highest")
    for dtype in (torch.float64,) if smoke else (torch.float32, torch.float64):
        yield from _of(dtype, ranks, waiting, device, SMOKE_STEPS if smoke else STEPS)


def _of(dtype: torch.dtype, ranks: Ranks, waiting: Any, device: str, last: int) -> Iterator[Row]:
    size, first, kind = ranks.size, last // 2, str(dtype).removeprefix("torch.")
    one: dict[str, Tensor] = {}
    rounding = 0.0
    model: Any
    if ranks.me == 0:
        model = network(device, dtype)
        train(model, optimizer(model), range(last), device)
        one = weights(model)
        model = network(device, dtype)
        train(model, optimizer(model), range(last), device, parts=size)
        rounding = difference(weights(model), one)
    dist.barrier(waiting)
    model = network(device, dtype)
    copied = DistributedDataParallel(model)
    train(copied, optimizer(model, dist.group.WORLD), range(last), device, ranks=size)
    found = {"DDP": weights(model)}

    places = [tempfile.mkdtemp() if ranks.me == 0 else ""]
    dist.broadcast_object_list(places, group=waiting)
    folder = Path(places[0])
    model = shard(network(device, dtype), device)
    own = optimizer(model)
    train(model, own, range(first), device, ranks=size)
    dcp.save(state(model, own), checkpoint_id=folder / "checkpoint")
    losses = train(model, own, range(first, last), device, ranks=size)
    found["FSDP2"] = weights(model)
    if ranks.me == 0:
        case = f"2 layers of width 256 in {kind}, {last} steps, {size} ranks"
        common: dict[str, Any] = {"peer": rounding, "peer_name": f"one GPU, its batch in {size} parts"}
        common |= {"device": device, "note": "norm of the difference over that of the weight"}
        for held, values in found.items():
            off = difference(values, one)
            yield row(AREA, case, f"largest difference of a weight to one GPU's, {held}", off, "", **common)
        torchrun(size // 2, "benchmarks.optimizer_ranks_resumed", str(folder), kind, str(last), device, device=device)
        resumed = torch.load(folder / "resumed.pt")
        by = max(abs(a - b) for a, b in zip(resumed["losses"], losses, strict=True))
        common["note"] += f"; losses after step {first} differ by up to {by:.2g}, the last is {losses[-1]:.4g}"
        yield row(
            AREA, case, f"largest difference of a weight, saved by {size} ranks, gone on with {size // 2}",
            difference(resumed["weights"], found["FSDP2"]), "", **common,
        )  # fmt: skip
        shutil.rmtree(folder)
    dist.barrier(waiting)


def state(model: nn.Module, own: MONA) -> dict[str, Any]:
    """What a checkpoint holds."""
    values, states = get_state_dict(model, own)
    return {"model": values, "optimizer": states}
