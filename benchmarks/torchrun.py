"""Starts processes of one group on this machine, also from a process of another group."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["torchrun"]

# What torchrun tells its processes.
_OF_A_RANK = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


def torchrun(processes: int, *arguments: str, device: str) -> None:
    """Run ``python -m`` with these arguments in `processes` processes, to their end.

    Raises:
        CalledProcessError: if a process fails.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _OF_A_RANK and not k.startswith("TORCHELASTIC_")}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    environment.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    subprocess.run([*command, "--nproc-per-node", str(processes), "-m", *arguments], env=environment, check=True)
