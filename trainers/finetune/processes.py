"""Arrangement of the processes of a run: which read different data, and which share every micro-batch.

Of P processes, S consecutive ones share their micro-batches by context parallelism: process r computes part r mod S of
the micro-batches that group r // S reads. Consecutive processes share, because they exchange data in the attention of
every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import pad
from transformers import TrainingArguments

from effpass.core.errors import EffpassError
from effpass.runtime.context_parallel import check_groups, shard

__all__ = ["ALONE", "Processes"]


@dataclass(frozen=True)
class Processes:
    """Place of this process in the arrangement.

    Attributes:
        rank: index of its group among the groups that read different data.
        world: number of these groups.
        sharing: number of processes S that share a micro-batch.
        context: mesh of the processes that share micro-batches with this one; None if S is 1.
        data: process group of the processes that read different data; None for all processes.
    """

    rank: int = 0
    world: int = 1
    sharing: int = 1
    context: DeviceMesh | None = None
    data: Any = None

    @classmethod
    def of(cls, args: TrainingArguments, sharing: int, config: Any) -> Processes:
        """Arrange all processes of a run; a collective call if `sharing` is more than 1.

        Args:
            args: arguments of the Trainer.
            sharing: number of processes S that share a micro-batch.
            config: transformers config of the model.

        Raises:
            EffpassError: if the number of processes is not a multiple of S.
            ModelError: if the KV heads of the model can't be divided among S processes.
        """
        if sharing == 1:
            return cls(args.process_index, args.world_size)
        text = config.get_text_config(decoder=True)
        check_groups(getattr(text, "num_key_value_heads", None) or text.num_attention_heads, sharing)
        if args.world_size % sharing:
            raise EffpassError(
                f"--context-parallel {sharing}: {args.world_size} processes are no multiple of it",
                hint=f"torchrun --nproc-per-node {sharing} -m effpass ..., or twice as many, and so on",
            )
        shape = args.world_size // sharing, sharing
        mesh = init_device_mesh(args.device.type, shape, mesh_dim_names=("data", "context"))
        rank = args.process_index // sharing
        return cls(rank, shape[0], sharing, mesh["context"], mesh["data"].get_group())

    def part(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return this process's part of a micro-batch `[B, T]`, or all of it if micro-batches are not shared.

        Tensors other than ``input_ids`` and ``position_ids`` refer to the prediction of a token from those before it.
        They are shifted to the token before, and so are the token ids, which become ``targets``. Values without a token
        to refer to are 0.
        """
        rows = {name: value for name, value in batch.items() if value.shape == batch["input_ids"].shape}
        others = {name: value for name, value in batch.items() if name not in rows}
        inputs = {name: rows.pop(name) for name in ("input_ids", "position_ids")}
        rows["targets"] = inputs["input_ids"]
        whole = {**others, **inputs, **{name: pad(x[:, 1:], (0, 1)) for name, x in rows.items()}}
        return whole if self.context is None else shard(whole, self.context)

    def total(self, x: Tensor) -> Tensor:
        """Sum a tensor over the parts of a micro-batch, in place, and return it."""
        if self.context is not None:
            torch.distributed.all_reduce(x, group=self.context.get_group())
        return x


ALONE = Processes()
