"""Which processes of a run read other data, and which share every micro-batch.

Process r of P, with S that share: the r mod S-th part of what r // S reads. Neighbours share, since they exchange
every layer's attention.
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
    """
    Attributes:
        rank: of this process among those that read other data.
        world: how many these are.
        sharing: S.
        context: those that share this process's micro-batches; None where S is 1.
        data: process group of those that read other data; None for all processes.
    """

    rank: int = 0
    world: int = 1
    sharing: int = 1
    context: DeviceMesh | None = None
    data: Any = None

    @classmethod
    def of(cls, args: TrainingArguments, sharing: int, config: Any) -> Processes:
        """All of the run, which begins; a collective call where `sharing` is more than 1.

        Args:
            args: of the Trainer.
            sharing: S.
            config: of the model.

        Raises:
            EffpassError: the processes are no multiple of S.
            ModelError: S processes can't share the model's key-value heads.
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
        """This process's part of a micro-batch `[B, T]`, all of it where nothing is shared.

        All but ``input_ids`` and ``position_ids`` is about the prediction of a token from those before; it is moved to
        the token before, and so are ``targets``, the tokens themselves. What is about no token is 0.
        """
        rows = {name: value for name, value in batch.items() if value.shape == batch["input_ids"].shape}
        others = {name: value for name, value in batch.items() if name not in rows}
        inputs = {name: rows.pop(name) for name in ("input_ids", "position_ids")}
        rows["targets"] = inputs["input_ids"]
        whole = {**others, **inputs, **{name: pad(x[:, 1:], (0, 1)) for name, x in rows.items()}}
        return whole if self.context is None else shard(whole, self.context)

    def total(self, x: Tensor) -> Tensor:
        """The sum of what the parts of a micro-batch have, in place."""
        if self.context is not None:
            torch.distributed.all_reduce(x, group=self.context.get_group())
        return x


ALONE = Processes()
