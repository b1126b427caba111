"""Goes on with the small model that more ranks saved; benchmarks.optimizer_ranks_equal starts it under torchrun.

python -m benchmarks.optimizer_ranks_resumed FOLDER DTYPE LAST_STEP DEVICE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import set_state_dict

from benchmarks.optimizer_ranks_equal import network, optimizer, shard, state, train, weights


def main() -> None:
    folder, kind, last, device = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    model = shard(network(device, getattr(torch, kind)), device)
    own = optimizer(model)
    saved = state(model, own)
    dcp.load(saved, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, own, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    losses = train(model, own, range(last // 2, last), device, ranks=dist.get_world_size())
    found = weights(model)
    if dist.get_rank() == 0:
        torch.save({"weights": found, "losses": losses}, folder / "resumed.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
