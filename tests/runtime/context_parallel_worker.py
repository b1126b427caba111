"""What each process of test_context_parallel runs.

context_parallel_worker.py FOLDER     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, and DEVICE=cuda where
there are GPUs; FOLDER/RANK.pt
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import make
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel

from effpass.core.errors import EffpassError
from effpass.runtime.context_parallel import Context, shard
from effpass.runtime.routed_attention import install

DEVICE = os.environ.get("DEVICE", "cpu")
BLOCK = 16
BUDGETS = [32, 48]
WATCHED = [32, 48, 96]
# Documents of each row.
ROWS = {"odd": [[61, 1, 38, 7]], "rows": [[60, 40], [33, 67]], "short": [[3]], "even": [[70, 29, 1, 60]]}


def micro_batch(rows: list[list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (len(rows), sum(rows[0])), generator=generator).to(DEVICE)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]).to(DEVICE)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def attending(**changes: Any) -> tuple[Any, Any]:
    model = make("llama", **changes).train().requires_grad_(True).to(DEVICE)
    routed = install(model, block=BLOCK, budget=48, max_budget=96)
    routed.budgets = torch.tensor(BUDGETS, dtype=torch.int32, device=DEVICE)
    routed.watch(torch.tensor(WATCHED, dtype=torch.int32))
    return model, routed


def learned(model: Any, routed: Any, part: dict[str, Any], graded: int) -> dict[str, Tensor]:
    """Loss over all graded tokens, this rank's part of it, and likewise gradients."""
    model.zero_grad()
    loss = model(**part, num_items_in_batch=graded, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "curves": routed.curves.clone(), **found}


def added(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all ranks; curves are means already."""
    for name, value in found.items():
        if name != "curves":
            dist.all_reduce(value)
    return found


def whole(rows: list[list[int]]) -> dict[str, Tensor]:
    model, routed = attending()
    batch = micro_batch(rows)
    return learned(model, routed, batch, _graded(batch))


def split(rows: list[list[int]], mesh: DeviceMesh, prepare: Callable[[Any], None] = lambda model: None) -> Any:
    model, routed = attending()
    prepare(model)
    batch = micro_batch(rows)
    return added(learned(model, routed, shard(batch, mesh), _graded(batch)))


def sharded(rows: list[list[int]], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Weights lie on the same ranks, by FSDP2, which takes means of gradients."""
    model, routed = attending()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = micro_batch(rows)
    found = learned(model, routed, shard(batch, mesh), _graded(batch))
    dist.all_reduce(found["loss"])
    return {name: x.full_tensor() * mesh.size() if isinstance(x, DTensor) else x for name, x in found.items()}


def under_pytorch(rows: list[list[int]], mesh: DeviceMesh, prepare: Callable[[Any], None] = lambda model: None) -> Any:
    """The batch split by PyTorch's `context_parallel`, which deals heads and tails of the row."""
    model, routed = attending()
    prepare(model)
    with dealt(rows, mesh) as (part, graded):
        found = learned(model, routed, part, graded)
    return added(found) | {"order": part["effpass_context"].order}


@contextmanager
def dealt(rows: list[list[int]], mesh: DeviceMesh) -> Iterator[tuple[dict[str, Any], int]]:
    batch = micro_batch(rows)
    graded, tokens = _graded(batch), batch["input_ids"].numel()
    labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    batch |= {"labels": labels, "shift_labels": labels.clone(), "order": torch.arange(tokens, device=DEVICE)[None]}
    buffers = list(batch.values())
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)):
        yield batch | {"effpass_context": Context(mesh, tokens, batch.pop("order"))}, graded


def _graded(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum() + (batch["labels"][1:, 0] != -100).sum())


def compiled(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """What errors say; on all ranks, and none of them waits for another."""
    model, _ = attending()
    batch = micro_batch(ROWS["odd"])
    part = shard(micro_batch(ROWS["even"]), mesh)
    odd = {name: x.chunk(2, 1)[dist.get_rank()] for name, x in batch.items()}

    def heads() -> None:
        other, _ = attending(num_key_value_heads=1)
        other(**part, use_cache=False)

    calls: dict[str, Callable[[], Any]] = {
        "uneven": lambda: model(**odd, effpass_context=Context(mesh, 107), use_cache=False),
        "positions": lambda: model(**{**part, "position_ids": None}, use_cache=False),
        "mask": lambda: shard({**batch, "attention_mask": torch.ones(1, 107)}, mesh),
        "no positions": lambda: shard({"input_ids": batch["input_ids"]}, mesh),
        "order": lambda: model(**{**part, "effpass_context": Context(mesh, 160, torch.arange(3))}, use_cache=False),
        "heads": heads,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except EffpassError as error:
            found[name] = f"{error.message} | {error.hint}"
    return found


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    mesh = init_device_mesh(DEVICE, (world,))
    found: dict[str, Any] = {name: (split(rows, mesh), whole(rows)) for name, rows in ROWS.items()}
    found["dealt"] = under_pytorch(ROWS["even"], mesh), found["even"][1]
    found["dealt, compiled"] = under_pytorch(ROWS["even"], mesh, compiled), found["even"][1]
    found["checkpointed"] = split(ROWS["odd"], mesh, checkpointed), found["odd"][1]
    found["compiled"] = split(ROWS["odd"], mesh, compiled), found["odd"][1]
    found["sharded"] = sharded(ROWS["odd"], mesh), found["odd"][1]
    found["refused"] = refused(mesh)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
